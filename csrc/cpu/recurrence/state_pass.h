// The state pass of one value panel over one chunk, with its outputs. It is the same for every rule.
//
//   Vn = (I + M)^-1 (b v - prediction_scale * (k^T S))     by blocked forward substitution; b v where the rule has no
//   delta O  = output_scale * (q^T S) + P Vn S  <- chunk_decay * S + Kt^T Vn
#pragma once

#include <cstdint>

#include "common/recurrence.h"
#include "cpu/gemm/microkernel.h"
#include "cpu/recurrence/buffers.h"
#include "cpu/recurrence/pack_tokens.h"
#include "cpu/recurrence/prefetch.h"
#include "cpu/recurrence/rounding.h"
#include "cpu/simd/bf16.h"
#include "cpu/simd/vec.h"

namespace sleepkern::SLEEPKERN_ISA {
namespace {

SLEEPKERN_STAGE void load_values(const Chunk& c, const Workspace& w, int64_t panel) {
  const int64_t first = panel * PANEL, width = min_of(PANEL, w.V - first);
  const bool whole = c.p.v.type == Type::float32 && width == PANEL;
  for (int64_t t = 0; t < c.padded; ++t) {
    float* out = w.values + t * PANEL;
    if (!whole || t >= c.count)
      SLEEPKERN_EACH_VEC(n) store(out + n * LANES, Vec{});
    if (t >= c.count) continue;
    const void* row = c.row(c.p.v, t, c.head * w.V + first);
    if (!whole) load_row(row, c.p.v.type, width, out);
    const float* from = whole ? static_cast<const float*>(row) : out;
    const Vec b = broadcast(w.beta[t]);
    SLEEPKERN_EACH_VEC(n) store(out + n * LANES, load(from + n * LANES) * b);
  }
}

template <class E>
SLEEPKERN_STAGE void subtract_prediction(const Chunk& c, const Workspace& w, const Operands<E>& x) {
  const int64_t depth = steps<E>(w.K);
  for (int64_t i = 0; i < c.padded; i += ROWS) {
    Tile t;
    clear(t);
    multiply_add<1>(t, x.keys + column_at(i, depth), x.state, depth);
    SLEEPKERN_EACH_ROW(r) {
      const Vec by = broadcast(w.prediction_scale[i + r]);
      SLEEPKERN_EACH_VEC(n) t.at[r][n] = load(w.values + (i + r) * PANEL + n * LANES) - t.at[r][n] * by;
    }
    const float* M = w.gram_kk + column_at(i, CHUNK);
    multiply_add<-1>(t, M, w.values, i);
    substitute(t, M + i * PANEL);
    store(t, w.values + i * PANEL);
  }
}

// Stores the first `count` rows of a tile to o, for tokens from `token` on.
SLEEPKERN_INLINE void store_outputs(const Chunk& c, const Tile& t, int64_t token, int64_t count, int64_t first,
                                    int64_t width) {
  const Problem& p = c.p;
  const int64_t stride = p.HV * p.V, at = (c.first + token) * stride + c.head * p.V + first;
  if (p.v.type == Type::float32 && width == PANEL) {
    float* o = static_cast<float*>(p.o) + at;
    SLEEPKERN_EACH_ROW(r) {
      if (r < count)
        SLEEPKERN_EACH_VEC(n) store(o + r * stride + n * LANES, t.at[r][n]);
    }
    return;
  }
  alignas(64) float rows[ROWS * PANEL];
  store(t, rows);
  const int64_t size = p.v.type == Type::float32 ? 4 : 2;
  for (int64_t r = 0; r < count; ++r) {
    store_row(rows + r * PANEL, p.v.type, width, static_cast<char*>(p.o) + (at + r * stride) * size);
  }
}

// Computes the outputs; returns the sum of their squares with bf16x2 operands, else 0.
template <class E>
SLEEPKERN_STAGE float chunk_output(const Chunk& c, const Workspace& w, const Operands<E>& x, int64_t panel) {
  const int64_t depth = steps<E>(w.K), gram_depth = steps<E>(CHUNK);
  const int64_t first = panel * PANEL, width = min_of(PANEL, w.V - first);
  Vec squares{};
  for (int64_t i = 0; i < c.padded; i += ROWS) {
    Tile t;
    clear(t);
    multiply_add<1>(t, x.q_panels + column_at(i, depth), x.state, depth);
    scale_rows(t, w.output_scale + i);
    const E* gram_qk = x.gram_qk + column_at(i, gram_depth);
    multiply_add<1>(t, gram_qk, x.values, steps<E>(i));
    add_triangle(t, gram_qk + steps<E>(i) * PANEL, x.values + steps<E>(i) * PANEL);
    if constexpr (IS_BF16X2<E>) {
      SLEEPKERN_EACH_ROW(r)
        SLEEPKERN_EACH_VEC(n) squares += t.at[r][n] * t.at[r][n];
    }
    store_outputs(c, t, i, min_of(ROWS, c.count - i), first, width);
  }
  return IS_BF16X2<E> ? sum(squares) : 0;
}

// Updates the state. With bf16x2 operands it also stores the state to x.state and returns the sum of its squares, else
// 0.
template <class E>
SLEEPKERN_STAGE float update_state(const Chunk& c, const Workspace& w, const Operands<E>& x, float* state,
                                   PrefetchSchedule& prefetch) {
  Vec squares{};
  for (int64_t d = 0; d < w.K; d += ROWS) {
    Tile t;
    load(t, state + d * PANEL);
    // mutant: state-without-decay
    scale_rows(t, w.chunk_decay + d);
    multiply_add<1>(t, x.k_tails + column_at(d, steps<E>(CHUNK)), x.writes, steps<E>(c.count));
    prefetch.step();
    store(t, state + d * PANEL);
    if constexpr (IS_BF16X2<E>) {
      SLEEPKERN_EACH_ROW(r) {
        if (r % 2 != 0) continue;
        SLEEPKERN_EACH_VEC(n) {
          const BitVec pair = interleave(t.at[r][n], t.at[r + 1][n]);
          store(x.state + (d + r) / 2 * PANEL + n * LANES, pair);
          squares = dot(squares, pair, pair);
        }
      }
    }
  }
  return IS_BF16X2<E> ? sum(squares) : 0;
}

// The bits of all panels of this thread.
static uint32_t every_panel(const Workspace& w) {
  return static_cast<uint32_t>((uint64_t{1} << w.end_panel) - (uint64_t{1} << w.first_panel));
}

// The number of tiles of the state; `step` of an PrefetchSchedule is called once for each.
static int64_t state_tiles(const Workspace& w) { return (w.end_panel - w.first_panel) * ((w.K + ROWS - 1) / ROWS); }

// One chunk: corrected values, outputs and the new state of each value panel. `prefetch` prefetches the next chunk.
template <class E>
SLEEPKERN_STAGE void state_pass(const Chunk& c, Workspace& w, PrefetchSchedule& prefetch) {
  for (int64_t panel = w.first_panel; panel < w.end_panel; ++panel) {
    if (w.skipped >> panel & 1) continue;
    const Operands<E> x = operands<E>(w, panel);
    Written written{};
    load_values(c, w, panel);
    if (c.p.delta) subtract_prediction(c, w, x);
    if constexpr (IS_BF16X2<E>) written = values_to_bf16x2(c, w);
    const float output = c.p.want_output ? chunk_output(c, w, x, panel) : 0;
    const float state = update_state(c, w, x, w.state + panel * w.K_rows * PANEL, prefetch);
    if (IS_BF16X2<E>) expect(w, panel, written, output, state);
  }
}

// Loads a state from the caller's row-major [bh, K, V] to panels, row by row, an order that the hardware prefetches.
// `states` == nullptr means zero. Rows beyond K, up to a whole panel, are zero and stay zero.
SLEEPKERN_STAGE void load_state(const Workspace& w, const float* states, int64_t bh, float* panels) {
  for (int64_t d = 0; d < w.K_rows; ++d) {
    for (int64_t panel = w.first_panel; panel < w.end_panel; ++panel) {
      const int64_t first = panel * PANEL, width = min_of(PANEL, w.V - first);
      const float* from = d < w.K && states ? states + (bh * w.K + d) * w.V + first : nullptr;
      float* to = panels + (panel * w.K_rows + d) * PANEL;
      const bool whole = from && width == PANEL;
      SLEEPKERN_EACH_VEC(n) store(to + n * LANES, whole ? load(from + n * LANES) : Vec{});
      if (from && !whole) load_row(from, Type::float32, width, to);
    }
  }
}

SLEEPKERN_STAGE void state_to_bf16x2(const Workspace& w) {
  for (int64_t panel = w.first_panel; panel < w.end_panel; ++panel) {
    const int64_t at = panel * w.K_rows * PANEL;
    rows_to_bf16x2(w.state + at, w.K_rows, w.state_bf16 + at / 2);
    Vec squares{};
    for (int64_t d = 0; d < w.K_rows * PANEL; d += LANES) squares += load(w.state + at + d) * load(w.state + at + d);
    w.rounding[panel] = before_any(sum(squares));
  }
}

SLEEPKERN_STAGE void store_state(const Workspace& w, const float* panels, int64_t bh, float* states) {
  for (int64_t d = 0; d < w.K; ++d) {
    for (int64_t panel = w.first_panel; panel < w.end_panel; ++panel) {
      if (w.skipped >> panel & 1) continue;
      const int64_t first = panel * PANEL, width = min_of(PANEL, w.V - first);
      const float* from = panels + (panel * w.K_rows + d) * PANEL;
      store_row(from, Type::float32, width, states + (bh * w.K + d) * w.V + first);
    }
  }
}

}  // namespace
}  // namespace sleepkern::SLEEPKERN_ISA
