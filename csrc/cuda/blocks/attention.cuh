// Attention between its products, for the heads of one CTA.
//
//   q, k <- q, k / rms . gain
//   o_i = sum_j softmax_j(q_i . k_j / D^1/2) v_j,  j <= i or kept from before the window
//
// `wide` holds q, k and v of all rows as a tile (arch/mma_tiles.h), q and k normalised in place. A warp takes 16
// queries of a head, and 16 keys at a time: their scores, in registers, become the left operand of the product with the
// values, relative to a running maximum (online softmax). The keys and values of earlier windows are read from global
// memory.
#pragma once

#include "common/types.h"
#include "cuda/arch/mma_tiles.h"
#include "cuda/arch/ptx.h"
#include "cuda/blocks/operands.cuh"
#include "cuda/blocks/params.h"
#include "cuda/blocks/smem_layout.cuh"
#include "cuda/blocks/weight_stream.cuh"
#include "cuda/recurrence/params.h"
#include "cuda/recurrence/tokens.cuh"

namespace sleepkern::cuda {

// The keys and values of a window and head in global memory, [kept + L][D].
struct CachedKV {
  char *keys, *values;
  Type type;
  int D;

  SLEEPKERN_DEVICE CachedKV(const BlocksParams& call, const BlockLayer& layer, const Cta& cta, int w, int head)
      : type(static_cast<Type>(call.type)), D(layer.K) {
    const int64_t at = static_cast<int64_t>(cta.first + w) * call.cluster * layer.heads + cta.rank * layer.heads + head;
    const int64_t first = at * (layer.kept + call.L) * D * (type == Type::float32 ? 4 : 2);
    keys = static_cast<char*>(layer.keys) + first;
    values = static_cast<char*>(layer.values) + first;
  }
  SLEEPKERN_DEVICE float one(const char* from, int token, int d, int tokens) const {
    return token < tokens && d < D ? load_one(from, type, static_cast<int64_t>(token) * D + d) : 0.0f;
  }
  // Right operands, as RightLoader and TransposedLoader load them: 16 tokens from `first` on, 16 columns from d0 on.
  SLEEPKERN_DEVICE Fragment<Mode::bf16> key_fragment(int first, int d0, int tokens) const {
    const int g = lane_of_warp() >> 2, t = lane_of_warp() & 3;
    Fragment<Mode::bf16> f;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int token = first + g + 8 * (i >> 1), d = d0 + 2 * t + 8 * (i & 1);
      f.high[i] = pack_bf16(one(keys, token, d, tokens), one(keys, token, d + 1, tokens));
    }
    return f;
  }
  SLEEPKERN_DEVICE Fragment<Mode::bf16> value_fragment(int first, int d0, int tokens) const {
    const int g = lane_of_warp() >> 2, t = lane_of_warp() & 3;
    Fragment<Mode::bf16> f;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int token = first + 2 * t + 8 * (i & 1), d = d0 + g + 8 * (i >> 1);
      f.high[i] = pack_bf16(one(values, token, d, tokens), one(values, token + 1, d, tokens));
    }
    return f;
  }
};

// Divides q and k of each row by their root mean square and multiplies by the gain. With `keep` it stores k in global
// memory.
SLEEPKERN_DEVICE void normalise_heads(const BlocksParams& call, const BlockLayer& layer, const Cta& cta, uint16_t* wide,
                                      bool keep) {
  const int cores = 2 * call.tiles, lane = lane_of_warp();
  for (int task = threadIdx.x >> 5; task < 2 * layer.heads * cores; task += WARPS) {
    const Division of = divide(task, cores);
    const int row = 8 * of.rest + (lane & 7), head = of.quotient;  // heads of q, then of k
    const bool query = head < layer.heads;
    const float square = sum_of_squares(wide, layer.into, row, head * layer.KP, layer.KP);
    const float factor = rsqrtf(quotient(square, static_cast<float>(layer.K)) + (query ? layer.q_eps : layer.k_eps));
    const float* gains = query ? layer.q_gain : layer.k_gain;
    const bool kept = keep && !query && cta.has_token(call, row);
    for (int d = 8 * (lane >> 3); d < layer.KP; d += 32) {
      float x[8], gain[8];
      uint4* at = eight_at(wide, layer.into, row, head * layer.KP + d);
      read_eight(x, *at);
      load_gains(gain, gains + d);
#pragma unroll
      for (int e = 0; e < 8; ++e) x[e] *= factor * gain[e];
      *at = eight_of(x);
      if (!kept) continue;
      const Division position = divide(row, call.padded());
      const CachedKV to(call, layer, cta, position.quotient, head - layer.heads);
      const int64_t first = static_cast<int64_t>(layer.kept + position.rest) * layer.K;
      for (int e = 0; e < 8; ++e) {
        if (d + e < layer.K) store_one(to.keys, to.type, first + d + e, x[e]);
      }
    }
  }
}

SLEEPKERN_DEVICE void keep_values(const BlocksParams& call, const BlockLayer& layer, const Cta& cta,
                                  const uint16_t* wide) {
  const int each = layer.heads * layer.K;
  for (int e = opaque(threadIdx.x); e < cta.windows * call.L * each; e += THREADS) {
    const Division row = divide(e, each), position = divide(row.quotient, call.L), of = divide(row.rest, layer.K);
    const CachedKV to(call, layer, cta, position.quotient, of.quotient);
    const int column = (2 * layer.heads + of.quotient) * layer.KP + of.rest;
    const float x =
        from_bf16(wide[at<Mode::bf16>(layer.into, position.quotient * call.padded() + position.rest, column)]);
    store_one(to.values, to.type, static_cast<int64_t>(layer.kept + position.rest) * layer.K + of.rest, x);
  }
}

// Online softmax of 16 queries over 16 keys at a time: maximum and sum of each of a lane's two rows, and the sum of the
// values so far.
template <int KEYS>
struct OnlineSoftmax {
  static constexpr int MOST = KEYS / 8;
  float o[MOST][4], highest[2], sum[2];

  SLEEPKERN_DEVICE OnlineSoftmax() {
    clear(o);
    highest[0] = highest[1] = -INFINITY;
    sum[0] = sum[1] = 0.0f;
  }

  // Adds 16 keys. seen(i, j): whether query i sees key j; value(n): the right operand for columns from 16 n on.
  template <class Seen, class Value>
  SLEEPKERN_DEVICE void add(float (&scores)[2][4], int groups, Seen seen, Value value) {
#pragma unroll
    for (int n = 0; n < 2; ++n) {
#pragma unroll
      for (int i = 0; i < 4; ++i) scores[n][i] = seen(row_of(i), column_of(n, i)) ? scores[n][i] : -INFINITY;
    }
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      float top = fmaxf(fmaxf(scores[0][2 * r], scores[0][2 * r + 1]), fmaxf(scores[1][2 * r], scores[1][2 * r + 1]));
      top = fmaxf(top, shuffle_xor(top, 1));
      top = fmaxf(top, shuffle_xor(top, 2));
      top = fmaxf(top, highest[r]);
      const float base = top == -INFINITY ? 0.0f : top;  // a row that has seen no key so far
      const float shrink = decayed(highest[r] - base);
      highest[r] = top;
      sum[r] *= shrink;
#pragma unroll
      for (int n = 0; n < 2; ++n) {
#pragma unroll
        for (int i = 2 * r; i < 2 * r + 2; ++i) {
          scores[n][i] = decayed(scores[n][i] - base);
          sum[r] += scores[n][i];
        }
      }
#pragma unroll
      for (int n = 0; n < MOST; ++n) {
        o[n][2 * r] *= shrink;
        o[n][2 * r + 1] *= shrink;
      }
    }
    const Fragment<Mode::bf16> weights = left_of<Mode::bf16>(scores, 0);
#pragma unroll
    for (int n = 0; n < MOST / 2; ++n) {
      if (n >= groups) continue;
      const Fragment<Mode::bf16> f = value(n);
      mma<Mode::bf16>(o[2 * n], weights, f, 0);
      mma<Mode::bf16>(o[2 * n + 1], weights, f, 1);
    }
  }
};

// Computes 16 queries of window w, from query 16 * block on.
template <int KEYS>
SLEEPKERN_DEVICE void attend_block(const BlocksParams& call, const BlockLayer& layer, const Cta& cta,
                                   const SmemLayout& smem, int w, int head, int block) {
  const int start = w * call.padded(), groups = layer.KP / 16;
  const int q_at = head * layer.KP, k_at = layer.heads * layer.KP + q_at, v_at = layer.heads * layer.KP + k_at;
  const Blocks16 wide(call, smem.wide(), layer.into, w);
  OnlineSoftmax<KEYS> softmax;
  for (int first = 0; first < layer.kept; first += 16) {
    const CachedKV kept(call, layer, cta, w, head);
    float scores[2][4];
    clear(scores);
#pragma unroll 1
    for (int n = 0; n < groups; ++n) {
      const Fragment<Mode::bf16> q = wide.left(start + 16 * block, q_at + 16 * n);
      const Fragment<Mode::bf16> k = kept.key_fragment(first, 16 * n, layer.kept);
      mma<Mode::bf16>(scores[0], q, k, 0);
      mma<Mode::bf16>(scores[1], q, k, 1);
    }
    softmax.add(
        scores, groups, [&](int, int j) { return first + j < layer.kept; },
        [&](int n) {
          return kept.value_fragment(opaque(first), 16 * n, layer.kept);
        });  // opaque: one fragment at a time
  }
  for (int keys = 0; keys <= block; ++keys) {
    float scores[2][4];
    clear(scores);
#pragma unroll 1
    for (int n = 0; n < groups; ++n) {
      const Fragment<Mode::bf16> q = wide.left(start + 16 * block, q_at + 16 * n);
      const Fragment<Mode::bf16> k = wide.right(start + 16 * keys, k_at + 16 * n);
      mma<Mode::bf16>(scores[0], q, k, 0);
      mma<Mode::bf16>(scores[1], q, k, 1);
    }
    // mutant: pad-rows-read-beyond-their-window
    softmax.add(
        scores, groups, [&](int i, int j) { return keys < block || j <= i; },
        [&](int n) { return wide.right_transposed(start + 16 * keys, v_at + 16 * n); });
  }
  uint32_t* mixed = reinterpret_cast<uint32_t*>(smem.mixed());
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    float sum = softmax.sum[r] + shuffle_xor(softmax.sum[r], 1);
    sum += shuffle_xor(sum, 2);
    const int t = 16 * block + row_of(2 * r);
    if (t >= call.padded()) continue;
    const float factor = t < call.L ? quotient(1.0f, sum) : 0.0f;
#pragma unroll
    for (int n = 0; n < softmax.MOST; ++n) {
      if (n >= 2 * groups) continue;
      mixed[word_of(call.tiles, start + t, head * layer.KP + column_of(n, 0))] =
          pack_bf16(softmax.o[n][2 * r] * factor, softmax.o[n][2 * r + 1] * factor);
    }
  }
}

template <int KEYS>
SLEEPKERN_DEVICE void attend(const BlocksParams& call, const BlockLayer& layer, const Cta& cta, const SmemLayout& smem,
                             int pass) {
  const bool keep = pass + 1 == call.passes;
  normalise_heads(call, layer, cta, smem.wide(), keep);
  if (keep) keep_values(call, layer, cta, smem.wide());
  block_barrier();
  const int blocks = (call.L + 15) / 16, tasks = cta.windows * layer.heads * blocks;
  for (int task = threadIdx.x >> 5; task < tasks; task += WARPS) {
    const Division of = divide(task, blocks), window = divide(of.quotient, layer.heads);
    attend_block<KEYS>(call, layer, cta, smem, window.quotient, window.rest, blocks - 1 - of.rest);
  }
  uint32_t* mixed = reinterpret_cast<uint32_t*>(smem.mixed());
  const int first = cta.windows * call.padded(), pairs = layer.mixed() / 2;
  for (int e = opaque(threadIdx.x); e < (16 * call.tiles - first) * pairs; e += THREADS) {
    const Division of = divide(e, pairs);
    mixed[word_of(call.tiles, first + of.quotient, 2 * of.rest)] = 0;
  }
}

}  // namespace sleepkern::cuda
