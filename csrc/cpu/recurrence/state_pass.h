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

SLEEPKERN_STAGE void load_values(const Chunk& chunk, const Workspace& work, int64_t panel) {
  const int64_t first = panel * PANEL, width = min_of(PANEL, work.V - first);
  const bool whole = chunk.problem.v.type == Type::float32 && width == PANEL;
  for (int64_t t = 0; t < chunk.padded; ++t) {
    float* out = work.values + t * PANEL;
    if (!whole || t >= chunk.count)
      SLEEPKERN_EACH_VEC(n) store(out + n * LANES, Vec{});
    if (t >= chunk.count) continue;
    const void* row = chunk.row(chunk.problem.v, t, chunk.head * work.V + first);
    if (!whole) load_row(row, chunk.problem.v.type, width, out);
    const float* from = whole ? static_cast<const float*>(row) : out;
    const Vec b = broadcast(work.beta[t]);
    SLEEPKERN_EACH_VEC(n) store(out + n * LANES, load(from + n * LANES) * b);
  }
}

template <class E>
SLEEPKERN_STAGE void subtract_prediction(const Chunk& chunk, const Workspace& work, const Operands<E>& x) {
  const int64_t depth = steps<E>(work.K);
  for (int64_t i = 0; i < chunk.padded; i += ROWS) {
    Tile t;
    clear(t);
    multiply_add<1>(t, x.keys + column_at(i, depth), x.state, depth);
    SLEEPKERN_EACH_ROW(r) {
      const Vec by = broadcast(work.prediction_scale[i + r]);
      SLEEPKERN_EACH_VEC(n) t.at[r][n] = load(work.values + (i + r) * PANEL + n * LANES) - t.at[r][n] * by;
    }
    const float* M = work.gram_kk + column_at(i, CHUNK);
    multiply_add<-1>(t, M, work.values, i);
    substitute(t, M + i * PANEL);
    store(t, work.values + i * PANEL);
  }
}

// Stores the first `count` rows of a tile to o, for tokens from `token` on.
SLEEPKERN_INLINE void store_outputs(const Chunk& chunk, const Tile& t, int64_t token, int64_t count, int64_t first,
                                    int64_t width) {
  const Problem& problem = chunk.problem;
  const int64_t stride = problem.HV * problem.V, at = (chunk.first + token) * stride + chunk.head * problem.V + first;
  if (problem.v.type == Type::float32 && width == PANEL) {
    float* o = static_cast<float*>(problem.o) + at;
    SLEEPKERN_EACH_ROW(r) {
      if (r < count)
        SLEEPKERN_EACH_VEC(n) store(o + r * stride + n * LANES, t.at[r][n]);
    }
    return;
  }
  alignas(64) float rows[ROWS * PANEL];
  store(t, rows);
  const int64_t size = problem.v.type == Type::float32 ? 4 : 2;
  for (int64_t r = 0; r < count; ++r) {
    store_row(rows + r * PANEL, problem.v.type, width, static_cast<char*>(problem.o) + (at + r * stride) * size);
  }
}

// Computes the outputs; returns the sum of their squares with bf16x2 operands, else 0.
template <class E>
SLEEPKERN_STAGE float chunk_output(const Chunk& chunk, const Workspace& work, const Operands<E>& x, int64_t panel) {
  const int64_t depth = steps<E>(work.K), gram_depth = steps<E>(CHUNK);
  const int64_t first = panel * PANEL, width = min_of(PANEL, work.V - first);
  Vec squares{};
  for (int64_t i = 0; i < chunk.padded; i += ROWS) {
    Tile t;
    clear(t);
    multiply_add<1>(t, x.q_panels + column_at(i, depth), x.state, depth);
    scale_rows(t, work.output_scale + i);
    const E* gram_qk = x.gram_qk + column_at(i, gram_depth);
    multiply_add<1>(t, gram_qk, x.values, steps<E>(i));
    add_triangle(t, gram_qk + steps<E>(i) * PANEL, x.values + steps<E>(i) * PANEL);
    if constexpr (IS_BF16X2<E>) {
      SLEEPKERN_EACH_ROW(r)
        SLEEPKERN_EACH_VEC(n) squares += t.at[r][n] * t.at[r][n];
    }
    store_outputs(chunk, t, i, min_of(ROWS, chunk.count - i), first, width);
  }
  return IS_BF16X2<E> ? sum(squares) : 0;
}

// Updates the state. With bf16x2 operands it also stores the state to x.state and returns the sum of its squares, else
// 0.
template <class E>
SLEEPKERN_STAGE float update_state(const Chunk& chunk, const Workspace& work, const Operands<E>& x, float* state,
                                   PrefetchSchedule& prefetch) {
  Vec squares{};
  for (int64_t d = 0; d < work.K; d += ROWS) {
    Tile t;
    load(t, state + d * PANEL);
    // mutant: state-without-decay
    scale_rows(t, work.chunk_decay + d);
    multiply_add<1>(t, x.k_tails + column_at(d, steps<E>(CHUNK)), x.writes, steps<E>(chunk.count));
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
static uint32_t every_panel(const Workspace& work) {
  return static_cast<uint32_t>((uint64_t{1} << work.end_panel) - (uint64_t{1} << work.first_panel));
}

// The number of tiles of the state; `step` of an PrefetchSchedule is called once for each.
static int64_t state_tiles(const Workspace& work) {
  return (work.end_panel - work.first_panel) * ((work.K + ROWS - 1) / ROWS);
}

// One chunk: corrected values, outputs and the new state of each value panel. `prefetch` prefetches the next chunk.
template <class E>
SLEEPKERN_STAGE void state_pass(const Chunk& chunk, Workspace& work, PrefetchSchedule& prefetch) {
  for (int64_t panel = work.first_panel; panel < work.end_panel; ++panel) {
    if (work.skipped >> panel & 1) continue;
    const Operands<E> x = operands<E>(work, panel);
    Written written{};
    load_values(chunk, work, panel);
    if (chunk.problem.delta) subtract_prediction(chunk, work, x);
    if constexpr (IS_BF16X2<E>) written = values_to_bf16x2(chunk, work);
    const float output = chunk.problem.want_output ? chunk_output(chunk, work, x, panel) : 0;
    const float state = update_state(chunk, work, x, work.state + panel * work.K_rows * PANEL, prefetch);
    if (IS_BF16X2<E>) expect(work, panel, written, output, state);
  }
}

// Loads a state from the caller's row-major [bh, K, V] to panels, row by row, an order that the hardware prefetches.
// `states` == nullptr means zero. Rows beyond K, up to a whole panel, are zero and stay zero.
SLEEPKERN_STAGE void load_state(const Workspace& work, const float* states, int64_t bh, float* panels) {
  for (int64_t d = 0; d < work.K_rows; ++d) {
    for (int64_t panel = work.first_panel; panel < work.end_panel; ++panel) {
      const int64_t first = panel * PANEL, width = min_of(PANEL, work.V - first);
      const float* from = d < work.K && states ? states + (bh * work.K + d) * work.V + first : nullptr;
      float* to = panels + (panel * work.K_rows + d) * PANEL;
      const bool whole = from && width == PANEL;
      SLEEPKERN_EACH_VEC(n) store(to + n * LANES, whole ? load(from + n * LANES) : Vec{});
      if (from && !whole) load_row(from, Type::float32, width, to);
    }
  }
}

// Adds a state in the caller's layout to one in panels.
SLEEPKERN_STAGE void add_state(const Workspace& work, const float* states, int64_t bh, float* panels) {
  for (int64_t d = 0; d < work.K; ++d) {
    for (int64_t panel = work.first_panel; panel < work.end_panel; ++panel) {
      const int64_t first = panel * PANEL, width = min_of(PANEL, work.V - first);
      const float* from = states + (bh * work.K + d) * work.V + first;
      float* to = panels + (panel * work.K_rows + d) * PANEL;
      alignas(64) float row[PANEL];
      if (width != PANEL) {
        SLEEPKERN_EACH_VEC(n) store(row + n * LANES, Vec{});
        load_row(from, Type::float32, width, row);
        from = row;
      }
      SLEEPKERN_EACH_VEC(n) store(to + n * LANES, load(to + n * LANES) + load(from + n * LANES));
    }
  }
}

SLEEPKERN_STAGE void state_to_bf16x2(const Workspace& work) {
  for (int64_t panel = work.first_panel; panel < work.end_panel; ++panel) {
    const int64_t at = panel * work.K_rows * PANEL;
    rows_to_bf16x2(work.state + at, work.K_rows, work.state_bf16 + at / 2);
    Vec squares{};
    for (int64_t d = 0; d < work.K_rows * PANEL; d += LANES)
      squares += load(work.state + at + d) * load(work.state + at + d);
    work.rounding[panel] = before_any(sum(squares));
  }
}

// Stores a state from panels to the caller's layout.
SLEEPKERN_STAGE void store_state(const Workspace& work, const float* panels, int64_t bh, float* states) {
  for (int64_t d = 0; d < work.K; ++d) {
    for (int64_t panel = work.first_panel; panel < work.end_panel; ++panel) {
      if (work.skipped >> panel & 1) continue;
      const int64_t first = panel * PANEL, width = min_of(PANEL, work.V - first);
      const float* from = panels + (panel * work.K_rows + d) * PANEL;
      store_row(from, Type::float32, width, states + (bh * work.K + d) * work.V + first);
    }
  }
}

// The same past the caches, for a state that the call does not read again.
SLEEPKERN_STAGE void stream_state(const Workspace& work, const float* panels, int64_t bh, float* states) {
  float* to = states + bh * work.K * work.V;
  if (work.V % PANEL != 0 || reinterpret_cast<uintptr_t>(to) % sizeof(Vec) != 0)
    return store_state(work, panels, bh, states);
  for (int64_t d = 0; d < work.K; ++d, to += work.V) {
    for (int64_t panel = work.first_panel; panel < work.end_panel; ++panel) {
      if (work.skipped >> panel & 1) continue;
      const float* from = panels + (panel * work.K_rows + d) * PANEL;
      SLEEPKERN_EACH_VEC(n) stream(to + panel * PANEL + n * LANES, load(from + n * LANES));
    }
  }
  end_stream();
}

}  // namespace
}  // namespace sleepkern::SLEEPKERN_ISA
