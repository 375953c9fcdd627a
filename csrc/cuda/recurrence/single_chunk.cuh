// Replay of a window of one chunk, in one launch: the CTA computes the chunk factors in its shared memory, runs all
// passes over them, and computes the outputs of the last one.
//
//   blockIdx.x = (sequence * HV + head) * v_tiles + v-tile; warp w has columns 16 w ... of it
//
// rank: the state after pass n is a^n S0 + Kt^T Y_n with Y_0 = 0 and Y_(n+1) = a Y_n + U - a^n W S0 - Z Y_n, Z =
// W Kt^T: 64 x 64 products instead of 64 x K x 2. The first iteration of the loop runs all passes but the last.
//
// Shared memory: keys, -W, the decay, the scratch of the chunk factors, P; later -Z of rank, and Qe for the last pass,
// in the memory of the scratch. Registers: S^T KP / 2, U^T 32, Vn^T 32. With tol the final state's memory holds the
// state before each pass.
#pragma once

#include "common/recurrence.h"
#include "cuda/arch/mma_tiles.h"
#include "cuda/arch/ptx.h"
#include "cuda/recurrence/chunk_factors.cuh"
#include "cuda/recurrence/chunk_memory.cuh"
#include "cuda/recurrence/params.h"
#include "cuda/recurrence/state_pass.cuh"
#include "cuda/recurrence/tokens.cuh"

namespace sleepkern::cuda {

// -Z [CHUNK][CHUNK] = -W Kt^T.
template <Mode MODE, int KP>
SLEEPKERN_DEVICE void transition_of_rows(const Number<MODE>* W, const Number<MODE>* keys, Number<MODE>* Z) {
  const int warp = threadIdx.x >> 5, I = warp >> 1, half = warp & 1;
  float acc[CHUNK / 16][4];
  clear(acc);
  const LeftLoader<MODE, KP> left(W);
  const RightLoader<MODE, KP> right(keys);
  for (int step = 0; step < KP / STEP<MODE>; ++step) multiply<MODE>(acc, left.load(I, step), right, step, 2, 2 * half);
#pragma unroll
  for (int n = 0; n < CHUNK / 16; ++n) {
#pragma unroll
    for (int i = 0; i < 4; i += 2) {
      store_pair<MODE>(Z, CHUNK, 16 * I + row_of(i), 32 * half + column_of(n, i), acc[n][i], acc[n][i + 1]);
    }
  }
}

// Runs passes in token space: Y starts as U - W S0 and becomes that of pass number `passes`. Returns
// chunk_decay^passes. reload(values) loads U.
template <Mode MODE, class Reload>
SLEEPKERN_DEVICE float token_space_passes(Values& Y, const Number<MODE>* Z, float chunk_decay, int passes, int blocks,
                                          Reload reload) {
  Values H, U;
  reload(U);
#pragma unroll
  for (int n = 0; n < CHUNK / 8; ++n) {
#pragma unroll
    for (int i = 0; i < 4; ++i) H[n][i] = Y[n][i] - U[n][i];
  }
  float power = chunk_decay;
#pragma unroll 1
  for (int pass = 1; pass < passes; ++pass) {
    const RightLoader<MODE, CHUNK> right(Z);
    Values next;
    reload(next);
#pragma unroll
    for (int n = 0; n < CHUNK / 8; ++n) {
#pragma unroll
      // mutant: token-space-erases-undecayed
      for (int i = 0; i < 4; ++i) next[n][i] += chunk_decay * Y[n][i] + power * H[n][i];
    }
#pragma unroll
    for (int step = 0; step < CHUNK / STEP<MODE>; ++step) {
      if (step * STEP<MODE> < 16 * blocks) multiply<MODE>(next, left_of<MODE>(Y, step), right, step, blocks);
    }
#pragma unroll
    for (int n = 0; n < CHUNK / 8; ++n) {
#pragma unroll
      for (int i = 0; i < 4; ++i) Y[n][i] = next[n][i];
    }
    power *= chunk_decay;
  }
  return power;
}

// fp32x3 has no registers for U. The tile of v has U's size and holds it; the v-tile is then no wider than that tile.
template <Mode MODE>
constexpr bool PARKED = MODE == Mode::fp32x3;

// Computes the factors of a chunk in shared memory and U of the v-tile that begins at column `first`. It ends with a
// barrier.
template <Mode MODE, int KP, bool CHANNEL>
SLEEPKERN_DEVICE void factors_of_v_tile(const ReplayParams& call, const Chunk& chunk, int first,
                                        const ChunkMemory<MODE, KP, CHANNEL>& smem, Values& U) {
  const Problem& problem = call.problem;
  const int warp = threadIdx.x >> 5, V = static_cast<int>(problem.V), blocks = chunk.blocks();
  compute_chunk_factors<MODE, KP, CHANNEL>(problem, chunk, smem.keys, smem.W, smem.P, smem.scratch);
  clear(U);
  for (int start = 0; start < call.v_tile; start += VALUES) {
    load_tile<MODE, VALUES>(smem.scratch.V, problem.v, chunk, static_cast<int64_t>(chunk.head) * V + first + start,
                            V - first - start, false, [](int, int, float x) { return x; });
    // mutant: no-barrier-before-v-is-read
    block_barrier();
    const int group = warp - start / 16;
    if (group >= 0 && group < VALUES / 16) factor_U<MODE, KP, CHANNEL>(smem.scratch, group, blocks, U);
    block_barrier();
    if (PARKED<MODE> && warp < VALUES / 16) store_values(U, reinterpret_cast<float*>(smem.scratch.V), warp);
  }
  finish_keys<MODE, KP, CHANNEL>(problem, chunk, smem.keys, smem.chunk_decay, smem.scratch.G);
  block_barrier();
}

// Loads U, which is parked in `tile` or in registers.
template <Mode MODE>
SLEEPKERN_DEVICE void load_U(Values& values, const Values& U, const Number<MODE>* tile) {
  if constexpr (PARKED<MODE>) {
    load_values(values, tile, threadIdx.x >> 5);
  } else {
#pragma unroll
    for (int n = 0; n < CHUNK / 8; ++n) {
#pragma unroll
      for (int i = 0; i < 4; ++i) values[n][i] = U[n][i];
    }
  }
}

template <Mode MODE, int KP, bool CHANNEL>
SLEEPKERN_KERNEL(THREADS, 1)
single_chunk_kernel(const ReplayParams call) {
  const Problem& problem = call.problem;
  const int bh = blockIdx.x / call.v_tiles, warp = threadIdx.x >> 5;
  const int HV = static_cast<int>(problem.HV), T = static_cast<int>(problem.T);
  const Chunk chunk{static_cast<int64_t>(bh / HV) * T, T, bh % HV};
  const int K = static_cast<int>(problem.K), V = static_cast<int>(problem.V), blocks = chunk.blocks();
  const int first = static_cast<int>(blockIdx.x % call.v_tiles) * call.v_tile;
  const int column = 16 * warp < call.v_tile ? first + 16 * warp : V;  // V: none
  // No register is free during a pass, so values that a pass uses once are computed at their use.
  const auto again = [&] { return Chunk{static_cast<int64_t>(opaque(bh) / HV) * T, T, opaque(bh) % HV}; };
  const auto state = [&](auto* base) { return base + static_cast<int64_t>(opaque(bh)) * problem.K * problem.V; };
  ChunkMemory<MODE, KP, CHANNEL> smem(shared_memory(), problem.want_output);

  Values U;
  factors_of_v_tile<MODE, KP, CHANNEL>(call, chunk, first, smem, U);
  const auto reload = [&](Values& values) { load_U<MODE>(values, U, smem.scratch.V); };
  const bool stops = call.stops();
  State<KP> S;
  const bool token_space = !CHANNEL && call.token_space;
  if (token_space) {
    transition_of_rows<MODE, KP>(smem.W, smem.keys, smem.scratch.XE);
    block_barrier();
  }
  load_state<KP>(S, problem.state ? state(problem.state) : nullptr, K, V, column);
  int passes_done = 0;
  int last = stops ? -1 : call.passes - 1;  // the pass with outputs
#pragma unroll 1
  while (true) {
    const bool last_pass = problem.want_output && passes_done == last;
    if (last_pass) {
      block_barrier();
      load_queries<MODE, KP, CHANNEL>(problem, again(), smem.scratch.Q, smem.scratch.G);
      block_barrier();
      // the state before the last pass, which runs again
      if (stops) load_state<KP>(S, state(problem.final_state), K, V, column);
    } else if (stops) {
      store_state<KP>(S, state(problem.final_state), K, V, column);
    }
    if (column < V) {
      Values values;
      reload(values);
      correct<MODE, KP>(values, S, smem.W, blocks);
      if (last_pass) chunk_output<MODE, KP>(S, values, smem.scratch.Q, smem.P, problem, again(), column);
      if (token_space && passes_done == 0) {
        const float power =
            token_space_passes<MODE>(values, smem.scratch.XE, smem.chunk_decay[0], call.passes - 1, blocks, reload);
        // loaded again, so that no register holds it during the passes
        load_state<KP>(S, problem.state ? state(problem.state) : nullptr, K, V, column);
        scale(S, [power](int) { return power; });
      } else {
        scale(S, [&](int d) { return smem.chunk_decay[d]; });
      }
      add_rows<MODE, KP>(S, values, smem.keys, blocks);
    }
    passes_done += token_space && passes_done == 0 ? call.passes - 1 : 1;
    if (last_pass) break;
    if (stops) {
      const float step = square_step<KP>(S, state(problem.final_state), K, V, column);
      if (converged(call, bh, smem.sums, passes_done, step, square_sum<KP>(S)) || passes_done == call.passes) {
        if (!problem.want_output) break;
        last = passes_done;  // this pass runs again, with outputs, from the state before it; it is not counted twice
      }
    } else if (passes_done == call.passes) {
      break;
    }
  }
  if (column < V) store_state<KP>(S, state(problem.final_state), K, V, column);
}

}  // namespace sleepkern::cuda
