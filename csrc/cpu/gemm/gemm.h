// Products of activations with packed weights, by the micro-kernel of microkernel.h. E is float, Winograd, or Bf16x2
// for bfloat16.
//
// Weights are stored in panels over their outputs, [n / PANEL][depth][PANEL], activations x in micro-panels
// (pack_lhs.h). A panel of weights stays in L2 while all micro-panels of a group of rows are multiplied by it, and a
// tile sums over the whole depth at once. The product prefetches the next panel of weights, which follows in memory.
#pragma once

#include <cmath>
#include <cstdint>

#include "common/blocks.h"
#include "cpu/gemm/microkernel.h"
#include "cpu/gemm/pack_lhs.h"
#include "cpu/gemm/winograd.h"
#include "cpu/simd/bf16.h"
#include "cpu/simd/vec.h"

namespace sleepkern::SLEEPKERN_ISA {
namespace {

constexpr int64_t LINE = 16;  // floats of a cache line
// The steps of a tile between two prefetches. A burst of prefetches would delay the tile's own loads.
constexpr int64_t PREFETCH_STEPS = TRIPLE;

template <class E>
struct Product {
  const E* x;                  // micro-panels of `rows` rows
  const E* weight;             // panels of `width` outputs
  int64_t rows, width, depth;  // width is a multiple of PANEL; depth counts steps
  const float* x_sums;         // [rows, up to whole micro-panels] pair sums of x, where E is Winograd
  void* y;                     // float, row-major; or E, in micro-panels
  int64_t stride;              // of row-major y

  // The pair sums of the weights are stored after them.
  const float* weight_sums() const { return reinterpret_cast<const float*>(weight + width * depth); }
};

// Prefetches the next panel of weights, a share of it at each step. It issues two cache lines a step without a check
// whether they are new: a branch would cost more than a line that is prefetched twice. With fewer than three tiles a
// share is more than two lines, and the rest is left to the hardware prefetcher.
struct WeightPrefetch {
  const char* next;
  int64_t share;

  template <class E>
  WeightPrefetch(const Product<E>& p, int64_t panel)
      : next(reinterpret_cast<const char*>(p.weight + (panel + 1) * p.depth * PANEL)) {
    const int64_t times = (p.rows + ROWS - 1) / ROWS * (p.depth / PREFETCH_STEPS + 1);
    share = (p.depth * PANEL * static_cast<int64_t>(sizeof(E)) + times - 1) / times;
  }
  void step() {
    __builtin_prefetch(next, 0, 3);
    __builtin_prefetch(next + 64, 0, 3);
    next += share;
  }
};

// Adds a product to a tile, and prefetches weights between the multiplications.
template <int HEIGHT, class E>
SLEEPKERN_INLINE void accumulate(TileOf<HEIGHT>& t, const E* left, const E* right, int64_t depth,
                                 WeightPrefetch& prefetch) {
  for (; depth >= PREFETCH_STEPS;
       depth -= PREFETCH_STEPS, left += PREFETCH_STEPS * ROWS, right += PREFETCH_STEPS * PANEL) {
    multiply_add<1, ROWS>(t, left, right, PREFETCH_STEPS);
    prefetch.step();
  }
  multiply_add<1, ROWS>(t, left, right, depth);
}

SLEEPKERN_INLINE Vec squared_relu(Vec z) {
  return z * reinterpret_cast<Vec>(reinterpret_cast<BitVec>(z) & reinterpret_cast<BitVec>(z > Vec{}));
}

// Stores relu(.)^2 of PANEL columns of HEIGHT rows as steps of a micro-panel, with zeros below them.
template <class E, int HEIGHT>
SLEEPKERN_INLINE void store_squares(TileOf<HEIGHT>& t, E* micro_panel) {
  float* to = reinterpret_cast<float*>(micro_panel);
  SLEEPKERN_EACH_OF(HEIGHT, r)
    SLEEPKERN_EACH_VEC(n) t.at[r][n] = squared_relu(t.at[r][n]);
  if constexpr (IS_BF16X2<E>) {
    Vec rows[ROWS] = {};
    SLEEPKERN_EACH_OF(HEIGHT, r) rows[r] = reinterpret_cast<Vec>(bf16x2_of(t.at[r][0], t.at[r][1]));
    store_transposed(rows, to);
  } else {
    SLEEPKERN_EACH_VEC(n) {
      Vec rows[ROWS] = {};
      SLEEPKERN_EACH_OF(HEIGHT, r) rows[r] = t.at[r][n];
      store_transposed(rows, to + n * LANES * ROWS);
    }
  }
}

// What a product does with its result: it stores it to y or adds it to y, both row-major, or it stores relu(.)^2 in
// micro-panels.
enum class Epilogue { store, add_residual, relu_squared };

// Prefetches the memory that a tile will write or be added to: without it the tile would wait at its end.
template <int64_t COUNT>
SLEEPKERN_INLINE void prefetch_output(const float* to) {
  for (int64_t i = 0; i < COUNT; i += LINE) __builtin_prefetch(to + i, 1, 3);
}

// Multiplies HEIGHT rows from `row` on, the first of a micro-panel, by panel number `panel` of the weights.
template <Epilogue EPILOGUE, int HEIGHT, class E>
SLEEPKERN_INLINE void multiply_tile(const Product<E>& p, int64_t panel, int64_t row, WeightPrefetch& prefetch) {
  float* y = static_cast<float*>(p.y) + row * p.stride + panel * PANEL;
  E* micro_panel = static_cast<E*>(p.y) + row * steps<E>(p.width) + steps<E>(panel * PANEL) * ROWS;
  if constexpr (EPILOGUE == Epilogue::relu_squared) {
    prefetch_output<steps<E>(PANEL) * ROWS>(reinterpret_cast<const float*>(micro_panel));
  } else {
    SLEEPKERN_EACH_OF(HEIGHT, r) prefetch_output<PANEL>(y + r * p.stride);
  }
  TileOf<HEIGHT> t;
  clear(t);
  accumulate(t, p.x + row * p.depth, p.weight + panel * p.depth * PANEL, p.depth, prefetch);
  if constexpr (IS_WINOGRAD<E>) add_pair_sums(t, p.x_sums + row, p.weight_sums() + panel * PANEL);
  if constexpr (EPILOGUE == Epilogue::relu_squared) {
    store_squares(t, micro_panel);
  } else {
    if (EPILOGUE == Epilogue::add_residual) add(t, y, p.stride);
    store(t, y, p.stride);
  }
}

// Multiplies all rows by panel number `panel` of the weights. The last tile has only the quarters that hold rows, and
// no fewer than two.
template <Epilogue EPILOGUE, class E>
SLEEPKERN_STAGE void multiply_panel(const Product<E>& p, int64_t panel) {
  WeightPrefetch prefetch(p, panel);
  int64_t row = 0;
  for (; row + ROWS / 4 * 3 < p.rows; row += ROWS) multiply_tile<EPILOGUE, ROWS>(p, panel, row, prefetch);
  if (row + ROWS / 2 < p.rows) {
    multiply_tile<EPILOGUE, ROWS / 4 * 3>(p, panel, row, prefetch);
  } else if (row < p.rows) {
    multiply_tile<EPILOGUE, ROWS / 2>(p, panel, row, prefetch);
  }
}

// (mean of squares + eps)^-1/2 of n elements.
SLEEPKERN_INLINE float rms_factor(const float* row, int64_t n, float eps) {
  Vec squares{};
  int64_t d = 0;
  for (; d + LANES <= n; d += LANES) squares += load(row + d) * load(row + d);
  float total = sum(squares);
  for (; d < n; ++d) total += row[d] * row[d];
  return 1 / std::sqrt(total / n + eps);
}

template <class E>
SLEEPKERN_INLINE void pack_outputs(const float* matrix, int64_t n, int64_t depth, E* packed) {
  auto weight = [&](int64_t i, int64_t d) { return i < n && d < depth ? matrix[i * depth + d] : 0.0f; };
  const int64_t width = round_up(n, PANEL);
  for (int64_t i = 0; i < width; ++i) {
    E* to = packed + column_at(i, steps<E>(depth));
    for (int64_t d = 0; d < steps<E>(depth); ++d) {
      if constexpr (IS_BF16X2<E>) {
        to[d * PANEL] = {interleave(broadcast(weight(i, 2 * d)), broadcast(weight(i, 2 * d + 1)))[0]};
      } else {
        to[d * PANEL] = {weight(i, d)};
      }
    }
  }
  if constexpr (IS_WINOGRAD<E>) {
    float* sums = reinterpret_cast<float*>(packed + width * depth);
    for (int64_t i = 0; i < width; i += LANES) store(sums + i, pair_sums(packed + column_at(i, depth), depth));
  }
}

int64_t packed_size(int64_t n, int64_t depth, Form form) {
  const int64_t width = round_up(n, PANEL);
  if (form == Form::bfloat16) return width * steps<Bf16x2>(depth);
  return width * (form == Form::winograd ? depth + 1 : depth);
}

void pack_matrix(const float* matrix, int64_t n, int64_t depth, Form form, void* packed) {
  switch (form) {
    case Form::plain:
      return pack_outputs(matrix, n, depth, static_cast<float*>(packed));
    case Form::winograd:
      return pack_outputs(matrix, n, depth, static_cast<Winograd*>(packed));
    case Form::bfloat16:
      if (DOTS) pack_outputs(matrix, n, depth, static_cast<Bf16x2*>(packed));
  }
}

}  // namespace
}  // namespace sleepkern::SLEEPKERN_ISA
