// The shared memory of a CTA that computes chunk factors, and the sums of the chunk's gates.
//
// Shared memory, in bytes at K = 128, bf16 (float32): keys and -W 16 K each (32 K); The scratch has v, 8 K (16 K); M,
// 16 K, and later X diag(b E) in the same memory; q, and later X^T, 16 K, and X diag(b), 8 K (16 K), in the same
// memory; and the gates, which with channel decay are all of G, 32 K.
#pragma once

#include "common/recurrence.h"
#include "cuda/arch/mma_tiles.h"
#include "cuda/arch/ptx.h"
#include "cuda/recurrence/params.h"
#include "cuda/recurrence/tokens.cuh"

namespace sleepkern::cuda {

// A log decay below this value is replaced by it: exp of it is 0 in float32, and with -inf a difference of two G would
// be NaN. The value is not the CPU's of common/limits.h, which sums G in double: here sums of floats must stay exact.
constexpr float MIN_LOG_DECAY = -105.0f;

template <Mode MODE, int KP, bool CHANNEL>
struct ChunkScratch {
  using N = Number<MODE>;
  N* V;       // [CHUNK][VALUES]
  float* M;   // [CHUNK][CHUNK]
  N* XE;      // [CHUNK][CHUNK] X diag(b E), in the memory of M
  float* XT;  // [CHUNK][CHUNK] X transposed
  N* XB;      // [CHUNK][CHUNK] X diag(b)
  N* Q;       // [CHUNK][KP], in the memory of XT and XB
  float* XD;  // [CHUNK][16] diagonal blocks of X
  float* G;   // see Decay
  float* beta;

  SLEEPKERN_BOTH explicit ChunkScratch(Arena& arena) {
    V = arena.take<N>(CHUNK * VALUES);
    M = arena.take<float>(CHUNK * CHUNK);
    XE = reinterpret_cast<N*>(M);
    constexpr int inverse = CHUNK * CHUNK * (sizeof(float) + sizeof(N)), queries = CHUNK * KP * sizeof(N);
    XT = reinterpret_cast<float*>(arena.take<char>(inverse > queries ? inverse : queries));
    XB = reinterpret_cast<N*>(XT + CHUNK * CHUNK);
    Q = reinterpret_cast<N*>(XT);
    XD = arena.take<float>(CHUNK * 16);
    G = arena.take<float>(CHANNEL ? CHUNK * KP + CHUNK / 8 * KP : 2 * CHUNK);
    beta = arena.take<float>(CHUNK);
  }
};

// The shared memory of a CTA that computes chunk factors. P is last, so that all other offsets are compile-time
// constants.
template <Mode MODE, int KP, bool CHANNEL>
struct ChunkMemory {
  Arena arena;
  Number<MODE>*keys, *W;
  float *chunk_decay, *sums;  // decay of the chunk; scratch of `converged`
  ChunkScratch<MODE, KP, CHANNEL> scratch;
  Number<MODE>* P;

  SLEEPKERN_BOTH ChunkMemory(char* base, bool want_output)
      : arena{base},
        keys(arena.take<Number<MODE>>(CHUNK * KP)),
        W(arena.take<Number<MODE>>(CHUNK * KP)),
        chunk_decay(arena.take<float>(KP)),
        sums(arena.take<float>(SUMS)),
        scratch(arena),
        P(want_output ? arena.take<Number<MODE>>(CHUNK * CHUNK) : nullptr) {}
};

// The running sum G is used in differences, which are small where G itself may be large. With one decay a token G is
// kept in two floats. With channel decay it restarts every 16 rows, and the sums of whole blocks are added where
// needed.
template <int KP, bool CHANNEL>
struct Decay {
  const float* G;

  // exp(G_i - G_j), i >= j; with channel decay i and j in the same 16 rows.
  SLEEPKERN_DEVICE float between(int i, int j, int d) const {
    if (CHANNEL) return decayed(G[i * KP + d] - G[j * KP + d]);
    return decayed((G[i] - G[j]) + (G[CHUNK + i] - G[CHUNK + j]));
  }
  // exp(G_i).
  SLEEPKERN_DEVICE float from_start(int i, int d) const {
    if (CHANNEL) return decayed(G[i * KP + d] + before()[(i >> 4) * KP + d]);
    return decayed(G[i] + G[CHUNK + i]);
  }
  // exp(G_C - G_i).
  SLEEPKERN_DEVICE float to_end(int i, int d) const {
    if (CHANNEL) return decayed((G[(i | 15) * KP + d] - G[i * KP + d]) + after()[(i >> 4) * KP + d]);
    return between(CHUNK - 1, i, d);
  }
  // Sums of g over all blocks before and after a block, [4][KP] each.
  SLEEPKERN_DEVICE const float* before() const { return G + CHUNK * KP; }
  SLEEPKERN_DEVICE const float* after() const { return before() + CHUNK / 16 * KP; }
};

// Loads G and beta of a chunk; rows beyond its tokens have g = 0 and beta = 0.
template <int KP, bool CHANNEL>
SLEEPKERN_DEVICE void load_gates(const Problem& problem, const Chunk& chunk, float* G, float* beta) {
  const int lane = lane_of_warp(), warp = threadIdx.x >> 5;
  if (CHANNEL) {
    for (int e = threadIdx.x; e < 4 * KP; e += THREADS) {
      const int d = e % KP;
      float sum = 0.0f;
      for (int j = 16 * (e / KP); j < 16 * (e / KP) + 16; ++j) {
        if (j < chunk.tokens && d < problem.K) {
          sum += fmaxf(MIN_LOG_DECAY, load_one(problem.g.data, problem.g.type,
                                               (chunk.first + j) * problem.g.stride + chunk.head * problem.K + d));
        }
        G[j * KP + d] = sum;
      }
    }
  } else if (warp == 0) {
    float before = 0.0f, before_low = 0.0f;
    const auto add = [](float& high, float& low, float x, float x_low) {  // exact but for the low parts
      const float sum = high + x, part = sum - high;
      low += x_low + ((high - (sum - part)) + (x - part));
      high = sum;
    };
    for (int j = lane; j < CHUNK; j += 32) {
      float sum = 0.0f, low = 0.0f;
      if (j < chunk.tokens && problem.g.data) {
        sum = fmaxf(MIN_LOG_DECAY,
                    load_one(problem.g.data, problem.g.type, (chunk.first + j) * problem.g.stride + chunk.head));
      }
      for (int step = 1; step < 32; step *= 2) {
        const float other = shuffle_up(sum, step), other_low = shuffle_up(low, step);
        if (lane >= step) add(sum, low, other, other_low);
      }
      add(sum, low, before, before_low);
      G[j] = sum;
      G[CHUNK + j] = low;
      before = shuffle_from(sum, 31);
      before_low = shuffle_from(low, 31);
    }
  }
  if (warp == WARPS - 1) {
    for (int j = lane; j < CHUNK; j += 32) {
      beta[j] = j >= chunk.tokens   ? 0.0f
                : problem.beta.data ? load_one(problem.beta.data, problem.beta.type,
                                               (chunk.first + j) * problem.beta.stride + chunk.head)
                                    : 1.0f;
    }
  }
}

// Computes the sums of whole blocks of 16 rows that Decay uses.
template <int KP>
SLEEPKERN_DEVICE void sum_blocks(float* G) {
  float* sums = G + CHUNK * KP;
  for (int d = threadIdx.x; d < KP; d += THREADS) {
    float before = 0.0f, after = 0.0f;
    for (int I = 0; I < CHUNK / 16; ++I) {
      sums[I * KP + d] = before;
      before += G[(16 * I + 15) * KP + d];
    }
    for (int I = CHUNK / 16 - 1; I >= 0; --I) {
      sums[(CHUNK / 16 + I) * KP + d] = after;
      after += G[(16 * I + 15) * KP + d];
    }
  }
}

// Calls element(i, j, x) for the elements x = left_i . right_j of the 16 x 16 block (I, J) of M or P.
template <class Element>
SLEEPKERN_DEVICE void each_element(const float (&acc)[2][4], int I, int J, Element element) {
#pragma unroll
  for (int n = 0; n < 2; ++n) {
    for (int i = 0; i < 4; ++i) element(16 * I + row_of(i), 16 * J + column_of(n, i), acc[n][i]);
  }
}

}  // namespace sleepkern::cuda
