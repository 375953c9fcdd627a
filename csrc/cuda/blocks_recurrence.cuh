// Gated DeltaNet between its products, for the heads of one thread block.
//
//   x <- silu(sum_j taps_j x_(t-3+j))    S_t = a_t S_(t-1) + k_t b_t (v_t - a_t S_(t-1)^T k_t)^T    o_t = S_t^T q_t /
//   K^1/2 mixed = o / rms(o) . gain . silu(gate)                                          k and q normalised, a and b
//   sigmoids
//
// `wide` holds q, k, v and gate of all rows as a tile (tile.h): the convolution writes over its own inputs, o over v. A
// warp walks over a window with 8 value columns of a head's state in registers, in float32; that is token by token, but
// a window is short, all heads and columns walk at once, and there is no barrier in it. The state itself lies in global
// memory between two passes over a layer: all layers' states do not fit on chip (Rule 110: 256 KB a window), and L2
// gives one back in less time than one of the layer's products takes.
#pragma once

#include "cuda/blocks_memory.cuh"
#include "cuda/rows.cuh"

namespace sleepkern::cuda {

SLEEPKERN_DEVICE float sigmoid(float x) {
  const float e = decayed(-fabsf(x));
  return (x < 0.0f ? e : 1.0f) / (1.0f + e);
}

// The bf16 pair in a word.
SLEEPKERN_DEVICE float low_of(uint32_t word) { return from_bits(word << 16); }
SLEEPKERN_DEVICE float high_of(uint32_t word) { return from_bits(word & 0xffff0000u); }

// 8 columns of a row, where they lie in a tile.
SLEEPKERN_DEVICE uint4* eight_at(uint16_t* tile, int columns, int row, int column) {
  return reinterpret_cast<uint4*>(tile + at<Mode::bf16>(columns, row, column));
}
SLEEPKERN_DEVICE void read_eight(float (&x)[8], const uint4& words) {
  const uint32_t w[4] = {words.x, words.y, words.z, words.w};
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    x[2 * i] = low_of(w[i]);
    x[2 * i + 1] = high_of(w[i]);
  }
}
SLEEPKERN_DEVICE uint4 eight_of(const float (&x)[8]) {
  return make_uint4(pack_bf16(x[0], x[1]), pack_bf16(x[2], x[3]), pack_bf16(x[4], x[5]), pack_bf16(x[6], x[7]));
}

// The model's channel of this thread block's channel c, -1 where that is only padding.
SLEEPKERN_DEVICE int channel_of(const BlocksCall& call, const BlockLayer& l, int rank, int c) {
  const int keys = l.heads * l.KP, all_keys = call.cluster * l.heads * l.K;
  if (c < 2 * keys) {
    const int part = c / keys, head = c % keys / l.KP, i = c % l.KP;
    return i < l.K ? part * all_keys + (rank * l.heads + head) * l.K + i : -1;
  }
  c -= 2 * keys;
  const int head = c / l.VP, i = c % l.VP;
  return i < l.V ? 2 * all_keys + (rank * l.value_heads + head) * l.V + i : -1;
}

// Inputs of the convolution before the window: of token -1, -2, ...
struct Past {
  const void* data;
  Type type;
  int W;
  int64_t channels;  // of the model

  SLEEPKERN_DEVICE Past(const BlocksCall& c, const BlockLayer& l, int pass)
      : data(l.past), type(static_cast<Type>(c.type)), W(l.W) {
    channels = static_cast<int64_t>(c.cluster) * (2 * l.heads * l.K + l.value_heads * l.V);
    if (c.carry && pass > 0) data = last(c, l, pass - 1);
  }
  SLEEPKERN_DEVICE char* last(const BlocksCall& c, const BlockLayer& l, int pass) const {
    const int64_t size = static_cast<int64_t>(c.B) * (W - 1) * channels * (type == Type::float32 ? 4 : 2);
    return static_cast<char*>(l.last) + (pass & 1) * size;
  }
  SLEEPKERN_DEVICE float at(int window, int t, int channel) const {
    if (data == nullptr || channel < 0 || t < 1 - W) return 0.0f;
    return load_one(data, type, (static_cast<int64_t>(window) * (W - 1) + W - 1 + t) * channels + channel);
  }
};

// The last W - 1 inputs, for the next window, or the next pass.
SLEEPKERN_DEVICE void keep_last(const BlocksCall& c, const BlockLayer& l, const Place& p, const uint16_t* wide,
                                int pass) {
  if (!c.carry && pass + 1 < c.passes) return;
  const Past past(c, l, pass);
  void* to = past.last(c, l, pass);
  const int rows = l.W - 1;
  for (int e = threadIdx.x; e < p.windows * rows * l.channels(); e += THREADS) {
    const int local = e % l.channels(), j = e / l.channels() % rows, w = e / l.channels() / rows;
    const int t = c.L - rows + j, channel = channel_of(c, l, p.rank, local);
    if (channel < 0) continue;
    const float x =
        t >= 0 ? from_bf16(wide[at<Mode::bf16>(l.into, w * c.padded() + t, local)]) : past.at(p.first + w, t, channel);
    store_one(to, past.type, (static_cast<int64_t>(p.first + w) * rows + j) * past.channels + channel, x);
  }
}

// In place: a warp takes 8 channels of a window and 8 tokens at a time, a lane two channels of one token; what was said
// by the tokens before comes from the other lanes, which hold 8 tokens and the 8 before them.
SLEEPKERN_DEVICE void convolve(const BlocksCall& c, const BlockLayer& l, const Place& p, uint16_t* wide, int pass) {
  const int chunks = l.channels() / 8, lane = lane_of_warp(), g = lane >> 2;
  const Past past(c, l, pass);
  for (int task = threadIdx.x >> 5; task < chunks * p.windows; task += WARPS) {
    const int w = task / chunks, column = task % chunks * 8 + 2 * (lane & 3);
    const float* taps = l.taps + (static_cast<int64_t>(p.rank) * l.channels() + column) * TAPS;
    float low_taps[TAPS], high_taps[TAPS];
#pragma unroll
    for (int j = 0; j < TAPS; ++j) {
      low_taps[j] = taps[TAPS - 1 - j];
      high_taps[j] = taps[2 * TAPS - 1 - j];
    }
    float earlier[2];
    for (int i = 0; i < 2; ++i) earlier[i] = past.at(p.first + w, g - 8, channel_of(c, l, p.rank, column + i));
    float before = from_bits(pack_bf16(earlier[0], earlier[1]));
    for (int row = w * c.padded(); row < (w + 1) * c.padded(); row += 8) {
      uint32_t* at_row = reinterpret_cast<uint32_t*>(wide + at<Mode::bf16>(l.into, row + g, column));
      const float now = from_bits(*at_row);  // two bf16, only handed on as one word
      float low = low_taps[0] * low_of(as_bits(now)), high = high_taps[0] * high_of(as_bits(now));
#pragma unroll
      for (int j = 1; j < TAPS; ++j) {
        const uint32_t x = as_bits(shuffle_from(g + j < 8 ? now : before, (lane - 4 * j) & 31));
        low += low_taps[j] * low_of(x);
        high += high_taps[j] * high_of(x);
      }
      *at_row = pack_bf16(low * sigmoid(low), high * sigmoid(high));
      before = now;
    }
  }
}

// 1 / |x| of q and k of each row, q's times K^-1/2: factors [2][heads][rows]. A warp takes 8 rows, 4 lanes a row.
SLEEPKERN_DEVICE void find_factors(const BlocksCall& c, const BlockLayer& l, uint16_t* wide, float* factors) {
  const int cores = 2 * c.tiles, lane = lane_of_warp();
  for (int task = threadIdx.x >> 5; task < 2 * l.heads * cores; task += WARPS) {
    const int row = 8 * (task % cores) + (lane & 7), head = task / cores;  // of q, then of k
    float square = 0.0f;
    for (int d = 8 * (lane >> 3); d < l.KP; d += 32) {
      float x[8];
      read_eight(x, *eight_at(wide, l.into, row, head * l.KP + d));
#pragma unroll
      for (int e = 0; e < 8; ++e) square += x[e] * x[e];
    }
    square += shuffle_xor(square, 8);
    square += shuffle_xor(square, 16);
    const float scale = head < l.heads ? rsqrtf(static_cast<float>(l.K)) : 1.0f;
    if (lane < 8) factors[head * 8 * cores + row] = scale * rsqrtf(square + NORM_EPS);
  }
}

// 8 value columns from `column` on of value head `head` over window w. A lane holds one column and every fourth group
// of 8 rows of the state.
SLEEPKERN_DEVICE void walk_over(const BlocksCall& c, const BlockLayer& l, const Place& p, const Shared& m, int pass,
                                int w, int head, int column) {
  constexpr int MOST = WIDEST_KEY / 32;
  const int lane = lane_of_warp(), v = column + (lane & 7), quarter = lane >> 3, groups = l.KP / 32;
  const int HV = c.cluster * l.value_heads, rows = 16 * c.tiles, key_head = head / (l.value_heads / l.heads);
  float* state = l.state + (static_cast<int64_t>(p.first + w) * HV + p.rank * l.value_heads + head) * l.K * l.V + v;
  float S[MOST][8], change = 0.0f, size = 0.0f;
#pragma unroll
  for (int n = 0; n < MOST; ++n) {
#pragma unroll
    for (int e = 0; e < 8; ++e) {
      const int k = 8 * (4 * n + quarter) + e;
      S[n][e] = n < groups && k < l.K && v < l.V && (l.continued || pass > 0) ? state[k * l.V] : 0.0f;
    }
  }
  const int q_at = key_head * l.KP + 8 * quarter, k_at = l.heads * l.KP + q_at;
  const int v_at = 2 * l.heads * l.KP + head * l.VP + v;
  for (int t = 0; t < c.L; ++t) {
    const int row = w * c.padded() + t;
    const float a = m.rates[row * l.rates() + head], b = m.rates[row * l.rates() + l.value_heads + head];
    const float q_factor = m.factors[key_head * rows + row], k_factor = m.factors[(l.heads + key_head) * rows + row];
    float k[MOST][8], Sk = 0.0f, Sq = 0.0f, qk = 0.0f;
#pragma unroll
    for (int n = 0; n < MOST; ++n) {
      if (n >= groups) continue;
      float q[8];
      read_eight(q, *eight_at(m.wide, l.into, row, q_at + 32 * n));
      read_eight(k[n], *eight_at(m.wide, l.into, row, k_at + 32 * n));
      float sums[2] = {}, more[2] = {};
#pragma unroll
      for (int e = 0; e < 8; ++e) {
        sums[e & 1] += S[n][e] * k[n][e];
        more[e & 1] += S[n][e] * q[e];
        qk += q[e] * k[n][e];
      }
      Sk += sums[0] + sums[1];
      Sq += more[0] + more[1];
    }
#pragma unroll
    for (int lanes = 8; lanes < 32; lanes *= 2) {
      Sk += shuffle_xor(Sk, lanes);
      Sq += shuffle_xor(Sq, lanes);
      qk += shuffle_xor(qk, lanes);
    }
    uint16_t* place = m.wide + at<Mode::bf16>(l.into, row, v_at);
    const float delta = k_factor * b * (from_bf16(*place) - a * k_factor * Sk);
#pragma unroll
    for (int n = 0; n < MOST; ++n) {
#pragma unroll
      for (int e = 0; e < 8; ++e) {
        if (n < groups) S[n][e] = a * S[n][e] + k[n][e] * delta;
      }
    }
    warp_barrier();  // all have read v
    if (quarter == 0) *place = narrow<Mode::bf16>(q_factor * (a * Sq + qk * delta));
  }
#pragma unroll
  for (int n = 0; n < MOST; ++n) {
#pragma unroll
    for (int e = 0; e < 8; ++e) {
      const int k = 8 * (4 * n + quarter) + e;
      if (n >= groups || k >= l.K || v >= l.V) continue;
      const float before = l.continued || pass > 0 ? state[k * l.V] : 0.0f;
      change += (S[n][e] - before) * (S[n][e] - before);
      size += S[n][e] * S[n][e];
      state[k * l.V] = S[n][e];
    }
  }
#pragma unroll
  for (int lanes = 1; lanes < 32; lanes *= 2) {
    change += shuffle_xor(change, lanes);
    size += shuffle_xor(size, lanes);
  }
  if (lane != 0) return;
  const int unit = ((p.first + w) * HV + p.rank * l.value_heads + head) * (l.VP / EIGHT) + column / EIGHT;
  float* sums = c.changes + 2 * (static_cast<int64_t>(pass) * c.units + l.first_unit + unit);
  sums[0] = change;
  sums[1] = size;
}

// o of a row over its root mean square, times gain and silu(gate), as a left operand; rows without a token become 0.
SLEEPKERN_DEVICE void gated_norm(const BlocksCall& c, const BlockLayer& l, const Place& p, const Shared& m) {
  const int cores = 2 * c.tiles, lane = lane_of_warp(), steps = l.mixed() / 16;
  uint32_t* mixed = reinterpret_cast<uint32_t*>(m.mixed);
  for (int task = threadIdx.x >> 5; task < l.value_heads * cores; task += WARPS) {
    const int row = 8 * (task % cores) + (lane & 7), head = task / cores;
    const int from = 2 * l.heads * l.KP + head * l.VP, gates = from + l.value_heads * l.VP;
    float square = 0.0f;
    for (int d = 8 * (lane >> 3); d < l.VP; d += 32) {
      float x[8];
      read_eight(x, *eight_at(m.wide, l.into, row, from + d));
#pragma unroll
      for (int e = 0; e < 8; ++e) square += x[e] * x[e];
    }
    square += shuffle_xor(square, 8);
    square += shuffle_xor(square, 16);
    const float factor = p.has_token(c, row) ? rsqrtf(square / l.V + l.gain_eps) : 0.0f;
    for (int d = 8 * (lane >> 3); d < l.VP; d += 32) {
      float x[8], gate[8];
      read_eight(x, *eight_at(m.wide, l.into, row, from + d));
      read_eight(gate, *eight_at(m.wide, l.into, row, gates + d));
#pragma unroll
      for (int e = 0; e < 8; e += 2) {
        const float low = x[e] * factor * l.gain[d + e] * gate[e] * sigmoid(gate[e]);
        const float high = x[e + 1] * factor * l.gain[d + e + 1] * gate[e + 1] * sigmoid(gate[e + 1]);
        mixed[word_of(steps, row, head * l.VP + d + e)] = pack_bf16(low, high);
      }
    }
  }
}

SLEEPKERN_DEVICE void mix_recurrent(const BlocksCall& c, const BlockLayer& l, const Place& p, const Shared& m,
                                    int pass) {
  keep_last(c, l, p, m.wide, pass);
  block_barrier();
  convolve(c, l, p, m.wide, pass);
  block_barrier();
  find_factors(c, l, m.wide, m.factors);
  block_barrier();
  const int eighths = l.VP / EIGHT, tasks = p.windows * l.value_heads * eighths;
  for (int task = threadIdx.x >> 5; task < tasks; task += WARPS) {
    walk_over(c, l, p, m, pass, task / eighths / l.value_heads, task / eighths % l.value_heads, task % eighths * EIGHT);
  }
  block_barrier();
  gated_norm(c, l, p, m);
}

}  // namespace sleepkern::cuda
