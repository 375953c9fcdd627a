// Products of bfloat16. A lane of 32 bits holds two neighbours of the depth, the earlier one in its low half. One step
// of a product takes both, sum + low low + high high, with sums in float32: that halves the steps and the bytes of a
// product of floats. With SLEEPKERN_BFLOAT16_DOT the machine has one instruction for it.
#pragma once

#include <cstdint>
#include <type_traits>

#include "cpu/simd/vec.h"

namespace sleepkern::SLEEPKERN_ISA {
namespace {

#ifdef SLEEPKERN_BFLOAT16_DOT
constexpr bool DOTS = true;
#else
constexpr bool DOTS = false;
#endif

// The element of a panel where operands are bfloat16; elsewhere it is float.
struct Bf16x2 {
  uint32_t bits;
};

typedef uint32_t BitVecUnaligned __attribute__((vector_size(LANES * 4), aligned(4), may_alias));

template <class E>
constexpr bool IS_BF16X2 = std::is_same_v<E, Bf16x2>;

// The steps of a product over a depth of n.
template <class E>
SLEEPKERN_INLINE constexpr int64_t steps(int64_t n) {
  return IS_BF16X2<E> ? (n + 1) / 2 : n;
}

SLEEPKERN_INLINE BitVec load(const Bf16x2* p) { return *reinterpret_cast<const BitVecUnaligned*>(p); }
SLEEPKERN_INLINE void store(Bf16x2* p, BitVec x) { *reinterpret_cast<BitVecUnaligned*>(p) = x; }

// Words whose low halves come from `low` and whose high halves come from `high`.
SLEEPKERN_INLINE BitVec interleave(Vec low, Vec high) {
#ifdef __AVX512BF16__
  const __m512bh halves = _mm512_cvtne2ps_pbh(reinterpret_cast<__m512>(high), reinterpret_cast<__m512>(low));
  const __m512i order = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8, 23, 7, 22, 6, 21,
                                         5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
  return reinterpret_cast<BitVec>(_mm512_permutexvar_epi16(order, reinterpret_cast<__m512i>(halves)));
#else
  return __builtin_convertvector(to_bfloat16(low), BitVec) | __builtin_convertvector(to_bfloat16(high), BitVec) << 16;
#endif
}

// 2 LANES elements as words of two neighbours each.
SLEEPKERN_INLINE BitVec bf16x2_of(Vec first, Vec second) {
#ifdef __AVX512BF16__
  return reinterpret_cast<BitVec>(
      _mm512_cvtne2ps_pbh(reinterpret_cast<__m512>(second), reinterpret_cast<__m512>(first)));
#else
  alignas(64) uint16_t halves[2 * LANES];
  *reinterpret_cast<HalfVecUnaligned*>(halves) = to_bfloat16(first);
  *reinterpret_cast<HalfVecUnaligned*>(halves + LANES) = to_bfloat16(second);
  return *reinterpret_cast<const BitVecUnaligned*>(halves);
#endif
}

// The same of 2 LANES floats in memory.
SLEEPKERN_INLINE BitVec load_bf16x2(const float* p) { return bf16x2_of(load(p), load(p + LANES)); }

SLEEPKERN_INLINE Vec dot(Vec sum, BitVec a, BitVec b) {
#ifdef __AVX512BF16__
  return reinterpret_cast<Vec>(
      _mm512_dpbf16_ps(reinterpret_cast<__m512>(sum), reinterpret_cast<__m512bh>(a), reinterpret_cast<__m512bh>(b)));
#else
  sum += reinterpret_cast<Vec>(a << 16) * reinterpret_cast<Vec>(b << 16);
  return sum + reinterpret_cast<Vec>(a & 0xffff0000u) * reinterpret_cast<Vec>(b & 0xffff0000u);
#endif
}

// sum + sign * a b; a is broadcast to all lanes.
template <int SIGN>
SLEEPKERN_INLINE Vec multiply_add(Vec sum, float a, Vec b) {
  return SIGN > 0 ? sum + broadcast(a) * b : sum - broadcast(a) * b;
}

template <int SIGN>
SLEEPKERN_INLINE Vec multiply_add(Vec sum, Bf16x2 a, BitVec b) {
  static_assert(SIGN > 0, "there is no instruction that subtracts");
  return dot(sum, broadcast_bits(a.bits), b);
}

}  // namespace
}  // namespace sleepkern::SLEEPKERN_ISA
