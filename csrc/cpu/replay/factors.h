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

static BlockFactors factors_of(const WindowFactors& x, const Workspace& w, int64_t block, int64_t tokens) {
  BlockFactors f;
  f.rows = round_up(tokens, ROWS);
  f.W = x.factors + block * x.block_size;
  f.k_tails = f.W + REPLAY_BLOCK * w.K_rows;
  f.U = f.k_tails + REPLAY_BLOCK * w.K_rows;
  f.chunk_decay = f.U + REPLAY_BLOCK * w.V_panels * PANEL;
  return f;
}

static void lay_out(WindowFactors& x, const Workspace& w, int64_t longest, ArenaCursor& take) {
  x.blocks = max_of((longest + REPLAY_BLOCK - 1) / REPLAY_BLOCK, 1);
  x.block_size = REPLAY_BLOCK * (2 * w.K_rows + w.V_panels * PANEL) + w.K_rows;
  x.factors = take(x.blocks * x.block_size);
  x.W = take(REPLAY_BLOCK * w.K_rows);
  x.cross = take(CHUNK * CHUNK);
  x.first_k_tails = take(CHUNK * w.K_rows);
  x.values = take(REPLAY_BLOCK * PANEL);
  x.before = take(w.state_size);
}

// Multiplies one panel of rows by (I + M)^-1, in place.
SLEEPKERN_STAGE void solve(const Chunk& c, const Workspace& w, float* rows) {
  for (int64_t i = 0; i < c.padded; i += ROWS) {
    const float* M = w.gram_kk + column_at(i, CHUNK);
    Tile t;
    load(t, rows + i * PANEL);
    multiply_add<-1>(t, M, rows, i);
    substitute(t, M + i * PANEL);
    store(t, rows + i * PANEL);
  }
}

// Computes the factors of one chunk, as rows `at`, at + 1, ... of a block.
SLEEPKERN_STAGE void make_factors(const Chunk& c, Workspace& w, const WindowFactors& x, const BlockFactors& f,
                                  int64_t at) {
  chunk_factors<float>(c, w);
  const int64_t bytes = c.padded * PANEL * sizeof(float);
  for (int64_t panel = 0; panel < w.V_panels; ++panel) {
    float* U = f.U + (panel * REPLAY_BLOCK + at) * PANEL;
    load_values(c, w, panel);
    std::memcpy(U, w.values, bytes);
    if (c.p.delta) solve(c, w, U);
  }
  for (int64_t d = 0; d < w.K_rows; d += PANEL) {
    std::memcpy(f.k_tails + d * REPLAY_BLOCK + at * PANEL, w.k_tails + d * CHUNK, bytes);
    if (!c.p.delta) continue;
    float* W = x.W + d * REPLAY_BLOCK + at * PANEL;
    scale_tokens(c, w.keys_transposed + d * CHUNK, w.prediction_scale, W);
    solve(c, w, W);
  }
}

// Subtracts X times the first chunk's rows from the second chunk's, in one panel.
SLEEPKERN_INLINE void subtract_first_chunk(const Chunk& c, const WindowFactors& x, float* first) {
  float* second = first + CHUNK * PANEL;
  for (int64_t i = 0; i < c.padded; i += ROWS) {
    Tile t;
    load(t, second + i * PANEL);
    multiply_add<-1>(t, x.cross + column_at(i, CHUNK), first, CHUNK);
    store(t, second + i * PANEL);
  }
}

// Merges the WY factors of two chunks into those of one block: c is the second chunk, with its decay in w.chunk_decay;
// the first chunk is whole, with its decay in f.chunk_decay.
SLEEPKERN_STAGE void merge(const Chunk& c, const Workspace& w, const WindowFactors& x, const BlockFactors& f) {
  const int64_t end = round_up(c.count, PANEL);
  if (c.p.delta) {
    for (int64_t t = c.padded; t < end; ++t) {
      for (int64_t d = 0; d < w.K_rows; d += PANEL) {
        SLEEPKERN_EACH_VEC(n) store(x.W + d * REPLAY_BLOCK + (CHUNK + t) * PANEL + n * LANES, Vec{});
      }
    }
    transpose_panels(f.k_tails, REPLAY_BLOCK, CHUNK, w.K_rows, x.first_k_tails, w.K_rows);
    transpose_panels(x.W + CHUNK * PANEL, REPLAY_BLOCK, end, w.K_rows, f.W,
                     w.K_rows);  // f.W is free until the block is done
    for (int64_t i = 0; i < end; i += PANEL) {
      for (int64_t j = 0; j < CHUNK; j += ROWS) {
        Tile t;
        clear(t);
        multiply_add<1>(t, x.first_k_tails + column_at(j, w.K_rows), f.W + i * w.K_rows, w.K);
        store(t, x.cross + i * CHUNK + j * PANEL);
      }
    }
    for (int64_t panel = 0; panel < w.V_panels; ++panel) subtract_first_chunk(c, x, f.U + panel * REPLAY_BLOCK * PANEL);
  }
  for (int64_t d = 0; d < w.K_rows; d += PANEL) {
    float *W = x.W + d * REPLAY_BLOCK, *k_tails = f.k_tails + d * REPLAY_BLOCK;
    SLEEPKERN_EACH_VEC(n) {
      const Vec first = load(f.chunk_decay + d + n * LANES), second = load(w.chunk_decay + d + n * LANES);
      for (int64_t t = 0; t < CHUNK; ++t) {
        float* row = k_tails + t * PANEL + n * LANES;
        store(row, load(row) * second);
      }
      for (int64_t t = CHUNK; c.p.delta && t < CHUNK + c.padded; ++t) {
        float* row = W + t * PANEL + n * LANES;
        store(row, load(row) * first);
      }
      store(f.chunk_decay + d + n * LANES, first * second);
    }
    if (c.p.delta) subtract_first_chunk(c, x, W);
  }
}

// Computes the factors of tokens [first, first + tokens) of a head.
SLEEPKERN_STAGE BlockFactors make_block(const Problem& p, Workspace& w, const WindowFactors& x, int64_t first,
                                        int64_t tokens, int64_t head, int64_t block) {
  const BlockFactors f = factors_of(x, w, block, tokens);
  make_factors(Chunk(p, first, min_of(tokens, CHUNK), head), w, x, f, 0);
  std::memcpy(f.chunk_decay, w.chunk_decay, w.K_rows * sizeof(float));
  if (tokens > CHUNK) {
    const Chunk second(p, first + CHUNK, tokens - CHUNK, head);
    make_factors(second, w, x, f, CHUNK);
    merge(second, w, x, f);
  }
  if (p.delta) {
    for (int64_t d = 0; d < w.K_rows; d += PANEL) {
      float* rows = x.W + d * REPLAY_BLOCK;
      for (int64_t t = f.rows * PANEL; t < round_up(tokens, PANEL) * PANEL; t += LANES) store(rows + t, Vec{});
    }
    transpose_panels(x.W, REPLAY_BLOCK, round_up(tokens, PANEL), w.K_rows, f.W, w.K_rows);
  }
  return f;
}

}  // namespace
}  // namespace sleepkern::SLEEPKERN_ISA
