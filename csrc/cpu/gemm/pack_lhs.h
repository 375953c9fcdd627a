// Activations as left operands: micro-panels over their rows, [rows / ROWS][depth][ROWS]. A tile reads one micro-panel
// from its first step to its last, every cache line whole; of a panel it would read a part of every line.
#pragma once

#include <cstdint>
#include <utility>

#include "cpu/gemm/microkernel.h"
#include "cpu/gemm/winograd.h"
#include "cpu/simd/bf16.h"
#include "cpu/simd/vec.h"

namespace sleepkern::SLEEPKERN_ISA {
namespace {

typedef float MicroPanel __attribute__((vector_size(ROWS * 4)));
typedef float MicroPanelUnaligned __attribute__((vector_size(ROWS * 4), aligned(4), may_alias));

template <int FROM, int... LANE>
SLEEPKERN_INLINE void store_lanes(float* to, Vec x, std::integer_sequence<int, LANE...>) {
  *reinterpret_cast<MicroPanelUnaligned*>(to) = __builtin_shufflevector(x, x, (FROM + LANE)...);
}

// Stores ROWS rows of LANES steps as LANES steps of a micro-panel. The squares of ROWS x ROWS that are side by side in
// the rows are transposed together.
SLEEPKERN_INLINE void store_transposed(Vec (&rows)[ROWS], float* micro_panel) {
  constexpr auto lanes = std::make_integer_sequence<int, ROWS>();
  transpose_step<1>(rows);
  transpose_step<2>(rows);
  if constexpr (ROWS >= 8) transpose_step<4>(rows);
  SLEEPKERN_EACH_ROW(r) {
    store_lanes<0>(micro_panel + r * ROWS, rows[r], lanes);
    if constexpr (LANES > ROWS) store_lanes<LANES - ROWS>(micro_panel + (ROWS + r) * ROWS, rows[r], lanes);
  }
}
static_assert(LANES <= 2 * ROWS, "squares of a vector");

// Up to LANES elements of a row times its factor, then zeros. A row with factor 0 is not read.
SLEEPKERN_INLINE void scaled_part(const float* row, int64_t n, float factor, float* out) {
  if (n >= LANES) return store(out, factor == 0 ? Vec{} : load(row) * factor);
  store(out, Vec{});
  for (int64_t i = 0; factor != 0 && i < n; ++i) out[i] = row[i] * factor;
}

// LANES steps of a row, each element times factor, as bits.
template <class E>
SLEEPKERN_INLINE Vec scaled_steps(const float* row, float factor) {
  if constexpr (IS_BF16X2<E>) {
    return reinterpret_cast<Vec>(bf16x2_of(load(row) * factor, load(row + LANES) * factor));
  } else {
    return load(row) * factor;
  }
}

// Packs ROWS rows of n elements, `stride` apart, each times factor[row], as a micro-panel.
template <class E>
SLEEPKERN_STAGE void pack_micro_panel(const float* rows, int64_t stride, int64_t n, const float* factor,
                                      E* micro_panel) {
  constexpr int64_t WIDTH = IS_BF16X2<E> ? 2 * LANES : LANES;
  const int64_t depth = steps<E>(n);
  float* to = reinterpret_cast<float*>(micro_panel);
  bool all_there = true;
  for (int r = 0; r < ROWS; ++r) all_there = all_there && factor[r] != 0;
  for (int64_t d = 0, at = 0; d < depth; d += LANES, at += WIDTH) {
    Vec block[ROWS];
    if (all_there && at + WIDTH <= n) {
      SLEEPKERN_EACH_ROW(r) block[r] = scaled_steps<E>(rows + r * stride + at, factor[r]);
    } else {
      SLEEPKERN_EACH_ROW(r) {
        alignas(64) float part[WIDTH];
        for (int64_t i = 0; i < WIDTH; i += LANES) {
          scaled_part(rows + r * stride + at + i, n - at - i, factor[r], part + i);
        }
        block[r] = scaled_steps<E>(part, 1.0f);
      }
    }
    if (d + LANES <= depth) {
      store_transposed(block, to + d * ROWS);
    } else {
      alignas(64) float last[LANES * ROWS];
      store_transposed(block, last);
      copy_tail(to + d * ROWS, last, (depth - d) * ROWS);
    }
  }
}

// Pair sums (winograd.h) of `count` micro-panels, four at a time: one alone would wait for its additions.
SLEEPKERN_STAGE void sum_pairs(const Winograd* micro_panels, int64_t count, int64_t depth, float* sums) {
  constexpr int TOGETHER = 4;
  for (int64_t first = 0; first < count; first += TOGETHER) {
    MicroPanel sum[TOGETHER] = {};
    const float* at[TOGETHER];
    SLEEPKERN_EACH_OF(TOGETHER, i) at[i] = &micro_panels[min_of(first + i, count - 1) * depth * ROWS].value;
    const auto row = [&](int i, int64_t d) { return *reinterpret_cast<const MicroPanelUnaligned*>(at[i] + d * ROWS); };
    for (int64_t d = 0; d + TRIPLE <= depth; d += TRIPLE) {
      SLEEPKERN_EACH_OF(TOGETHER, i) sum[i] -= row(i, d + 1) * row(i, d + 2);
    }
    for (int64_t i = 0; i < min_of(TOGETHER, count - first); ++i) {
      *reinterpret_cast<MicroPanelUnaligned*>(sums + (first + i) * ROWS) = sum[i];
    }
  }
}

}  // namespace
}  // namespace sleepkern::SLEEPKERN_ISA
