// Replay: a window's factors are made once and stay in cache for N passes of the state over them.
//
//   wy     S <- a S + Kt^T (U - W S)                               4 L K V flop a pass
//   rank   in token space, for a window of one block: token_space.h
//
// with a the decay of the window, U = (I + M)^-1 b v and W = (I + M)^-1 b E k, and W = 0 for rules without delta. A
// block of factors has two chunks: longer products keep the state longer in registers. Merging the second chunk with
// the first one gives
//
//   W_2 <- W_2 a_1 - X W_1,   U_2 <- U_2 - X U_1,   X = W_2 Kt_1^T;   Kt_1 <- Kt_1 a_2;   a <- a_1 a_2.
#pragma once

#include <cstdint>
#include <cstring>

#include "common/recurrence.h"
#include "cpu/gemm/microkernel.h"
#include "cpu/recurrence/buffers.h"
#include "cpu/recurrence/chunk_factors.h"
#include "cpu/recurrence/pack_tokens.h"
#include "cpu/recurrence/state_pass.h"
#include "cpu/runtime/arena.h"
#include "cpu/simd/vec.h"

namespace sleepkern::SLEEPKERN_ISA {
namespace {

constexpr int64_t REPLAY_BLOCK = 2 * CHUNK;
static_assert(RANK_LIMIT == REPLAY_BLOCK, "rank form is that of one block");

// The factors of one replay block of a window, in panels. Rows beyond its tokens, up to whole tiles, are zero.
struct BlockFactors {
  int64_t rows;        // tokens, rounded up to whole tiles
  float* W;            // [REPLAY_BLOCK / PANEL][K_rows][PANEL]  W^T
  float* k_tails;      // [K_panels][REPLAY_BLOCK][PANEL]  Kt
  float* U;            // [V_panels][REPLAY_BLOCK][PANEL]
  float* chunk_decay;  // [K_rows] a
};

struct WindowFactors {
  int64_t blocks, block_size;  // blocks of the longest sequence; floats of a block
  float* factors;              // [blocks][block_size]
  float* W;                    // [K_panels][REPLAY_BLOCK][PANEL]  W of the current block
  float* cross;                // [CHUNK / PANEL][CHUNK][PANEL]  X^T
  float* first_k_tails;        // [CHUNK / PANEL][K_rows][PANEL]  Kt_1^T
  float* values;               // [REPLAY_BLOCK][PANEL]
  float* before;               // a state in panels, for tol
};

static BlockFactors factors_of(const WindowFactors& x, const Workspace& work, int64_t block, int64_t tokens) {
  BlockFactors factors;
  factors.rows = round_up(tokens, ROWS);
  factors.W = x.factors + block * x.block_size;
  factors.k_tails = factors.W + REPLAY_BLOCK * work.K_rows;
  factors.U = factors.k_tails + REPLAY_BLOCK * work.K_rows;
  factors.chunk_decay = factors.U + REPLAY_BLOCK * work.V_panels * PANEL;
  return factors;
}

static void lay_out(WindowFactors& x, const Workspace& work, int64_t longest, ArenaCursor& take) {
  x.blocks = max_of((longest + REPLAY_BLOCK - 1) / REPLAY_BLOCK, 1);
  x.block_size = REPLAY_BLOCK * (2 * work.K_rows + work.V_panels * PANEL) + work.K_rows;
  x.factors = take(x.blocks * x.block_size);
  x.W = take(REPLAY_BLOCK * work.K_rows);
  x.cross = take(CHUNK * CHUNK);
  x.first_k_tails = take(CHUNK * work.K_rows);
  x.values = take(REPLAY_BLOCK * PANEL);
  x.before = take(work.state_size);
}

// Multiplies one panel of rows by (I + M)^-1, in place.
SLEEPKERN_STAGE void solve(const Chunk& chunk, const Workspace& work, float* rows) {
  for (int64_t i = 0; i < chunk.padded; i += ROWS) {
    const float* M = work.gram_kk + column_at(i, CHUNK);
    Tile t;
    load(t, rows + i * PANEL);
    multiply_add<-1>(t, M, rows, i);
    substitute(t, M + i * PANEL);
    store(t, rows + i * PANEL);
  }
}

// Computes the factors of one chunk, as rows `at`, at + 1, ... of a block.
SLEEPKERN_STAGE void make_factors(const Chunk& chunk, Workspace& work, const WindowFactors& x,
                                  const BlockFactors& factors, int64_t at) {
  chunk_factors<float>(chunk, work);
  const int64_t bytes = chunk.padded * PANEL * sizeof(float);
  for (int64_t panel = 0; panel < work.V_panels; ++panel) {
    float* U = factors.U + (panel * REPLAY_BLOCK + at) * PANEL;
    load_values(chunk, work, panel);
    std::memcpy(U, work.values, bytes);
    if (chunk.problem.delta) solve(chunk, work, U);
  }
  for (int64_t d = 0; d < work.K_rows; d += PANEL) {
    std::memcpy(factors.k_tails + d * REPLAY_BLOCK + at * PANEL, work.k_tails + d * CHUNK, bytes);
    if (!chunk.problem.delta) continue;
    float* W = x.W + d * REPLAY_BLOCK + at * PANEL;
    scale_tokens(chunk, work.keys_transposed + d * CHUNK, work.prediction_scale, W);
    solve(chunk, work, W);
  }
}

// Subtracts X times the first chunk's rows from the second chunk's, in one panel.
SLEEPKERN_INLINE void subtract_first_chunk(const Chunk& chunk, const WindowFactors& x, float* first) {
  float* second = first + CHUNK * PANEL;
  for (int64_t i = 0; i < chunk.padded; i += ROWS) {
    Tile t;
    load(t, second + i * PANEL);
    multiply_add<-1>(t, x.cross + column_at(i, CHUNK), first, CHUNK);
    store(t, second + i * PANEL);
  }
}

// Merges the WY factors of two chunks into those of one block: `chunk` is the second one, with its decay in `work`;
// the first chunk is whole, with its decay in `factors`.
SLEEPKERN_STAGE void merge(const Chunk& chunk, const Workspace& work, const WindowFactors& x,
                           const BlockFactors& factors) {
  const int64_t end = round_up(chunk.count, PANEL);
  if (chunk.problem.delta) {
    for (int64_t t = chunk.padded; t < end; ++t) {
      for (int64_t d = 0; d < work.K_rows; d += PANEL) {
        SLEEPKERN_EACH_VEC(n) store(x.W + d * REPLAY_BLOCK + (CHUNK + t) * PANEL + n * LANES, Vec{});
      }
    }
    transpose_panels(factors.k_tails, REPLAY_BLOCK, CHUNK, work.K_rows, x.first_k_tails, work.K_rows);
    transpose_panels(x.W + CHUNK * PANEL, REPLAY_BLOCK, end, work.K_rows, factors.W,
                     work.K_rows);  // factors.W is free until the block is done
    for (int64_t i = 0; i < end; i += PANEL) {
      for (int64_t j = 0; j < CHUNK; j += ROWS) {
        Tile t;
        clear(t);
        multiply_add<1>(t, x.first_k_tails + column_at(j, work.K_rows), factors.W + i * work.K_rows, work.K);
        store(t, x.cross + i * CHUNK + j * PANEL);
      }
    }
    for (int64_t panel = 0; panel < work.V_panels; ++panel)
      subtract_first_chunk(chunk, x, factors.U + panel * REPLAY_BLOCK * PANEL);
  }
  for (int64_t d = 0; d < work.K_rows; d += PANEL) {
    float *W = x.W + d * REPLAY_BLOCK, *k_tails = factors.k_tails + d * REPLAY_BLOCK;
    SLEEPKERN_EACH_VEC(n) {
      const Vec first = load(factors.chunk_decay + d + n * LANES), second = load(work.chunk_decay + d + n * LANES);
      for (int64_t t = 0; t < CHUNK; ++t) {
        float* row = k_tails + t * PANEL + n * LANES;
        store(row, load(row) * second);
      }
      for (int64_t t = CHUNK; chunk.problem.delta && t < CHUNK + chunk.padded; ++t) {
        float* row = W + t * PANEL + n * LANES;
        store(row, load(row) * first);
      }
      store(factors.chunk_decay + d + n * LANES, first * second);
    }
    if (chunk.problem.delta) subtract_first_chunk(chunk, x, W);
  }
}

// Computes the factors of tokens [first, first + tokens) of a head.
SLEEPKERN_STAGE BlockFactors make_block(const Problem& problem, Workspace& work, const WindowFactors& x, int64_t first,
                                        int64_t tokens, int64_t head, int64_t block) {
  const BlockFactors factors = factors_of(x, work, block, tokens);
  make_factors(Chunk(problem, first, min_of(tokens, CHUNK), head), work, x, factors, 0);
  std::memcpy(factors.chunk_decay, work.chunk_decay, work.K_rows * sizeof(float));
  if (tokens > CHUNK) {
    const Chunk second(problem, first + CHUNK, tokens - CHUNK, head);
    make_factors(second, work, x, factors, CHUNK);
    merge(second, work, x, factors);
  }
  if (problem.delta) {
    for (int64_t d = 0; d < work.K_rows; d += PANEL) {
      float* rows = x.W + d * REPLAY_BLOCK;
      for (int64_t t = factors.rows * PANEL; t < round_up(tokens, PANEL) * PANEL; t += LANES) store(rows + t, Vec{});
    }
    transpose_panels(x.W, REPLAY_BLOCK, round_up(tokens, PANEL), work.K_rows, factors.W, work.K_rows);
  }
  return factors;
}

}  // namespace
}  // namespace sleepkern::SLEEPKERN_ISA
