// Winograd's inner product (1968): two products by one multiplication,
//
//   x1 y1 + x2 y2 = (x1 + y2) (x2 + y1) - x1 x2 - y1 y2,
//
// for what is subtracted belongs to x alone or to y alone: a matrix product takes it once a row and once a column. It
// pays on a core whose adders stand beside its multipliers (AMD's, from Zen on: two of each), which a product of plain
// multiply-adds leaves idle. Of three steps one is plain and two are such a pair: two multiply-adds and two additions
// instead of three multiply-adds, all pipes busy, 1.5 x what is called the peak.
//
// Rounding: errors are those of |x|^2 + |y|^2 instead of 2 |x| |y|. So who packs balances the two, see `Weights`.
#pragma once

#include <cstdint>
#include <type_traits>

#include "cpu/gemm/microkernel.h"
#include "cpu/simd/vec.h"

namespace sleepkern::SLEEPKERN_ISA {
namespace {

// What a panel is made of whose products are taken so.
struct Winograd {
  float value;
};

template <class E>
constexpr bool IS_WINOGRAD = std::is_same_v<E, Winograd>;

constexpr int64_t TRIPLE = 3;  // steps: a plain one and a pair

SLEEPKERN_INLINE Vec load(const Winograd* p) { return load(&p->value); }

// By way of integers: on Zen 4 a broadcast of a float from memory takes a turn of an adder, one of an integer does not.
SLEEPKERN_INLINE Vec broadcast(const Winograd* p) {
  typedef uint32_t Bits __attribute__((may_alias));
  return reinterpret_cast<Vec>(broadcast_bits(*reinterpret_cast<const Bits*>(p)));
}

// tile += left^T right over `depth` steps from a multiple of TRIPLE on, but for the sums that belong to one side.
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

// What belongs to one side alone: of LANES columns of a panel, minus the sum of each pair's product. In the order of a
// tile, which adds it last: so where the other side is zero, the result is, to the bit.
SLEEPKERN_INLINE Vec pair_sums(const Winograd* columns, int64_t depth) {
  Vec sum{};
  for (int64_t d = 0; d + TRIPLE <= depth; d += TRIPLE) {
    sum -= load(columns + (d + 1) * PANEL) * load(columns + (d + 2) * PANEL);
  }
  return sum;
}

// left: pair sums of the tile's rows; right: of its columns.
template <int HEIGHT>
SLEEPKERN_INLINE void add_pair_sums(TileOf<HEIGHT>& t, const float* left, const float* right) {
  SLEEPKERN_EACH_OF(HEIGHT, r)
    SLEEPKERN_EACH_VEC(n) t.at[r][n] += broadcast(left[r]) + load(right + n * LANES);
}

}  // namespace
}  // namespace sleepkern::SLEEPKERN_ISA
