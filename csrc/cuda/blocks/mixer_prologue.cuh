// Gated DeltaNet between its products, for the heads of one CTA.
//
//   x_t <- silu(sum_j taps_j x_(t-j)), x any of q, k, v;  q, k <- q, k / |q|, |k|
//   S_t = a_t S_(t-1) + k_t b_t (v_t - a_t S_(t-1)^T k_t)^T
//   o_t = S_t^T q_t / K^1/2
//   mixed = o / rms(o) . gain . silu(gate)
//
// `wide` holds q, k, v and gate of all rows as a tile (arch/mma_tiles.h). The convolution overwrites its inputs, and o
// overwrites v.
#pragma once

#include "common/types.h"
#include "cuda/arch/mma_tiles.h"
#include "cuda/arch/ptx.h"
#include "cuda/blocks/operands.cuh"
#include "cuda/blocks/params.h"
#include "cuda/blocks/recurrence.cuh"
#include "cuda/blocks/smem_layout.cuh"
#include "cuda/blocks/weight_stream.cuh"
#include "cuda/recurrence/params.h"
#include "cuda/recurrence/tokens.cuh"

namespace sleepkern::cuda {

// The model's channel of this CTA's channel `local`, -1 for padding.
SLEEPKERN_DEVICE int channel_of(const BlocksParams& call, const BlockLayer& layer, int rank, int local) {
  const int keys = layer.heads * layer.KP, all_keys = call.cluster * layer.heads * layer.K;
  if (local < 2 * keys) {
    const Division part = divide(local, keys), head = divide(part.rest, layer.KP);
    return head.rest < layer.K ? part.quotient * all_keys + (rank * layer.heads + head.quotient) * layer.K + head.rest
                               : -1;
  }
  local -= 2 * keys;
  const Division head = divide(local, layer.VP);
  return head.rest < layer.V ? 2 * all_keys + (rank * layer.value_heads + head.quotient) * layer.V + head.rest : -1;
}

// The inputs of the convolution before the window, tokens -1, -2, ...
struct PastInputs {
  const void* data;
  Type type;
  int W;
  int64_t channels;  // channels of the model

  SLEEPKERN_DEVICE PastInputs(const BlocksParams& call, const BlockLayer& layer, int pass)
      : data(layer.past), type(static_cast<Type>(call.type)), W(layer.W) {
    channels = static_cast<int64_t>(call.cluster) * (2 * layer.heads * layer.K + layer.value_heads * layer.V);
    if (call.carry && pass > 0) data = last(call, layer, pass - 1);
  }
  SLEEPKERN_DEVICE char* last(const BlocksParams& call, const BlockLayer& layer, int pass) const {
    const int64_t size = static_cast<int64_t>(call.B) * (W - 1) * channels * (type == Type::float32 ? 4 : 2);
    return static_cast<char*>(layer.last) + (pass & 1) * size;
  }
  SLEEPKERN_DEVICE float at(int window, int t, int channel) const {
    if (data == nullptr || channel < 0 || t < 1 - W) return 0.0f;
    return load_one(data, type, (static_cast<int64_t>(window) * (W - 1) + W - 1 + t) * channels + channel);
  }
};

// Stores the last W - 1 inputs, for the next window or the next pass.
SLEEPKERN_DEVICE void keep_last(const BlocksParams& call, const BlockLayer& layer, const Cta& cta, const uint16_t* wide,
                                int pass) {
  if (!call.carry && pass + 1 < call.passes) return;
  const PastInputs past(call, layer, pass);
  void* to = past.last(call, layer, pass);
  const int rows = layer.W - 1;
  for (int e = opaque(threadIdx.x); e < cta.windows * rows * layer.channels(); e += THREADS) {
    const Division of = divide(e, layer.channels()), position = divide(of.quotient, rows);
    const int local = of.rest, j = position.rest, w = position.quotient;
    const int t = call.L - rows + j, channel = channel_of(call, layer, cta.rank, local);
    if (channel < 0) continue;
    const float x = t >= 0 ? from_bf16(wide[at<Mode::bf16>(layer.into, w * call.padded() + t, local)])
                           : past.at(cta.first + w, t, channel);
    store_one(to, past.type, (static_cast<int64_t>(cta.first + w) * rows + j) * past.channels + channel, x);
  }
}

// Two channels of token t < 0 of a window, as a word.
SLEEPKERN_DEVICE float pair_before(const BlocksParams& call, const BlockLayer& layer, const Cta& cta,
                                   const PastInputs& past, int w, int t, int column) {
  float x[2];
#pragma unroll 1
  for (int i = 0; i < 2; ++i) {
    const float one = past.at(cta.first + w, t, channel_of(call, layer, cta.rank, column + i));
    x[0] = i == 0 ? one : x[0];
    x[1] = one;
  }
  return from_bits(pack_bf16(x[0], x[1]));
}

// The short convolution in place. A warp takes 8 channels of a window and 8 tokens at a time; a lane takes two channels
// of one token, and holds them of the token 8 before it as well. Shuffles give it the earlier tokens of other lanes.
SLEEPKERN_DEVICE void convolve(const BlocksParams& call, const BlockLayer& layer, const Cta& cta, uint16_t* wide,
                               int pass) {
  const int chunks = layer.channels() / 8, lane = lane_of_warp(), g = lane >> 2;
  const PastInputs past(call, layer, pass);
  const float4* taps = reinterpret_cast<const float4*>(layer.taps) + cta.rank * layer.channels();
  const int warp = threadIdx.x >> 5, tasks = chunks * cta.windows, pair = 2 * (lane & 3);
  const auto column_of_task = [&](int task) { return 8 * divide(task, chunks).rest + pair; };
  float4 low = taps[column_of_task(warp)], high = taps[column_of_task(warp) + 1];
  for (int task = warp; task < tasks; task += WARPS) {
    const int w = divide(task, chunks).quotient, column = column_of_task(task);
    const float low_taps[TAPS] = {low.w, low.z, low.y, low.x}, high_taps[TAPS] = {high.w, high.z, high.y, high.x};
    const int following =
        column_of_task(task + WARPS < tasks ? task + WARPS : task);  // the task whose taps are loaded during this one
    low = taps[following], high = taps[following + 1];
    float before = past.data == nullptr ? 0.0f : pair_before(call, layer, cta, past, w, g - 8, column);
    uint32_t* at_row = reinterpret_cast<uint32_t*>(wide + at<Mode::bf16>(layer.into, w * call.padded() + g, column));
    for (int row = 0; row < call.padded(); row += 8, at_row += 4 * layer.into) {
      const float now = from_bits(*at_row);  // bf16x2 as one word
      float y[2] = {low_taps[0] * low_of(as_bits(now)), high_taps[0] * high_of(as_bits(now))};
#pragma unroll
      for (int j = 1; j < TAPS; ++j) {
        const uint32_t x = as_bits(shuffle_from(g + j < 8 ? now : before, (lane - 4 * j) & 31));
        y[0] += low_taps[j] * low_of(x);
        y[1] += high_taps[j] * high_of(x);
      }
      *at_row = pack_bf16(y[0] * sigmoid(y[0]), y[1] * sigmoid(y[1]));
      before = now;
    }
  }
}

// Computes factors [2][heads][rows]: 1 / |q| K^-1/2 and 1 / |k| of each row. A warp takes 8 rows, with 4 lanes a row.
SLEEPKERN_DEVICE void find_factors(const BlocksParams& call, const BlockLayer& layer, uint16_t* wide, float* factors) {
  const int cores = 2 * call.tiles, lane = lane_of_warp();
  for (int task = threadIdx.x >> 5; task < 2 * layer.heads * cores; task += WARPS) {
    const Division of = divide(task, cores);
    const int row = 8 * of.rest + (lane & 7), head = of.quotient;  // heads of q, then of k
    const float square = sum_of_squares(wide, layer.into, row, head * layer.KP, layer.KP);
    const float scale = head < layer.heads ? rsqrtf(static_cast<float>(layer.K)) : 1.0f;
    if (lane < 8) factors[head * 8 * cores + row] = scale * rsqrtf(square + NORM_EPS);
  }
}

// Computes o / rms(o) . gain . silu(gate) of each row as a left operand; rows without a token become 0.
SLEEPKERN_DEVICE void gated_norm(const BlocksParams& call, const BlockLayer& layer, const Cta& cta,
                                 const SmemLayout& smem) {
  const int cores = 2 * call.tiles, lane = lane_of_warp();
  uint32_t* mixed = reinterpret_cast<uint32_t*>(smem.mixed());
  for (int task = threadIdx.x >> 5; task < layer.value_heads * cores; task += WARPS) {
    const Division of = divide(task, cores);
    const int row = 8 * of.rest + (lane & 7), head = of.quotient;
    const int from = 2 * layer.heads * layer.KP + head * layer.VP, gates = from + layer.value_heads * layer.VP;
    const float square = sum_of_squares(smem.wide(), layer.into, row, from, layer.VP);
    const float factor =
        cta.has_token(call, row) ? rsqrtf(quotient(square, static_cast<float>(layer.V)) + layer.gain_eps) : 0.0f;
    for (int d = 8 * (lane >> 3); d < layer.VP; d += 32) {
      float x[8], gate[8];
      read_eight(x, *eight_at(smem.wide(), layer.into, row, from + d));
      read_eight(gate, *eight_at(smem.wide(), layer.into, row, gates + d));
      float gain[8];
      load_gains(gain, layer.gain + d);
      uint32_t* to =
          mixed + word_of(call.tiles, row, head * layer.VP + d);  // the bf16x2 of 8 columns are 4 words apart
#pragma unroll
      for (int e = 0; e < 8; e += 2) {
        const float low = x[e] * factor * gain[e] * gate[e] * sigmoid(gate[e]);
        const float high = x[e + 1] * factor * gain[e + 1] * gate[e + 1] * sigmoid(gate[e + 1]);
        to[2 * e] = pack_bf16(low, high);
      }
    }
  }
}

template <int KEYS>
SLEEPKERN_DEVICE void mix_recurrent(const BlocksParams& call, const BlockLayer& layer, const Cta& cta,
                                    const SmemLayout& smem, int pass) {
  keep_last(call, layer, cta, smem.wide(), pass);
  block_barrier();
  convolve(call, layer, cta, smem.wide(), pass);
  block_barrier();
  find_factors(call, layer, smem.wide(), smem.factors());
  block_barrier();
  each_token_block(call, layer, cta,
                   [&](int w, int head, int block) { token_block_factors(call, layer, smem, w, head, block); });
  block_barrier();
  const int groups = layer.VP / 16, tasks = cta.windows * layer.value_heads * groups;
  for (int task = threadIdx.x >> 5; task < tasks; task += WARPS) {
    const Division of = divide(task, groups), window = divide(of.quotient, layer.value_heads);
    state_pass<KEYS>(call, layer, cta, smem, pass, window.quotient, window.rest, 16 * of.rest);
  }
  block_barrier();
  gated_norm(call, layer, cta, smem);
}

}  // namespace sleepkern::cuda
