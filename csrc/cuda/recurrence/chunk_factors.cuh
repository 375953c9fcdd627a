// The chunk factors, from k, q, v, beta and g of a chunk. One CTA computes one chunk of a head.
//
//   G = running sum of g   E = exp(G)   M_ij = b_i k_i.k_j exp(G_i - G_j), i > j   X = (I + M)^-1
//   W = X diag(b) (E k)    U = X diag(b) v    Kt_j = k_j exp(G_C - G_j)
//   P_ij = scale q_i.k_j exp(G_i - G_j), i >= j                            Qe_i = scale E_i q_i
//
// Exponents are never positive. Substitution in float32 gives the diagonal 16 x 16 blocks of X, and products of split
// tf32 values, which keep float32's precision, give the blocks below them. A series of powers of M would lose all
// digits with keys that are alike.
#pragma once

#include "common/recurrence.h"
#include "cuda/arch/mma_tiles.h"
#include "cuda/arch/ptx.h"
#include "cuda/recurrence/chunk_factors_channel.cuh"
#include "cuda/recurrence/chunk_memory.cuh"
#include "cuda/recurrence/params.h"
#include "cuda/recurrence/tokens.cuh"

namespace sleepkern::cuda {

// Computes M and P with one decay a token: the decay multiplies the finished products.
template <Mode MODE, int KP, bool CHANNEL>
SLEEPKERN_DEVICE void grams(const Problem& problem, const Chunk& chunk, const Number<MODE>* keys,
                            const ChunkScratch<MODE, KP, CHANNEL>& scratch, Number<MODE>* P) {
  const int blocks = chunk.blocks(), warp = threadIdx.x >> 5;
  const int pairs = blocks * (blocks + 1) / 2;
  for (int task = warp; task < (P ? 2 * pairs : pairs); task += WARPS) {
    const bool is_qk = task >= pairs;
    int I = 0, J = is_qk ? task - pairs : task;
    while (J > I) J -= ++I;
    float acc[2][4];
    clear(acc);
    const LeftLoader<MODE, KP> left(is_qk ? scratch.Q : keys);
    const RightLoader<MODE, KP> right(keys);
    for (int step = 0; step < KP / STEP<MODE>; ++step) multiply<MODE>(acc, left.load(I, step), right, step, 1, J);
    const Decay<KP, CHANNEL> decay{scratch.G};
    each_element(acc, I, J, [&](int i, int j, float x) {
      if (is_qk) {
        store_element<MODE>(P, CHUNK, i, j, i >= j ? problem.scale * x * decay.between(i, j, 0) : 0.0f);
      } else {
        store_element<Mode::fp32x3>(scratch.M, CHUNK, i, j,
                                    i > j ? scratch.beta[i] * x * decay.between(i, j, 0) : 0.0f);
      }
    });
  }
}

// Computes XD and XT of X = (I + M)^-1. First a lane computes a column of each diagonal block. Then a warp computes the
// column of blocks below one: X_IJ^T = -(sum of X_LJ^T M_IL^T over J <= L < I) X_II^T.
template <Mode MODE, int KP, bool CHANNEL>
SLEEPKERN_DEVICE void invert(const Chunk& chunk, const ChunkScratch<MODE, KP, CHANNEL>& scratch) {
  constexpr Mode FULL = Mode::fp32x3;
  const int blocks = chunk.blocks(), warp = threadIdx.x >> 5, J = threadIdx.x >> 4, column = threadIdx.x & 15;
  if (J < blocks) {
    float x[16];
#pragma unroll
    for (int i = 0; i < 16; ++i) {
      x[i] = i == column ? 1.0f : 0.0f;
#pragma unroll
      for (int j = 0; j < 16; ++j) {
        if (j < i) x[i] -= scratch.M[at<FULL>(CHUNK, 16 * J + i, 16 * J + j)] * x[j];
      }
      scratch.XD[at<FULL>(16, 16 * J + i, column)] = x[i];
      scratch.XT[at<FULL>(CHUNK, 16 * J + column, 16 * J + i)] = x[i];
    }
  }
  block_barrier();
  const LeftLoader<FULL, CHUNK> above(scratch.XT);
  const RightLoader<FULL, CHUNK> below(scratch.M);
  const RightLoader<FULL, 16> diagonal(scratch.XD);
  for (int I = warp + 1; I < blocks; ++I) {
    float sum[2][4], block[2][4];
    clear(sum);
    clear(block);
    for (int step = 2 * warp; step < 2 * I; ++step) multiply<FULL>(sum, above.load(warp, step), below, step, 1, I);
#pragma unroll
    for (int step = 0; step < 2; ++step) multiply<FULL>(block, left_of<FULL>(sum, step), diagonal, step, 1, I);
    each_element(block, warp, I, [&](int j, int i, float x) { scratch.XT[at<FULL>(CHUNK, j, i)] = -x; });
    warp_barrier();
  }
  block_barrier();
}

// Stores X diag(b E) and X diag(b) as left operands.
template <Mode MODE, int KP, bool CHANNEL>
SLEEPKERN_DEVICE void scale_inverse(const Chunk& chunk, const ChunkScratch<MODE, KP, CHANNEL>& scratch) {
  const int rows = 16 * chunk.blocks();
  const Decay<KP, CHANNEL> decay{scratch.G};
  for (int e = threadIdx.x; e < CHUNK * CHUNK / 2; e += THREADS) {
    const int i = e & (CHUNK - 1), j = 2 * (e / CHUNK);
    float x[2] = {}, y[2] = {};
    for (int n = 0; n < 2; ++n) {
      if (i < rows && j + n <= i) x[n] = scratch.XT[at<Mode::fp32x3>(CHUNK, j + n, i)] * scratch.beta[j + n];
      if (!CHANNEL) y[n] = x[n] * decay.from_start(j + n, 0);
    }
    store_pair<MODE>(scratch.XB, CHUNK, i, j, x[0], x[1]);
    if (!CHANNEL) store_pair<MODE>(scratch.XE, CHUNK, i, j, y[0], y[1]);
  }
}

// Computes -W [CHUNK][KP] = -X diag(b) (E k), 16 rows and half of the columns a warp; rows beyond the tokens are 0.
template <Mode MODE, int KP>
SLEEPKERN_DEVICE void factor_W(const Chunk& chunk, const Number<MODE>* inverse, const Number<MODE>* keys,
                               Number<MODE>* W) {
  static_assert(WARPS == 8 && CHUNK == 64, "a warp takes a quarter of the rows and half of the columns");
  const int warp = threadIdx.x >> 5, I = warp >> 1, half = warp & 1;
  float acc[KP / 16][4];
  clear(acc);
  if (I < chunk.blocks()) {
    const LeftLoader<MODE, CHUNK> left(inverse);
    const TransposedLoader<MODE, KP, true> right(keys);
    for (int step = 0; step < 16 * (I + 1) / STEP<MODE>; ++step) {
      multiply<MODE>(acc, left.load(I, step), right, step, KP / 32, half * KP / 32);
    }
  }
#pragma unroll
  for (int n = 0; n < KP / 16; ++n) {
#pragma unroll
    for (int i = 0; i < 4; i += 2) {
      store_pair<MODE>(W, KP, 16 * I + row_of(i), half * KP / 2 + column_of(n, i), -acc[n][i], -acc[n][i + 1]);
    }
  }
}

// Computes U of 16 value columns as accumulators U^T [16][CHUNK]; `group` is the group of columns in the tile of v.
template <Mode MODE, int KP, bool CHANNEL>
SLEEPKERN_DEVICE void factor_U(const ChunkScratch<MODE, KP, CHANNEL>& scratch, int group, int blocks,
                               float (&U)[CHUNK / 8][4]) {
  const TransposedLoader<MODE, VALUES, false> left(scratch.V);
  const RightLoader<MODE, CHUNK> right(scratch.XB);
  clear(U);
  for (int step = 0; step < 16 * blocks / STEP<MODE>; ++step) {
    multiply<MODE>(U, left.load(group, step), right, step, blocks);
  }
}

// Loads Qe to the memory of q.
template <Mode MODE, int KP, bool CHANNEL>
SLEEPKERN_DEVICE void load_queries(const Problem& problem, const Chunk& chunk, Number<MODE>* Q, const float* G) {
  const int64_t offset = static_cast<int64_t>(chunk.head / static_cast<int>(problem.HV / problem.H)) * problem.K;
  const Decay<KP, CHANNEL> decay{G};
  load_tile<MODE, KP>(Q, problem.q, chunk, offset, problem.K, problem.normalize,
                      [&](int row, int d, float x) { return problem.scale * x * decay.from_start(row, d); });
}

// Computes all factors but U and Qe. keys and W are tiles [CHUNK][KP]; P is [CHUNK][CHUNK], nullptr without outputs. It
// ends with a barrier. finish_keys later replaces `keys`.
template <Mode MODE, int KP, bool CHANNEL>
SLEEPKERN_DEVICE void compute_chunk_factors(const Problem& problem, const Chunk& chunk, Number<MODE>* keys,
                                            Number<MODE>* W, Number<MODE>* P,
                                            const ChunkScratch<MODE, KP, CHANNEL>& scratch) {
  const int64_t offset = static_cast<int64_t>(chunk.head / static_cast<int>(problem.HV / problem.H)) * problem.K;
  auto plain = [](int, int, float x) { return x; };
  load_gates<KP, CHANNEL>(problem, chunk, scratch.G, scratch.beta);
  load_tile<MODE, KP>(keys, problem.k, chunk, offset, problem.K, problem.normalize, plain);
  if (P) {
    load_tile<MODE, KP>(scratch.Q, problem.q, chunk, offset, problem.K, problem.normalize, plain);
    for (int e = threadIdx.x; e < CHUNK * CHUNK; e += THREADS) P[e] = 0;  // for the blocks above the diagonal
  }
  block_barrier();
  if constexpr (CHANNEL) {
    sum_blocks<KP>(scratch.G);
    block_barrier();
    channel_grams<MODE, KP, CHANNEL>(problem, chunk, keys, scratch, P);
  } else {
    grams<MODE, KP, CHANNEL>(problem, chunk, keys, scratch, P);
  }
  // mutant: no-barrier-before-inversion
  block_barrier();
  invert<MODE, KP, CHANNEL>(chunk, scratch);
  scale_inverse<MODE, KP, CHANNEL>(chunk, scratch);
  if constexpr (CHANNEL) {
    load_tile<MODE, KP>(keys, problem.k, chunk, offset, problem.K, problem.normalize,
                        [&](int row, int d, float x) { return x * Decay<KP, CHANNEL>{scratch.G}.from_start(row, d); });
  }
  block_barrier();
  factor_W<MODE, KP>(chunk, CHANNEL ? scratch.XB : scratch.XE, keys, W);
  block_barrier();
}

// Stores Kt in the memory of k, and the chunk decay; a barrier must follow.
template <Mode MODE, int KP, bool CHANNEL>
SLEEPKERN_DEVICE void finish_keys(const Problem& problem, const Chunk& chunk, Number<MODE>* keys, float* chunk_decay,
                                  const float* G) {
  const int64_t offset = static_cast<int64_t>(chunk.head / static_cast<int>(problem.HV / problem.H)) * problem.K;
  const Decay<KP, CHANNEL> decay{G};
  load_tile<MODE, KP>(keys, problem.k, chunk, offset, problem.K, problem.normalize,
                      [&](int row, int d, float x) { return x * decay.to_end(row, d); });
  for (int d = threadIdx.x; d < KP; d += THREADS) chunk_decay[d] = decay.from_start(CHUNK - 1, d);
}

}  // namespace sleepkern::cuda
