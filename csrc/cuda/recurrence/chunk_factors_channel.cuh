// M and P with channel decay, where the decay is inside the sum over channels,
//
//   M_ij = b_i sum_d k_id k_jd exp(G_id - G_jd).
//
// Blocks below the diagonal are matrix products, with the last row R before the block as a reference, (k_i exp(G_i -
// R)) . (k_j exp(R - G_j)), both exponents <= 0. In the diagonal 16 x 16 blocks each pair is summed by itself.
#pragma once

#include "common/recurrence.h"
#include "cuda/arch/mma_tiles.h"
#include "cuda/arch/ptx.h"
#include "cuda/recurrence/chunk_memory.cuh"
#include "cuda/recurrence/params.h"
#include "cuda/recurrence/tokens.cuh"

namespace sleepkern::cuda {

// A fragment of the values element(row, column); `right` swaps the order of its quarters (see arch/mma_tiles.h).
template <Mode MODE, class Element>
SLEEPKERN_DEVICE Fragment<MODE> fragment_of(bool right, Element element) {
  const int g = lane_of_warp() >> 2, t = lane_of_warp() & 3;
  Fragment<MODE> f;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const int row = g + 8 * (right ? i >> 1 : i & 1), half = right ? i & 1 : i >> 1;
    if constexpr (MODE == Mode::bf16) {
      f.high[i] = pack_bf16(element(row, 8 * half + 2 * t), element(row, 8 * half + 2 * t + 1));
    } else {
      f.high[i] = as_bits(narrow<MODE>(element(row, 2 * t + half)));
    }
  }
  split<MODE>(f);
  return f;
}

template <Mode MODE, int KP>
SLEEPKERN_DEVICE void channel_block(const Problem& problem, const Number<MODE>* keys,
                                    const ChunkScratch<MODE, KP, true>& scratch, Number<MODE>* P, int I, int J) {
  float kk[2][4], qk[2][4];
  clear(kk);
  clear(qk);
#pragma unroll 1
  for (int step = 0; step < KP / STEP<MODE>; ++step) {
    const int d0 = step * STEP<MODE>;
    auto before = [&](int row, int d) {
      const int j = 16 * J + row;
      float sum = scratch.G[(j | 15) * KP + d0 + d] - scratch.G[j * KP + d0 + d];
      for (int block = J + 1; block < I; ++block) sum += scratch.G[(16 * block + 15) * KP + d0 + d];
      return widen(keys[at<MODE>(KP, j, d0 + d)]) * decayed(sum);
    };
    const Fragment<MODE> right = fragment_of<MODE>(true, before);
#pragma unroll
    for (int which = 0; which < 2; ++which) {
      if (which && !P) break;
      const Number<MODE>* rows = which ? scratch.Q : keys;
      const Fragment<MODE> left = fragment_of<MODE>(false, [&](int row, int d) {
        const int i = 16 * I + row;
        // mutant: decay-of-the-row-after
        return widen(rows[at<MODE>(KP, i, d0 + d)]) * decayed(scratch.G[i * KP + d0 + d]);
      });
      mma<MODE>(which ? qk[0] : kk[0], left, right, 0);
      mma<MODE>(which ? qk[1] : kk[1], left, right, 1);
    }
  }
  each_element(kk, I, J, [&](int i, int j, float x) {
    store_element<Mode::fp32x3>(scratch.M, CHUNK, i, j, scratch.beta[i] * x);
  });
  if (P) each_element(qk, I, J, [&](int i, int j, float x) { store_element<MODE>(P, CHUNK, i, j, problem.scale * x); });
}

template <Mode MODE, int KP, bool CHANNEL>
SLEEPKERN_DEVICE void channel_grams(const Problem& problem, const Chunk& chunk, const Number<MODE>* keys,
                                    const ChunkScratch<MODE, KP, true>& scratch, Number<MODE>* P) {
  const int blocks = chunk.blocks(), warp = threadIdx.x >> 5;
  const Decay<KP, true> decay{scratch.G};
  for (int task = warp; task < blocks * (blocks - 1) / 2; task += WARPS) {
    int I = 1, J = task;
    while (J >= I) J -= I++;
    channel_block<MODE, KP>(problem, keys, scratch, P, I, J);
  }
  for (int e = threadIdx.x; e < blocks * 256; e += THREADS) {
    const int i = 16 * (e >> 8) + ((e >> 4) & 15), j = 16 * (e >> 8) + (e & 15);
    float kk = 0.0f, qk = 0.0f;
    if (i >= j) {
      for (int d = 0; d < KP; ++d) {
        const float x = widen(keys[at<MODE>(KP, j, d)]) * decay.between(i, j, d);
        kk += widen(keys[at<MODE>(KP, i, d)]) * x;
        if (P) qk += widen(scratch.Q[at<MODE>(KP, i, d)]) * x;
      }
    }
    store_element<Mode::fp32x3>(scratch.M, CHUNK, i, j, i > j ? scratch.beta[i] * kk : 0.0f);
    if (P) store_element<MODE>(P, CHUNK, i, j, problem.scale * qk);
  }
}

}  // namespace sleepkern::cuda
