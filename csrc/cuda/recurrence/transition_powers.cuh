// The passes of a replay as powers of its transition, S_(n+1) = A S_n + B. The forward and the backward are one launch
// each.
//
//   powers            d = S_1 - S_0; S_(n+1) = S_n + d; d <- A d                stores S_0 ... S_(N-1)
//   powers_backward   dB += dstate; dA += dstate S_n^T; dstate <- A^T dstate    for n = N-2 ... 0
//
// dstate starts as the gradient of S_(N-1).
//
//   blockIdx.x = (sequence * HV + head) * v_tiles + v-tile; warp w has columns 16 w ... of it
//
// A is in shared memory for all passes (64 K at K = 128). The forward has S and d in registers, KP / 2 each. The
// backward has dstate in registers, and 16 rows of dA a warp. dA sums over value columns, so dstate and S_n pass
// through shared memory, 64 columns at a time (32 K each). Each v-tile gives a part of dA; the caller adds the parts in
// order.
#pragma once

#include "cuda/arch/mma_tiles.h"
#include "cuda/arch/ptx.h"
#include "cuda/recurrence/params.h"
#include "cuda/recurrence/state_pass.cuh"

namespace sleepkern::cuda {

constexpr int COLUMNS = 64;          // value columns in shared memory at a time
constexpr Mode FULL = Mode::fp32x3;  // gradients are computed in float32 for inputs of any type

// Loads a square matrix [K][K] to a tile [KP][KP], transposed if `transposed`.
template <int KP>
SLEEPKERN_DEVICE void load_square(Number<FULL>* tile, const float* A, int K, bool transposed) {
  for (int e = threadIdx.x; e < KP * KP; e += THREADS) {
    const int i = e / KP, j = e % KP;
    const float x = i < K && j < K ? A[i * K + j] : 0.0f;
    store_element<FULL>(tile, KP, transposed ? j : i, transposed ? i : j, x);
  }
}

// sum += S in memory; sum = S if `first`.
template <int KP>
SLEEPKERN_DEVICE void add_state(const State<KP>& S, float* sum, bool first, int K, int V, int column) {
  each_number<KP>(S, sum, K, V, column, [first](float x, bool inside, float* at) {
    if (inside) *at = first ? x : *at + x;
  });
}

template <int KP>
SLEEPKERN_KERNEL(THREADS, 1)
powers_kernel(const PowersParams call) {
  const int64_t head = blockIdx.x / call.v_tiles, size = int64_t{call.K} * call.V;
  const int warp = threadIdx.x >> 5, column = static_cast<int>(blockIdx.x % call.v_tiles) * call.v_tile + 16 * warp;
  Arena arena{shared_memory()};
  auto* A = arena.take<Number<FULL>>(KP * KP);
  load_square<KP>(A, call.A + head * call.K * call.K, call.K, false);
  block_barrier();
  if (16 * warp >= call.v_tile || column >= call.V) return;
  State<KP> S, d;
  load_state<KP>(S, call.start ? call.start + head * size : nullptr, call.K, call.V, column);
  store_state<KP>(S, call.states + head * size, call.K, call.V, column);
  load_state<KP>(d, call.after + head * size, call.K, call.V, column);
#pragma unroll
  for (int n = 0; n < KP / 8; ++n) {
#pragma unroll
    for (int i = 0; i < 4; ++i) d[n][i] -= S[n][i];
  }
#pragma unroll 1
  for (int pass = 1; pass < call.passes; ++pass) {
    if (pass > 1) transform<FULL, KP>(d, A);
    // The state is loaded again, so that no register holds it during the product.
    load_state<KP>(S, call.states + ((pass - 1) * call.heads + head) * size, call.K, call.V, column);
#pragma unroll
    for (int n = 0; n < KP / 8; ++n) {
#pragma unroll
      for (int i = 0; i < 4; ++i) S[n][i] += d[n][i];
    }
    store_state<KP>(S, call.states + (pass * call.heads + head) * size, call.K, call.V, column);
  }
}

template <int KP>
SLEEPKERN_KERNEL(THREADS, 1)
powers_backward_kernel(const PowersParams call) {
  const int64_t head = blockIdx.x / call.v_tiles, size = int64_t{call.K} * call.V;
  const int part = static_cast<int>(blockIdx.x % call.v_tiles), warp = threadIdx.x >> 5;
  const int first = part * call.v_tile, column = first + 16 * warp;
  const bool active = 16 * warp < call.v_tile && column < call.V;
  Arena arena{shared_memory()};
  auto* A = arena.take<Number<FULL>>(KP * KP);
  auto* L = arena.take<Number<FULL>>(KP * COLUMNS);
  // mutant: a-tile-is-one-element-short
  auto* R = arena.take<Number<FULL>>(KP * COLUMNS);
  // mutant: transition-not-transposed
  load_square<KP>(A, call.A + head * call.K * call.K, call.K, true);
  float* dB = call.dB + head * size;
  State<KP> dstate, dA;
  load_state<KP>(dstate, call.last + head * size, call.K, call.V, active ? column : call.V);
  clear(dA);
  bool first_pass = true;
#pragma unroll 1
  for (int n = (call.passes_done ? call.passes_done[head] : call.passes) - 2; n >= 0; --n) {
    const float* S = call.states + (n * call.heads + head) * size;
    for (int start = 0; start < call.v_tile && first + start < call.V; start += COLUMNS) {
      block_barrier();
      const int v0 = 16 * warp - start;
      if (v0 >= 0 && v0 < COLUMNS) {
#pragma unroll
        for (int t = 0; t < KP / 8; ++t) {
#pragma unroll
          for (int i = 0; i < 4; ++i) store_element<FULL>(L, COLUMNS, column_of(t, i), v0 + row_of(i), dstate[t][i]);
        }
      }
      for (int e = threadIdx.x; e < KP * COLUMNS; e += THREADS) {
        const int d = e / COLUMNS, v = first + start + e % COLUMNS;
        store_element<FULL>(R, COLUMNS, d, e % COLUMNS, d < call.K && v < call.V ? S[int64_t{d} * call.V + v] : 0.0f);
      }
      // mutant: no-barrier-before-dstate-is-read
      block_barrier();
      if (16 * warp < KP) {
        const LeftLoader<FULL, COLUMNS> left(L);
        const RightLoader<FULL, COLUMNS> right(R);
#pragma unroll 1
        for (int step = 0; step < COLUMNS / STEP<FULL>; ++step) multiply<FULL>(dA, left.load(warp, step), right, step);
      }
      if (active && v0 >= 0 && v0 < COLUMNS) {
        add_state<KP>(dstate, dB, first_pass, call.K, call.V, column);
        const TransposedLoader<FULL, COLUMNS, false> left(L);
        const RightLoader<FULL, KP> right(A);
        clear(dstate);
#pragma unroll 1
        for (int step = 0; step < KP / STEP<FULL>; ++step)
          multiply<FULL>(dstate, left.load(v0 / 16, step), right, step);
      }
    }
    first_pass = false;
  }
  if (active && first_pass) {
    State<KP> zero;
    clear(zero);
    store_state<KP>(zero, dB, call.K, call.V, column);
  }
  if (active) store_state<KP>(dstate, call.dstart + head * size, call.K, call.V, column);
  float* out = call.dA + (part * call.heads + head) * call.K * call.K;
#pragma unroll
  for (int t = 0; t < KP / 8; ++t) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int row = 16 * warp + row_of(i), j = column_of(t, i);
      if (16 * warp < KP && row < call.K && j < call.K) out[row * call.K + j] = dA[t][i];
    }
  }
}

}  // namespace sleepkern::cuda
