// Replay in token space, for a window of one block without channel decay. The passes add Kt^T Y to the state, and only
// Y [rows, V] changes from pass to pass; n counts the passes done:
//
//   Y <- a Y + U + a^n H - Z Y,   Z = W Kt^T,  H = -W S_0;   Y = 0 before the first
//   S_N = a^N S_0 + Kt^T Y_N                                             2 rows^2 V flop a pass
//
// A stride of m passes at once has the same form, with a^m, G U, C H and Z_m in place of a, U, H and Z.
// Doubling gives m = 2, 4, ..., at 2 rows^3 flop a product:
//
//   Z_2m = 2 a^m Z_m - Z_m Z_m;   G_2m = (1 + a^m) G_m - Z_m G_m;   C_2m = 2 a^m C_m - Z_m C_m
//
// With keys that resemble each other Y grows in directions that Kt^T maps to almost nothing: at correlation .99 and b =
// 2 sixteen passes lose a digit and a half, and powers of the map lose more. So before more than a few passes the
// factors are balanced: with Kt Kt^T = R^T R (Cholesky),
//
//   U <- R U,  W <- R W,  Kt <- R^-T Kt
//
// does not change Kt^T U and Kt^T W, and gives |Y| the size of Kt^T Y, which no pass grows.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#include "common/recurrence.h"
#include "cpu/gemm/microkernel.h"
#include "cpu/recurrence/buffers.h"
#include "cpu/recurrence/prefetch.h"
#include "cpu/replay/factors.h"
#include "cpu/replay/wy.h"
#include "cpu/runtime/arena.h"
#include "cpu/simd/vec.h"

namespace sleepkern::SLEEPKERN_ISA {
namespace {

constexpr int64_t UNBALANCED_PASSES = 4;  // up to so many passes lose less than the factors' own rounding

// Square matrices [REPLAY_BLOCK / PANEL][REPLAY_BLOCK][PANEL] over the block's rows, and rows of one value panel.
struct TokenSpace {
  float* Z;  // transposed (row j, column i): a left operand
  float *R, *R_transposed;
  float *Z_stride, *Z_doubled;         // Z_m, transposed and plain
  float *G, *C;                        // plain, while they are computed
  float *G_transposed, *C_transposed;  // transposed: left operands
  float *H, *next;                     // [REPLAY_BLOCK][PANEL]  H, the next Y
  float *Y, *stride_U;                 // Y; G U
  float* stride_H;                     // C H
  float* total_decay;                  // [K_rows]  a^N
};

// The factors of a step. A step is one pass, or the passes of a stride.
struct TokenSpaceStep {
  float decay;
  const float *Z, *U, *H;
};

static void lay_out(TokenSpace& x, const Workspace& work, ArenaCursor& take) {
  for (float** square :
       {&x.Z, &x.R, &x.R_transposed, &x.Z_stride, &x.Z_doubled, &x.G, &x.C, &x.G_transposed, &x.C_transposed}) {
    *square = take(REPLAY_BLOCK * REPLAY_BLOCK);
  }
  for (float** rows : {&x.H, &x.next, &x.Y, &x.stride_U, &x.stride_H}) {
    *rows = take(REPLAY_BLOCK * PANEL);
  }
  x.total_decay = take(work.K_rows);
}

// The stride, a power of two, with the fewest multiply-adds for all passes, in units of rows^2.
static int64_t cheapest_stride(int64_t passes, int64_t rows, int64_t columns) {
  int64_t best = 1, fewest = (passes - 1) * columns;
  for (int64_t stride = 2, doublings = 1; doublings < 31 && stride <= passes; stride *= 2, ++doublings) {
    const int64_t steps = passes / stride, squares = doublings - (steps == 1);
    const int64_t cost = rows * (squares + 2 * (doublings - 1)) + columns * (1 + steps + passes % stride);
    if (cost < fewest) {
      fewest = cost;
      best = stride;
    }
  }
  return best;
}

// out = by X - Z X for one panel X of columns; Z is given transposed.
SLEEPKERN_STAGE void advance(const BlockFactors& factors, const float* Z, float by, const float* X, float* out) {
  for (int64_t i = 0; i < factors.rows; i += ROWS) {
    Tile t;
    load(t, X + i * PANEL);
    SLEEPKERN_EACH_ROW(r)
      SLEEPKERN_EACH_VEC(n) t.at[r][n] *= by;
    multiply_add<-1>(t, Z + column_at(i, REPLAY_BLOCK), X, factors.rows);
    store(t, out + i * PANEL);
  }
}

// Forward substitution with a diagonal: row r loses m[j][r] times row j for every j < r, and is then divided by
// m[r][r].
SLEEPKERN_INLINE void substitute_divided(Tile& t, const float* m, const float* inverse_diagonal) {
  SLEEPKERN_EACH_ROW(j) {
    const Vec by = broadcast(inverse_diagonal[j]);
    SLEEPKERN_EACH_VEC(n) t.at[j][n] *= by;
    SLEEPKERN_EACH_ROW(r) {
      if (r > j) {
        const Vec factors = broadcast(m[j * PANEL + r]);
        SLEEPKERN_EACH_VEC(n) t.at[r][n] -= factors * t.at[j][n];
      }
    }
  }
}

// Computes rows i .. i + ROWS of R in its panel on the diagonal, from those of R^T R minus the products of the rows
// above.
SLEEPKERN_INLINE void factor_diagonal(Tile& t, float* panel, int64_t i, float* inverse_diagonal) {
  SLEEPKERN_EACH_ROW(j) {
    float* row = panel + (i + j) * PANEL;
    SLEEPKERN_EACH_VEC(n) store(row + n * LANES, t.at[j][n]);
    const float pivot = row[(i + j) % PANEL];
    inverse_diagonal[i + j] = pivot > 0 ? 1 / std::sqrt(pivot) : 0.0f;
    SLEEPKERN_EACH_VEC(n) store(row + n * LANES, t.at[j][n] *= broadcast(inverse_diagonal[i + j]));
    SLEEPKERN_EACH_ROW(r) {
      if (r > j) {
        const Vec factors = broadcast(row[(i + r) % PANEL]);
        SLEEPKERN_EACH_VEC(n) t.at[r][n] -= factors * t.at[j][n];
      }
    }
  }
}

// Replaces x.R = Kt Kt^T by its Cholesky factor R, upper triangular, with zeros left of the diagonal.
SLEEPKERN_STAGE void factor(const BlockFactors& factors, const TokenSpace& x, float* inverse_diagonal) {
  for (int64_t i = 0; i < factors.rows; i += ROWS) {
    const float* above = x.R + column_at(i, REPLAY_BLOCK);
    for (int64_t j = i / PANEL * PANEL; j < factors.rows; j += PANEL) {
      float* panel = x.R + j * REPLAY_BLOCK;
      Tile t;
      load(t, panel + i * PANEL);
      multiply_add<-1>(t, above, panel, i);
      if (j <= i) {
        factor_diagonal(t, panel, i, inverse_diagonal);
        for (int64_t r = i; r < i + ROWS; ++r) {
          for (int64_t l = 0; l < r - j; ++l) panel[r * PANEL + l] = 0;
        }
      } else {
        substitute_divided(t, above + i * PANEL, inverse_diagonal + i);
        store(t, panel + i * PANEL);
      }
    }
  }
}

// rows <- R rows of one panel, from the first row on: a row is replaced only after its last use.
SLEEPKERN_STAGE void multiply_by_factor(const BlockFactors& factors, const TokenSpace& x, float* rows) {
  for (int64_t i = 0; i < factors.rows; i += ROWS) {
    Tile t;
    clear(t);
    multiply_add<1>(t, x.R_transposed + column_at(i, REPLAY_BLOCK) + i * PANEL, rows + i * PANEL, factors.rows - i);
    store(t, rows + i * PANEL);
  }
}

// rows <- R^-T rows of one panel.
SLEEPKERN_STAGE void divide_by_factor(const BlockFactors& factors, const TokenSpace& x, const float* inverse_diagonal,
                                      float* rows) {
  for (int64_t i = 0; i < factors.rows; i += ROWS) {
    const float* above = x.R + column_at(i, REPLAY_BLOCK);
    Tile t;
    load(t, rows + i * PANEL);
    multiply_add<-1>(t, above, rows, i);
    substitute_divided(t, above + i * PANEL, inverse_diagonal + i);
    store(t, rows + i * PANEL);
  }
}

// Balances the factors of the block, whose W is in window.W. A small term is added to the diagonal of Kt Kt^T, which is
// singular if two keys are equal. R need not be exact, since any invertible R balances correctly.
SLEEPKERN_STAGE void balance(const Workspace& work, const WindowFactors& window, const TokenSpace& x,
                             const BlockFactors& factors, int64_t tokens) {
  constexpr float LITTLE = 1e-4f;
  const int64_t end = round_up(tokens, PANEL), rows = round_up(factors.rows, LANES);
  alignas(64) float inverse_diagonal[REPLAY_BLOCK] = {};
  for (int64_t d = 0; d < work.K_rows; d += PANEL) {
    float* k_tails = factors.k_tails + d * REPLAY_BLOCK;
    for (int64_t at = factors.rows * PANEL; at < end * PANEL; at += LANES) store(k_tails + at, Vec{});
  }
  transpose_panels(factors.k_tails, REPLAY_BLOCK, end, work.K_rows, factors.W,
                   work.K_rows);  // scratch here; W is stored to it below
  upper_gram<1>(factors.W, factors.W, work.K_rows, tokens, REPLAY_BLOCK, x.R,
                [](Vec g, int64_t, int64_t) { return g; });
  float largest = 0;
  for (int64_t i = 0; i < tokens; ++i) largest = std::fmax(largest, x.R[column_at(i, REPLAY_BLOCK) + i * PANEL]);
  for (int64_t i = 0; i < factors.rows; ++i) {
    float& diagonal = x.R[column_at(i, REPLAY_BLOCK) + i * PANEL];
    diagonal = i < tokens ? diagonal + LITTLE * largest : 1.0f;
  }
  factor(factors, x, inverse_diagonal);
  transpose_panels(x.R, REPLAY_BLOCK, rows, end, x.R_transposed, REPLAY_BLOCK);
  for (int64_t panel = 0; panel < work.V_panels; ++panel)
    multiply_by_factor(factors, x, factors.U + panel * REPLAY_BLOCK * PANEL);
  for (int64_t d = 0; d < work.K_rows; d += PANEL) {
    multiply_by_factor(factors, x, window.W + d * REPLAY_BLOCK);
    divide_by_factor(factors, x, inverse_diagonal, factors.k_tails + d * REPLAY_BLOCK);
  }
  transpose_panels(window.W, REPLAY_BLOCK, end, work.K_rows, factors.W, work.K_rows);
}

// Computes Z of the block, transposed; rows up to a whole vector are zero.
SLEEPKERN_STAGE void token_transition(const Workspace& work, const WindowFactors& window, const TokenSpace& x,
                                      const BlockFactors& factors, int64_t tokens) {
  const int64_t end = round_up(tokens, PANEL);
  transpose_panels(factors.k_tails, REPLAY_BLOCK, round_up(tokens, LANES), work.K_rows, window.W, work.K_rows);
  for (int64_t i = 0; i < end; i += PANEL) {
    float* Z = x.Z + i * REPLAY_BLOCK;
    for (int64_t j = 0; j < factors.rows; j += ROWS) {
      Tile t;
      clear(t);
      multiply_add<1>(t, window.W + column_at(j, work.K_rows), factors.W + i * work.K_rows, work.K);
      store(t, Z + j * PANEL);
    }
    for (int64_t at = factors.rows * PANEL; at < round_up(factors.rows, LANES) * PANEL; at += LANES)
      store(Z + at, Vec{});
  }
}

// Computes Z_m, G_m and C_m for m = stride by doubling from m = 2, where they are linear in Z. Z_m is skipped if no
// step needs it.
SLEEPKERN_STAGE void stride_factors(const TokenSpace& x, const BlockFactors& factors, int64_t stride, bool repeated) {
  const int64_t end = round_up(factors.rows, PANEL), rows = round_up(factors.rows, LANES);
  const size_t bytes = factors.rows * PANEL * sizeof(float);
  float decay = factors.chunk_decay[0];
  transpose_panels(x.Z, REPLAY_BLOCK, rows, end, x.Z_doubled, REPLAY_BLOCK);
  for (int64_t at = 0; at < end * REPLAY_BLOCK; at += LANES) {
    const Vec minus = -load(x.Z_doubled + at);
    store(x.G + at, minus);
    store(x.C + at, minus);
  }
  for (int64_t i = 0; i < factors.rows; ++i) {
    const int64_t diagonal = column_at(i, REPLAY_BLOCK) + i * PANEL;
    // mutant: stride-without-a-pass
    x.G[diagonal] += 1 + decay;
    x.C[diagonal] += 2 * decay;
  }
  auto replace = [&](float* square, const float* Z, float by) {
    for (int64_t i = 0; i < end; i += PANEL) {
      advance(factors, Z, by, square + i * REPLAY_BLOCK, x.next);
      std::memcpy(square + i * REPLAY_BLOCK, x.next, bytes);
    }
  };
  const float* Z = x.Z;
  for (int64_t passes_done = 2;; passes_done *= 2) {
    if (passes_done == stride && !repeated) break;
    replace(x.Z_doubled, Z, 2 * decay);
    transpose_panels(x.Z_doubled, REPLAY_BLOCK, rows, end, x.Z_stride, REPLAY_BLOCK);
    Z = x.Z_stride;
    decay *= decay;
    if (passes_done == stride) break;
    replace(x.G, Z, 1 + decay);
    replace(x.C, Z, 2 * decay);
  }
  transpose_panels(x.G, REPLAY_BLOCK, rows, end, x.G_transposed, REPLAY_BLOCK);
  transpose_panels(x.C, REPLAY_BLOCK, rows, end, x.C_transposed, REPLAY_BLOCK);
}

// next = a Y + U + reach H - Z Y; `first` means that Y is zero.
SLEEPKERN_STAGE void make_step(const BlockFactors& factors, const TokenSpaceStep& s, float reach, bool first,
                               const float* Y, float* next) {
  for (int64_t i = 0; i < factors.rows; i += ROWS) {
    Tile t;
    SLEEPKERN_EACH_ROW(r) {
      SLEEPKERN_EACH_VEC(n) {
        const int64_t at = (i + r) * PANEL + n * LANES;
        // mutant: first-state-without-decay
        t.at[r][n] = load(Y + at) * s.decay + load(s.U + at) + load(s.H + at) * reach;
      }
    }
    if (!first) multiply_add<-1>(t, s.Z + column_at(i, REPLAY_BLOCK), Y, factors.rows);
    store(t, next + i * PANEL);
  }
}

// out = left X for one panel X of columns.
SLEEPKERN_STAGE void multiply_rows(const BlockFactors& factors, const float* left, const float* X, float* out) {
  for (int64_t i = 0; i < factors.rows; i += ROWS) {
    Tile t;
    clear(t);
    multiply_add<1>(t, left + column_at(i, REPLAY_BLOCK), X, factors.rows);
    store(t, out + i * PANEL);
  }
}

// Runs all passes of one value panel; `state` goes from S_0 to S_N. from_zero: S_0 is zero.
SLEEPKERN_STAGE void replay_panel(const Workspace& work, const TokenSpace& x, const BlockFactors& factors,
                                  const Replay& r, int64_t stride, const float* U, bool delta, bool from_zero,
                                  float* state, PrefetchSchedule& prefetch) {
  float *Y = x.Y, *next = x.next, reach = 1;
  const size_t bytes = factors.rows * PANEL * sizeof(float);
  std::memset(Y, 0, bytes);
  std::memset(x.H, 0, bytes);
  if (delta && !from_zero) write_values(work, factors, x.H, state, x.H);  // -W S_0
  int64_t passes_done = 0;
  auto make = [&](const TokenSpaceStep& s, int64_t count) {
    for (; passes_done + count <= r.passes && !stops(r.interrupt); passes_done += count) {
      make_step(factors, s, reach, passes_done == 0 || !delta, Y, next);
      reach *= s.decay;
      float* const last = Y;
      Y = next;
      next = last;
    }
  };
  const TokenSpaceStep one{factors.chunk_decay[0], x.Z, U, x.H};
  if (stride > 1) {
    multiply_rows(factors, x.G_transposed, U, x.stride_U);
    multiply_rows(factors, x.C_transposed, x.H, x.stride_H);
    float decay = one.decay;
    for (int64_t n = 1; n < stride; n *= 2) decay *= decay;
    make({decay, x.Z_stride, x.stride_U, x.stride_H}, stride);
  }
  make(one, 1);
  for (int64_t d = 0; d < work.K_rows; ++d) x.total_decay[d] = reach;
  write_state(work, factors, x.total_decay, Y, state, prefetch);
}

// Runs all passes of a head over its one block.
SLEEPKERN_STAGE void replay_in_token_space(const Problem& problem, const Workspace& work, const WindowFactors& window,
                                           const TokenSpace& x, const Replay& r, int64_t tokens,
                                           PrefetchSchedule& prefetch) {
  const BlockFactors factors = factors_of(window, work, 0, tokens);
  const int64_t stride = problem.delta ? cheapest_stride(r.passes, factors.rows, work.V_panels * PANEL) : 1;
  if (problem.delta && r.passes > UNBALANCED_PASSES) balance(work, window, x, factors, tokens);
  if (problem.delta) token_transition(work, window, x, factors, tokens);
  if (stride > 1) stride_factors(x, factors, stride, r.passes / stride > 1);
  for (int64_t panel = 0; panel < work.V_panels; ++panel) {
    replay_panel(work, x, factors, r, stride, factors.U + panel * REPLAY_BLOCK * PANEL, problem.delta, !problem.state,
                 work.state + panel * work.K_rows * PANEL, prefetch);
  }
}

// Whether the token-space form has lost digits: S_N = a^N S_0 + Kt^T Y is a difference of two large terms if the
// passes erase nearly all of S_0, and then its rounding error is large. A pass by wy starts from the state that the
// pass before it left, and loses none.
static bool cancels(const Workspace& work, const TokenSpace& x, double before) {
  constexpr double MOST = 4;
  return x.total_decay[0] * before > MOST * distance(work.state, nullptr, work.state_size);
}

}  // namespace
}  // namespace sleepkern::SLEEPKERN_ISA
