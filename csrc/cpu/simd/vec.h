// The vector type and its operations. The including ISA file sets LANES and the namespace. The source uses the
// compilers' vector extensions, so it compiles to SSE, AVX2, AVX-512 or NEON, and every width runs anywhere.
//
// Everything is `static` or a template on types of that namespace: an inline function shared between ISA files would
// let the linker hand AVX code to a machine without it.
#pragma once

#ifdef __F16C__
#include <immintrin.h>
#endif

#include <cstdint>
#include <cstring>
#include <utility>

#include "common/types.h"

namespace sleepkern::SLEEPKERN_ISA {
namespace {

constexpr int LANES = SLEEPKERN_LANES;

typedef float Vec __attribute__((vector_size(LANES * 4)));
// A vector in memory at any address.
typedef float VecUnaligned __attribute__((vector_size(LANES * 4), aligned(1), may_alias));
typedef int32_t IntVec __attribute__((vector_size(LANES * 4)));
typedef uint32_t BitVec __attribute__((vector_size(LANES * 4)));
typedef double DoubleVec __attribute__((vector_size(LANES * 8)));
typedef double DoubleVecUnaligned __attribute__((vector_size(LANES * 8), aligned(8), may_alias));
typedef uint16_t HalfVec __attribute__((vector_size(LANES * 2)));
typedef uint16_t HalfVecUnaligned __attribute__((vector_size(LANES * 2), aligned(1), may_alias));

// A stage is never inlined. Stages inlined into one function run out of registers, and then fetch the address of the
// thread-local workspace again in every tile.
#define SLEEPKERN_STAGE static __attribute__((noinline))
#define SLEEPKERN_INLINE static inline __attribute__((always_inline))

// These replace std::min and std::max, which are templates that all ISA files would share (see the top of the file).
SLEEPKERN_INLINE constexpr int64_t min_of(int64_t a, int64_t b) { return a < b ? a : b; }
SLEEPKERN_INLINE constexpr int64_t max_of(int64_t a, int64_t b) { return a < b ? b : a; }
SLEEPKERN_INLINE constexpr int64_t round_up(int64_t n, int64_t multiple) {
  return (n + multiple - 1) / multiple * multiple;
}

SLEEPKERN_INLINE Vec load(const float* p) { return *reinterpret_cast<const VecUnaligned*>(p); }
SLEEPKERN_INLINE void store(float* p, Vec x) { *reinterpret_cast<VecUnaligned*>(p) = x; }
// Stores past the caches, so that what they hold stays there; p is a multiple of a vector's size. Other threads see the
// values after end_stream().
SLEEPKERN_INLINE void stream(float* p, Vec x) {
#if SLEEPKERN_LANES == 16 && defined(__AVX512F__)
  _mm512_stream_ps(p, reinterpret_cast<__m512>(x));
#elif SLEEPKERN_LANES == 8 && defined(__F16C__)
  _mm256_stream_ps(p, reinterpret_cast<__m256>(x));
#else
  store(p, x);
#endif
}
SLEEPKERN_INLINE void end_stream() {
#ifdef __F16C__
  _mm_sfence();
#endif
}
SLEEPKERN_INLINE DoubleVec load_double(const double* p) { return *reinterpret_cast<const DoubleVecUnaligned*>(p); }
SLEEPKERN_INLINE Vec narrow(DoubleVec x) { return __builtin_convertvector(x, Vec); }
SLEEPKERN_INLINE Vec broadcast(float x) { return x - Vec{}; }
SLEEPKERN_INLINE BitVec broadcast_bits(uint32_t x) { return x - BitVec{}; }
// The lanes' numbers 0, 1, 2, ...
SLEEPKERN_INLINE IntVec lane_numbers() {
  IntVec n{};
  for (int l = 0; l < LANES; ++l) n[l] = l;
  return n;
}
SLEEPKERN_INLINE BitVec select(BitVec mask, BitVec a, BitVec b) { return (mask & a) | (~mask & b); }

template <int STEP, int... LANE>
SLEEPKERN_INLINE Vec add_from(Vec x, std::integer_sequence<int, LANE...>) {
  return x + __builtin_shufflevector(x, x, (LANE ^ STEP)...);
}

// The sum of all lanes, by halves: adding lane after lane would wait for 15 additions.
SLEEPKERN_INLINE float sum(Vec x) {
  constexpr auto lanes = std::make_integer_sequence<int, LANES>();
  if constexpr (LANES >= 16) x = add_from<8>(x, lanes);
  if constexpr (LANES >= 8) x = add_from<4>(x, lanes);
  x = add_from<2>(x, lanes);
  return x[0] + x[1];
}

// exp for x <= 0, relative error 2e-7; 0 below -87, where float32 would be subnormal.
// x = n ln2 + f: 2^n by the exponent bits, exp(f) by a polynomial of degree 6 (Cephes).
SLEEPKERN_INLINE Vec exp_nonpositive(Vec x) {
  const float round_to_int = 12582912.0f;     // 1.5 * 2^23: adding it leaves the rounded integer in the low bits
  const IntVec gone = x < broadcast(-87.0f);  // false for NaN, which stays NaN
  x = gone ? Vec{} : x;
  Vec shifted = x * 1.44269504f + round_to_int;
  Vec n = shifted - round_to_int;
  Vec f = x - n * 0.693359375f;
  f = f + n * 2.12194440e-4f;
  Vec y = broadcast(1.9875691500e-4f);
  y = y * f + 1.3981999507e-3f;
  y = y * f + 8.3334519073e-3f;
  y = y * f + 4.1665795894e-2f;
  y = y * f + 1.6666665459e-1f;
  y = y * f + 5.0000001201e-1f;
  y = y * (f * f) + f + 1.0f;
  BitVec power = (reinterpret_cast<BitVec>(shifted) << 23) + broadcast_bits(127u << 23);
  return gone ? Vec{} : y * reinterpret_cast<Vec>(power);
}

// 1 / x for x from 1 to 2. AVX-512 estimates it, and one step of Newton's method leaves an error of one or two units in
// the last place.
SLEEPKERN_INLINE Vec reciprocal(Vec x) {
#if SLEEPKERN_LANES == 16 && defined(__AVX512F__)
  const Vec y = reinterpret_cast<Vec>(_mm512_maskz_rcp14_ps(0xffff, reinterpret_cast<__m512>(x)));
  return y * (2.0f - x * y);
#else
  return 1.0f / x;
#endif
}

// x, or 0 where |x| is below the normal range.
SLEEPKERN_INLINE Vec flush_subnormal(Vec x) {
  BitVec u = reinterpret_cast<BitVec>(x);
  BitVec normal = reinterpret_cast<BitVec>((u & 0x7fffffffu) >= 0x00800000u);
  return reinterpret_cast<Vec>(u & normal);
}

// gcc 12 takes four instructions to widen or narrow eight elements where AVX2 has one or two.
#if SLEEPKERN_LANES == 8 && defined(__AVX2__)
SLEEPKERN_INLINE BitVec widen_bits(HalfVec h) {
  return reinterpret_cast<BitVec>(_mm256_cvtepu16_epi32(reinterpret_cast<__m128i>(h)));
}
SLEEPKERN_INLINE HalfVec low_halves(BitVec x) {
  const __m256i bits = reinterpret_cast<__m256i>(x);
  return reinterpret_cast<HalfVec>(_mm_packus_epi32(_mm256_castsi256_si128(bits), _mm256_extracti128_si256(bits, 1)));
}
#else
SLEEPKERN_INLINE BitVec widen_bits(HalfVec h) { return __builtin_convertvector(h, BitVec); }
SLEEPKERN_INLINE HalfVec low_halves(BitVec x) { return __builtin_convertvector(x, HalfVec); }
#endif

SLEEPKERN_INLINE Vec from_bfloat16(HalfVec h) { return reinterpret_cast<Vec>(widen_bits(h) << 16); }

// Rounds to nearest even; NaN stays NaN.
SLEEPKERN_INLINE HalfVec to_bfloat16(Vec x) {
  BitVec u = reinterpret_cast<BitVec>(x);
  // mutant: bfloat16-truncated
  BitVec rounded = (u + 0x7fffu + ((u >> 16) & 1u)) >> 16;
  return low_halves(x != x ? broadcast_bits(0x7fc0u) : rounded);
}

// An element of a state of bfloat16.
struct Bf16 {
  uint16_t bits;
};

SLEEPKERN_INLINE Vec load(const Bf16* p) { return from_bfloat16(*reinterpret_cast<const HalfVecUnaligned*>(p)); }
SLEEPKERN_INLINE void store(Bf16* p, Vec x) { *reinterpret_cast<HalfVecUnaligned*>(p) = to_bfloat16(x); }

// The masks keep all lanes. gcc's plain intrinsics read a register that its header never sets, and gcc warns of that.
#if SLEEPKERN_LANES == 16 && defined(__AVX512F__)
SLEEPKERN_INLINE Vec from_float16(HalfVec h) {
  return reinterpret_cast<Vec>(_mm512_maskz_cvtph_ps(0xffff, reinterpret_cast<__m256i>(h)));
}
SLEEPKERN_INLINE HalfVec to_float16(Vec x) {
  return reinterpret_cast<HalfVec>(
      _mm512_maskz_cvtps_ph(0xffff, reinterpret_cast<__m512>(x), _MM_FROUND_TO_NEAREST_INT));
}
#elif SLEEPKERN_LANES == 8 && defined(__F16C__)
SLEEPKERN_INLINE Vec from_float16(HalfVec h) {
  return reinterpret_cast<Vec>(_mm256_cvtph_ps(reinterpret_cast<__m128i>(h)));
}
SLEEPKERN_INLINE HalfVec to_float16(Vec x) {
  return reinterpret_cast<HalfVec>(_mm256_cvtps_ph(reinterpret_cast<__m256>(x), _MM_FROUND_TO_NEAREST_INT));
}
#else
// A product with 2^112 moves the exponent and normalises subnormals. inf and NaN then get their exponent back.
SLEEPKERN_INLINE Vec from_float16(HalfVec h) {
  BitVec u = __builtin_convertvector(h, BitVec);
  BitVec sign = (u & 0x8000u) << 16, rest = (u & 0x7fffu) << 13;
  BitVec scaled = reinterpret_cast<BitVec>(reinterpret_cast<Vec>(rest) * 0x1p112f);
  BitVec special = reinterpret_cast<BitVec>((u & 0x7c00u) == 0x7c00u);
  return reinterpret_cast<Vec>(sign | scaled | (special & 0x7f800000u));
}

// Rounds to nearest even. A value that is too large becomes inf, and NaN stays NaN. A subnormal rounds by adding 0.5,
// whose last bit has the weight of the subnormal's.
SLEEPKERN_INLINE HalfVec to_float16(Vec x) {
  BitVec u = reinterpret_cast<BitVec>(x), sign = u & 0x80000000u;
  u = u ^ sign;
  BitVec half = broadcast_bits(126u << 23);
  BitVec tiny = reinterpret_cast<BitVec>(reinterpret_cast<Vec>(u) + reinterpret_cast<Vec>(half)) - half;
  BitVec normal = (u + ((uint32_t)(15 - 127) << 23) + 0xfffu + ((u >> 13) & 1u)) >> 13;
  BitVec nan = reinterpret_cast<BitVec>(u > 0x7f800000u);
  BitVec huge = select(nan, broadcast_bits(0x7e00u), broadcast_bits(0x7c00u));
  BitVec is_tiny = reinterpret_cast<BitVec>(u < (113u << 23));
  BitVec is_huge = reinterpret_cast<BitVec>(u >= (143u << 23));
  BitVec bits = select(is_huge, huge, select(is_tiny, tiny, normal)) | (sign >> 16);
  return __builtin_convertvector(bits, HalfVec);
}
#endif

// Copies n < LANES elements one by one: a memcpy of unknown size would be a call into libc.
template <class T>
SLEEPKERN_INLINE void copy_tail(T* to, const T* from, int64_t n) {
  for (int64_t i = 0; i < n; ++i) std::memcpy(to + i, from + i, sizeof(T));
}

SLEEPKERN_INLINE Vec widen(HalfVec h, Type type) { return type == Type::bfloat16 ? from_bfloat16(h) : from_float16(h); }

// Converts n elements to float; dst has room up to a multiple of LANES.
SLEEPKERN_INLINE void load_row(const void* src, Type type, int64_t n, float* dst) {
  int64_t i = 0;
  if (type == Type::float32) {
    const float* p = static_cast<const float*>(src);
    for (; i + LANES <= n; i += LANES) store(dst + i, load(p + i));
    return copy_tail(dst + i, p + i, n - i);
  }
  const uint16_t* p = static_cast<const uint16_t*>(src);
  for (; i + LANES <= n; i += LANES) {
    store(dst + i, widen(*reinterpret_cast<const HalfVecUnaligned*>(p + i), type));
  }
  if (i == n) return;
  uint16_t tail[LANES] = {};
  copy_tail(tail, p + i, n - i);
  store(dst + i, widen(*reinterpret_cast<const HalfVecUnaligned*>(tail), type));
}

// Converts n floats to a type; src is readable up to a multiple of LANES.
SLEEPKERN_INLINE void store_row(const float* src, Type type, int64_t n, void* dst) {
  int64_t i = 0;
  if (type == Type::float32) {
    float* p = static_cast<float*>(dst);
    for (; i + LANES <= n; i += LANES) store(p + i, load(src + i));
    return copy_tail(p + i, src + i, n - i);
  }
  uint16_t* p = static_cast<uint16_t*>(dst);
  for (; i < n; i += LANES) {
    const Vec x = load(src + i);
    const HalfVec h = type == Type::bfloat16 ? to_bfloat16(x) : to_float16(x);
    if (i + LANES <= n) {
      *reinterpret_cast<HalfVecUnaligned*>(p + i) = h;
    } else {
      uint16_t tail[LANES];
      *reinterpret_cast<HalfVecUnaligned*>(tail) = h;
      copy_tail(p + i, tail, n - i);
    }
  }
}

static float load_scalar(const void* src, Type type, int64_t i) {
  alignas(64) float x[LANES];
  if (type == Type::float32) {
    std::memcpy(x, static_cast<const float*>(src) + i, sizeof(float));
    return x[0];
  }
  load_row(static_cast<const uint16_t*>(src) + i, type, 1, x);
  return x[0];
}

template <int STEP, int... LANE>
SLEEPKERN_INLINE void swap_halves(Vec& a, Vec& b, std::integer_sequence<int, LANE...>) {
  Vec low = __builtin_shufflevector(a, b, ((LANE & STEP) ? LANE - STEP + LANES : LANE)...);
  Vec high = __builtin_shufflevector(a, b, ((LANE & STEP) ? LANE + LANES : LANE + STEP)...);
  a = low;
  b = high;
}

template <int STEP, int COUNT>
SLEEPKERN_INLINE void transpose_step(Vec (&rows)[COUNT]) {
#pragma GCC unroll 16
  for (int i = 0; i < COUNT; ++i) {
    if ((i & STEP) == 0) {
      swap_halves<STEP>(rows[i], rows[i + STEP], std::make_integer_sequence<int, LANES>());
    }
  }
}

// A LANES x LANES transpose: each step swaps the off-diagonal halves of blocks of twice the step.
SLEEPKERN_INLINE void transpose(Vec (&rows)[LANES]) {
  transpose_step<1>(rows);
  transpose_step<2>(rows);
  if constexpr (LANES >= 8) transpose_step<4>(rows);
  if constexpr (LANES >= 16) transpose_step<8>(rows);
}

SLEEPKERN_INLINE void transpose(const float* src, int64_t src_stride, float* dst, int64_t dst_stride) {
  Vec rows[LANES];
#pragma GCC unroll 16
  for (int i = 0; i < LANES; ++i) rows[i] = load(src + i * src_stride);
  transpose(rows);
#pragma GCC unroll 16
  for (int i = 0; i < LANES; ++i) store(dst + i * dst_stride, rows[i]);
}

}  // namespace
}  // namespace sleepkern::SLEEPKERN_ISA
