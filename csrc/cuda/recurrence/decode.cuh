// Decode: a few tokens on a state that is updated in place. The time is that of the state's bytes, and the state is
// read and written once. A warp takes 16 value columns; a lane holds four of them and an eighth of the rows in
// registers, in float32. In memory a state is float32 or bfloat16, which is rounded to nearest on the way out. A call
// may store the state after each token elsewhere; the state that it starts from is then only read.
//
//   S <- a S;  u = b (v - S^T k);  o = scale (S^T q + (k.q) u);  S <- S + k u^T
//
// S^T k and S^T q are summed together, so a token costs one round of shuffles and no barrier.
//
//   blockIdx.x = sequence * HV + head, blockIdx.y = 64 value columns
#pragma once

#include "common/recurrence.h"
#include "common/types.h"
#include "cuda/arch/ptx.h"
#include "cuda/recurrence/decode_states.h"
#include "cuda/recurrence/tokens.cuh"

namespace sleepkern::cuda {

constexpr int DECODE_THREADS = 128;
constexpr int DECODE_COLUMNS = 64;  // value columns of a CTA

// Loads a lane's four columns of a row of the state, by one vector load where the row is aligned.
SLEEPKERN_DEVICE float4 load_four(const float* row, int valid, bool aligned) {
  if (aligned && valid >= 4) return *reinterpret_cast<const float4*>(row);
  return make_float4(valid > 0 ? row[0] : 0.0f, valid > 1 ? row[1] : 0.0f, valid > 2 ? row[2] : 0.0f,
                     valid > 3 ? row[3] : 0.0f);
}

SLEEPKERN_DEVICE float4 load_four(const uint16_t* row, int valid, bool aligned) {
  if (aligned && valid >= 4) {
    const uint2 x = *reinterpret_cast<const uint2*>(row);
    return make_float4(from_bits(x.x << 16), from_bits(x.x & 0xffff0000u), from_bits(x.y << 16),
                       from_bits(x.y & 0xffff0000u));
  }
  return make_float4(valid > 0 ? from_bf16(row[0]) : 0.0f, valid > 1 ? from_bf16(row[1]) : 0.0f,
                     valid > 2 ? from_bf16(row[2]) : 0.0f, valid > 3 ? from_bf16(row[3]) : 0.0f);
}

SLEEPKERN_DEVICE void store_four(float* row, float4 x, int valid, bool aligned) {
  if (aligned && valid >= 4) {
    *reinterpret_cast<float4*>(row) = x;
    return;
  }
  const float all[4] = {x.x, x.y, x.z, x.w};
  for (int e = 0; e < 4; ++e) {
    if (e < valid) row[e] = all[e];
  }
}

SLEEPKERN_DEVICE void store_four(uint16_t* row, float4 x, int valid, bool aligned) {
  // mutant: bfloat16-states-are-cut-off
  const uint2 packed = make_uint2(pack_bf16(x.x, x.y), pack_bf16(x.z, x.w));
  if (aligned && valid >= 4) {
    *reinterpret_cast<uint2*>(row) = packed;
    return;
  }
  const uint16_t all[4] = {static_cast<uint16_t>(packed.x), static_cast<uint16_t>(packed.x >> 16),
                           static_cast<uint16_t>(packed.y), static_cast<uint16_t>(packed.y >> 16)};
  for (int e = 0; e < 4; ++e) {
    if (e < valid) row[e] = all[e];
  }
}

SLEEPKERN_DEVICE float sum_rows(float x) {
  x += shuffle_xor(x, 4);
  x += shuffle_xor(x, 8);
  return x + shuffle_xor(x, 16);
}

// Loads eight elements of a token's k, q or g, from row `first` of the state on.
SLEEPKERN_DEVICE void load_rows(float (&x)[8], const Rows& rows, int64_t token, int64_t offset, int first, int K) {
  const int left = K - first;
  load_eight(x, rows.data, rows.type, token * rows.stride + offset + first, left < 0 ? 0 : left < 8 ? left : 8);
}

// The part of the state that a lane holds: ROWS rows from `first` on and four value columns, of which `valid` exist.
template <int ROWS>
struct LaneState {
  float S[ROWS][4];
  int first, K, V, valid;

  // The argument of both is row 0 of these columns in memory.
  template <class State>
  SLEEPKERN_DEVICE void load(const State* data) {
    const bool aligned = is_aligned(data);
#pragma unroll
    for (int r = 0; r < ROWS; ++r) {
      // mutant: a-row-beyond-the-state-is-read
      const float4 x = load_four(data + static_cast<int64_t>(first + r) * V, first + r < K ? valid : 0, aligned);
      S[r][0] = x.x;
      S[r][1] = x.y;
      S[r][2] = x.z;
      S[r][3] = x.w;
    }
  }
  template <class State>
  SLEEPKERN_DEVICE void store(State* data) const {
    const bool aligned = is_aligned(data);
#pragma unroll
    for (int r = 0; r < ROWS; ++r) {
      if (first + r < K) {
        const float4 x = make_float4(S[r][0], S[r][1], S[r][2], S[r][3]);
        store_four(data + static_cast<int64_t>(first + r) * V, x, valid, aligned);
      }
    }
  }
  // Whether four elements of each row can be accessed at once.
  template <class State>
  SLEEPKERN_DEVICE bool is_aligned(const State* data) const {
    return V % 4 == 0 && reinterpret_cast<uintptr_t>(data) % (4 * sizeof(State)) == 0;
  }
};

// The sums of a token over the rows of a lane: |k|^2, |q|^2, k.q, S^T k and S^T q.
struct TokenSums {
  float kk, qq, kq, prediction[4], output[4];
};

// Decays the state and sums over its rows. Eight rows at a time; the sums for the normalisation are part of the same
// round of shuffles.
template <int ROWS>
SLEEPKERN_DEVICE TokenSums decay_and_sum(const Problem& problem, LaneState<ROWS>& state, int64_t token, int head,
                                         int64_t key) {
  TokenSums sums{};
  float k[8], q[8], g[8];
  const float a = problem.gate == Gate::head
                      ? decayed(load_one(problem.g.data, problem.g.type, token * problem.g.stride + head))
                      : 1.0f;
#pragma unroll
  for (int r = 0; r < ROWS; r += 8) {
    // without opaque the loads of all rows are issued first, which takes too many registers
    const int row = opaque(state.first + r);
    load_rows(k, problem.k, token, key, row, state.K);
    load_rows(q, problem.q, token, key, row, state.K);
    if (problem.gate == Gate::channel)
      load_rows(g, problem.g, token, static_cast<int64_t>(head) * state.K, row, state.K);
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      const float decay = problem.gate == Gate::channel ? decayed(g[i]) : a;
      sums.kk += k[i] * k[i];
      sums.qq += q[i] * q[i];
      sums.kq += k[i] * q[i];
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        state.S[r + i][e] *= decay;
        sums.prediction[e] += state.S[r + i][e] * k[i];
        sums.output[e] += state.S[r + i][e] * q[i];
      }
    }
  }
  return sums;
}

// One token: its outputs to `out`, and the state after it.
template <int ROWS>
SLEEPKERN_DEVICE void decode_token(const Problem& problem, LaneState<ROWS>& state, int64_t token, int head, int64_t key,
                                   int column, float (&out)[4]) {
  const TokenSums sums = decay_and_sum(problem, state, token, head, key);
  const float k_scale = problem.normalize ? rsqrtf(sum_rows(sums.kk) + NORM_EPS) : 1.0f;
  const float q_scale = problem.normalize ? rsqrtf(sum_rows(sums.qq) + NORM_EPS) : 1.0f;
  const float beta =
      problem.beta.data ? load_one(problem.beta.data, problem.beta.type, token * problem.beta.stride + head) : 1.0f;
  const float kq = sum_rows(sums.kq) * k_scale;
  float u[4], k[8];
#pragma unroll
  for (int e = 0; e < 4; ++e) {
    const int64_t at = token * problem.v.stride + static_cast<int64_t>(head) * state.V + column + e;
    const float v = e < state.valid ? load_one(problem.v.data, problem.v.type, at) : 0.0f;
    u[e] = beta * (problem.delta ? v - k_scale * sum_rows(sums.prediction[e]) : v);
    out[e] = problem.scale * q_scale * (sum_rows(sums.output[e]) + kq * u[e]);
  }
#pragma unroll
  for (int r = 0; r < ROWS; r += 8) {
    load_rows(k, problem.k, token, key, state.first + r, state.K);
#pragma unroll
    for (int i = 0; i < 8; ++i) {
#pragma unroll
      for (int e = 0; e < 4; ++e) state.S[r + i][e] += k_scale * k[i] * u[e];
    }
  }
}

// Where a head's state after a token is stored, nullptr where it is not.
template <class State>
SLEEPKERN_DEVICE State* state_after(const DecodeStates& call, int64_t sequence, int64_t token, int head) {
  State* out = static_cast<State*>(call.out) + head * call.out_head_stride;
  if (!call.out_indices) return out + sequence * call.out_stride + token * call.out_token_stride;
  // mutant: state-of-another-token
  const int64_t index = call.out_indices[sequence * call.problem.T + token];
  return index < 0 ? nullptr : out + index * call.out_stride;
}

template <int ROWS, class State>
SLEEPKERN_KERNEL(DECODE_THREADS, ROWS <= 8    ? 4
                                 : ROWS <= 16 ? 3
                                              : 2)
decode_kernel(const DecodeStates call) {
  const Problem& problem = call.problem;
  const int64_t sequence = blockIdx.x / problem.HV;
  const int head = static_cast<int>(blockIdx.x % problem.HV), K = static_cast<int>(problem.K),
            V = static_cast<int>(problem.V);
  const int warp = threadIdx.x >> 5, lane = threadIdx.x & 31, first = (lane >> 2) * ROWS;
  const int column = static_cast<int>(blockIdx.y) * DECODE_COLUMNS + 16 * warp + 4 * (lane & 3), valid = V - column;
  if (static_cast<int>(blockIdx.y) * DECODE_COLUMNS + 16 * warp >= V) return;  // the whole warp returns
  const int64_t index = call.indices ? call.indices[sequence] : sequence;
  const int64_t key = static_cast<int64_t>(head / static_cast<int>(problem.HV / problem.H)) * K;
  State* const initial = static_cast<State*>(call.states) + index * call.stride + head * call.head_stride + column;

  LaneState<ROWS> state;
  state.first = first;
  state.K = K;
  state.V = V;
  state.valid = valid;
  if (index >= 0) state.load(initial);
  for (int64_t t = 0; t < problem.T; ++t) {
    const int64_t token = sequence * problem.T + t;
    float out[4] = {};
    if (index >= 0) decode_token(problem, state, token, head, key, column, out);
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      if (lane < 4 && e < valid)
        store_one(problem.o, problem.v.type, (token * problem.HV + head) * problem.V + column + e, out[e]);
    }
    // mutant: padded-rows-of-a-pool-are-written
    if (index < 0) continue;
    // One store for both cases: unrolled, it is a large part of the code.
    State* to = t + 1 == problem.T ? initial : nullptr;
    if (call.out) {
      to = state_after<State>(call, sequence, t, head);
      if (to) to += column;
    }
    if (to) state.store(to);
  }
}

}  // namespace sleepkern::cuda
