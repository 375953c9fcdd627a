// The stages of a pass for the 16 value columns of a warp. State and corrected values stay in registers, transposed:
//
//   Vn^T = U^T - S^T W^T      S^T <- S^T exp(G_C) + Vn^T Kt      O^T = S^T Qe^T + Vn^T P^T
//
// Value columns are independent, so warps need no barrier. Shared memory holds the right operands of all warps, -W, Kt,
// Qe and P, and is only read. Accumulators S^T [16][KP]: KP / 2 registers a thread; Vn^T [16][CHUNK]: 32.
#pragma once

#include "common/recurrence.h"
#include "cuda/arch/mma_tiles.h"
#include "cuda/arch/ptx.h"
#include "cuda/recurrence/params.h"
#include "cuda/recurrence/tokens.cuh"

namespace sleepkern::cuda {

template <int KP>
using State = float[KP / 8][4];
using Values = float[CHUNK / 8][4];

// Calls element(x, inside, at) for each element x of columns column ... column + 15 of a state [K][V], with its address
// and whether it is inside the state. Addresses are computed at each call (see opaque).
template <int KP, class S, class Number, class Element>
SLEEPKERN_DEVICE void each_number(S& state, Number* at, int K, int V, int column, Element element) {
  const int v = column + row_of(0), rows = opaque(K) - column_of(0, 0), pitch = opaque(V);
  const bool low = v < V, high = v + 8 < V;
  Number* row = at + static_cast<int64_t>(opaque(column_of(0, 0))) * V + v;
#pragma unroll
  for (int n = 0; n < KP / 8; ++n) {
    element(state[n][0], low && 8 * n < rows, row);
    element(state[n][2], high && 8 * n < rows, row + 8);
    element(state[n][1], low && 8 * n + 1 < rows, row + pitch);
    element(state[n][3], high && 8 * n + 1 < rows, row + pitch + 8);
    row = opaque(row + 8 * pitch);
  }
}

template <int KP>
SLEEPKERN_DEVICE void load_state(State<KP>& S, const float* state, int K, int V, int column) {
  each_number<KP>(S, state, K, V, state ? column : V,
                  [](float& x, bool inside, const float* at) { x = inside ? *at : 0.0f; });
}

template <int KP>
SLEEPKERN_DEVICE void store_state(const State<KP>& S, float* state, int K, int V, int column) {
  each_number<KP>(S, state, K, V, column, [](float x, bool inside, float* at) {
    if (inside) *at = x;
  });
}

// Loads accumulators that are stored in the order of threads, those of group `group` of 16 columns from U on.
SLEEPKERN_DEVICE void load_values(Values& values, const float* U, int group) {
  const float4* from = reinterpret_cast<const float4*>(U) + group * (CHUNK * 4) + lane_of_warp();
#pragma unroll
  for (int n = 0; n < CHUNK / 8; ++n) {
    const float4 u = from[n * 32];
    values[n][0] = u.x;
    values[n][1] = u.y;
    values[n][2] = u.z;
    values[n][3] = u.w;
  }
}

SLEEPKERN_DEVICE void store_values(const Values& values, float* U, int group) {
  float4* to = reinterpret_cast<float4*>(U) + group * (CHUNK * 4) + lane_of_warp();
#pragma unroll
  for (int n = 0; n < CHUNK / 8; ++n) to[n * 32] = make_float4(values[n][0], values[n][1], values[n][2], values[n][3]);
}

// Vn = values - W S; values is U, or 0.
template <Mode MODE, int KP>
SLEEPKERN_DEVICE void correct(Values& values, const State<KP>& S, const Number<MODE>* W, int blocks) {
  const RightLoader<MODE, KP> right(W);
#pragma unroll
  for (int step = 0; step < KP / STEP<MODE>; ++step)
    multiply<MODE>(values, left_of<MODE>(S, step), right, step, blocks);
}

// d <- A d. The bf16 fragments take half of the registers of d, so all of them are made before d is overwritten.
template <Mode MODE, int KP>
SLEEPKERN_DEVICE void transform(State<KP>& d, const Number<MODE>* A) {
  const RightLoader<MODE, KP> right(A);
  if constexpr (MODE == Mode::bf16) {
    Fragment<MODE> left[KP / STEP<MODE>];
#pragma unroll
    for (int step = 0; step < KP / STEP<MODE>; ++step) left[step] = left_of<MODE>(d, step);
    clear(d);
#pragma unroll
    for (int step = 0; step < KP / STEP<MODE>; ++step) multiply<MODE>(d, left[step], right, step);
  } else {
    State<KP> next;
    clear(next);
#pragma unroll
    for (int step = 0; step < KP / STEP<MODE>; ++step) multiply<MODE>(next, left_of<MODE>(d, step), right, step);
#pragma unroll
    for (int n = 0; n < KP / 8; ++n) {
#pragma unroll
      for (int i = 0; i < 4; ++i) d[n][i] = next[n][i];
    }
  }
}

// S^T += values^T Kt.
template <Mode MODE, int KP>
SLEEPKERN_DEVICE void add_rows(State<KP>& S, const Values& values, const Number<MODE>* keys, int blocks) {
  const TransposedLoader<MODE, KP, true> right(keys);
#pragma unroll
  for (int step = 0; step < CHUNK / STEP<MODE>; ++step) {
    if (step * STEP<MODE> < 16 * blocks) multiply<MODE>(S, left_of<MODE>(values, step), right, step);
  }
}

// S^T <- S^T decay; decay(d) is that of row d of S.
template <int TILES, class Decay>
SLEEPKERN_DEVICE void scale(float (&S)[TILES][4], Decay decay) {
#pragma unroll
  for (int n = 0; n < TILES; ++n) {
#pragma unroll
    // mutant: state-does-not-decay
    for (int i = 0; i < 4; ++i) S[n][i] *= decay(column_of(n, i));
  }
}

template <Mode MODE, int KP>
SLEEPKERN_DEVICE void advance(State<KP>& S, const Values& values, const Number<MODE>* keys, const float* chunk_decay,
                              int blocks) {
  scale(S, [chunk_decay](int d) { return chunk_decay[d]; });
  add_rows<MODE, KP>(S, values, keys, blocks);
}

// Computes o of a chunk and stores it. S is the state before the chunk, `values` its corrected values.
template <Mode MODE, int KP>
SLEEPKERN_DEVICE void chunk_output(const State<KP>& S, const Values& values, const Number<MODE>* Qe,
                                   const Number<MODE>* P, const Problem& problem, const Chunk& chunk, int column) {
  Values O;
  clear(O);
  const int blocks = chunk.blocks();
  const RightLoader<MODE, KP> queries(Qe);
  const RightLoader<MODE, CHUNK> gram_qk(P);
#pragma unroll
  for (int step = 0; step < KP / STEP<MODE>; ++step) multiply<MODE>(O, left_of<MODE>(S, step), queries, step, blocks);
#pragma unroll
  for (int step = 0; step < CHUNK / STEP<MODE>; ++step) {
    if (step * STEP<MODE> < 16 * blocks) multiply<MODE>(O, left_of<MODE>(values, step), gram_qk, step, blocks);
  }
  const int v = column + row_of(0), left = chunk.tokens - column_of(0, 0);
  const int64_t pitch = problem.HV * problem.V;
  int64_t at = ((chunk.first + opaque(column_of(0, 0))) * problem.HV + chunk.head) * problem.V + v;
#pragma unroll
  for (int n = 0; n < CHUNK / 8; ++n) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int down = i & 1, right = 8 * (i >> 1);
      if (v + right < problem.V && 8 * n + down < left)
        store_one(problem.o, problem.v.type, at + down * pitch + right, O[n][i]);
    }
    at += 8 * pitch;
  }
}

// The sum of squares of the difference between a state and its stored copy.
template <int KP>
SLEEPKERN_DEVICE float square_step(const State<KP>& S, const float* before, int K, int V, int column) {
  float sum = 0.0f;
  each_number<KP>(S, before, K, V, column, [&](float x, bool inside, const float* at) {
    const float step = inside ? x - *at : 0.0f;
    sum += step * step;
  });
  return sum;
}

template <int KP>
SLEEPKERN_DEVICE float square_sum(const State<KP>& S) {
  float sum = 0.0f;
#pragma unroll
  for (int n = 0; n < KP / 8; ++n) {
#pragma unroll
    for (int i = 0; i < 4; ++i) sum += S[n][i] * S[n][i];
  }
  return sum;
}

// Whether a head may stop after pass number `passes_done`, whose step and state have these sums of squares (0 from
// warps without columns): |d| r / (1 - r) <= tol |S|, r = |d| / |d of the pass before|. All threads of the CTA get the
// same answer. `sums` has two floats a warp, and |d| of this pass and of the pass before, so that no register holds
// them.
SLEEPKERN_DEVICE bool converged(const ReplayParams& call, int64_t bh, float* sums, int passes_done, float step,
                                float state) {
  for (int mask = 16; mask > 0; mask /= 2) {
    step += shuffle_xor(step, mask);
    state += shuffle_xor(state, mask);
  }
  block_barrier();
  if (lane_of_warp() == 0) {
    sums[threadIdx.x >> 5] = step;
    sums[WARPS + (threadIdx.x >> 5)] = state;
  }
  block_barrier();
  step = state = 0.0f;
  for (int warp = 0; warp < WARPS; ++warp) {
    step += sums[warp];
    state += sums[WARPS + warp];
  }
  step = sqrtf(step);
  float* sizes = sums + 2 * WARPS;
  float residual = INFINITY;
  if (passes_done > 1) {
    const float ratio = step / fmaxf(sizes[(passes_done - 1) & 1], 1e-30f);
    float left = ratio < 1.0f ? step * ratio / fmaxf(1.0f - ratio, 1e-30f) : INFINITY;
    if (step == 0.0f) left = 0.0f;
    residual = left / fmaxf(sqrtf(state), 1e-30f);
  }
  if (threadIdx.x == 0) {
    sizes[passes_done & 1] = step;
    call.residual[bh] = residual;
    call.passes_done[bh] = passes_done;
  }
  return residual <= call.tol;
}

}  // namespace sleepkern::cuda
