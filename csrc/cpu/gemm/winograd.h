// Winograd's inner product (1968): two products by one multiplication,
//
//   x1 y1 + x2 y2 = (x1 + y2) (x2 + y1) - x1 x2 - y1 y2,
//
// because the subtracted terms belong to x alone or to y alone: a matrix product computes them once for each row and
// once for each column. This is faster on a core with adders beside its multipliers (AMD's from Zen on have two of
// each), which a product of plain multiply-adds leaves idle. Of three steps one is plain and two are such a pair: two
// multiply-adds and two additions replace three multiply-adds and keep all pipes busy, at 1.5 x the nominal peak.
//
// Rounding errors are those of |x|^2 + |y|^2 instead of 2 |x| |y|. So packing balances the two, see `Weights`.
#pragma once

#include <cstdint>
#include <type_traits>

#include "cpu/gemm/microkernel.h"
#include "cpu/simd/vec.h"

namespace sleepkern::SLEEPKERN_ISA {
namespace {

// The element of a panel whose products are computed so.
struct Winograd {
  float value;
};

template <class E>
constexpr bool IS_WINOGRAD = std::is_same_v<E, Winograd>;

constexpr int64_t TRIPLE = 3;  // steps: a plain one and a pair

SLEEPKERN_INLINE Vec load(const Winograd* p) { return load(&p->value); }

// Broadcasts as an integer: on Zen 4 a broadcast of a float from memory occupies an adder, one of an integer does not.
SLEEPKERN_INLINE Vec broadcast(const Winograd* p) {
  typedef uint32_t Bits __attribute__((may_alias));
  return reinterpret_cast<Vec>(broadcast_bits(*reinterpret_cast<const Bits*>(p)));
}

// tile += left^T right over `depth` steps from a multiple of TRIPLE on, without the sums that belong to one side.
template <int SIGN, int WIDTH, int HEIGHT>
SLEEPKERN_INLINE void multiply_add(TileOf<HEIGHT>& t, const Winograd* left, const Winograd* right, int64_t depth) {
  static_assert(SIGN > 0, "a difference would want other sums");
  for (; depth >= TRIPLE; depth -= TRIPLE, left += TRIPLE * WIDTH, right += TRIPLE * PANEL) {
    Vec b[TRIPLE][VECS];
    SLEEPKERN_EACH_OF(TRIPLE, i)
      SLEEPKERN_EACH_VEC(n) b[i][n] = load(right + i * PANEL + n * LANES);
    SLEEPKERN_EACH_OF(HEIGHT, r) {
      const Vec a0 = broadcast(left + r), a1 = broadcast(left + WIDTH + r), a2 = broadcast(left + 2 * WIDTH + r);
      SLEEPKERN_EACH_VEC(n) {
        t.at[r][n] += a0 * b[0][n];
        t.at[r][n] += (a1 + b[2][n]) * (a2 + b[1][n]);
      }
    }
  }
  multiply_add<SIGN, WIDTH>(t, &left->value, &right->value, depth);
}

// The term of one side alone: for LANES columns of a panel, minus the sum of each pair's product. It is summed in the
// order of a tile, which adds it last. So where the other side is zero, the result is exactly zero.
SLEEPKERN_INLINE Vec pair_sums(const Winograd* columns, int64_t depth) {
  Vec sum{};
  for (int64_t d = 0; d + TRIPLE <= depth; d += TRIPLE) {
    sum -= load(columns + (d + 1) * PANEL) * load(columns + (d + 2) * PANEL);
  }
  return sum;
}

// Adds the pair sums of a tile's rows (`left`) and of its columns (`right`).
template <int HEIGHT>
SLEEPKERN_INLINE void add_pair_sums(TileOf<HEIGHT>& t, const float* left, const float* right) {
  SLEEPKERN_EACH_OF(HEIGHT, r)
    SLEEPKERN_EACH_VEC(n) t.at[r][n] += broadcast(left[r]) + load(right + n * LANES);
}

}  // namespace
}  // namespace sleepkern::SLEEPKERN_ISA
