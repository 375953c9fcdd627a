// silu and sigmoid with their derivatives, and loads and stores of rows of any type.
#pragma once

#include <cstdint>

#include "common/types.h"
#include "cpu/simd/vec.h"

namespace sleepkern::SLEEPKERN_ISA {
namespace {

SLEEPKERN_INLINE Vec sigmoid(Vec z) {
  const Vec e = exp_nonpositive(reinterpret_cast<Vec>(reinterpret_cast<BitVec>(z) | 0x80000000u));
  const Vec s = (z < Vec{} ? e : broadcast(1.0f)) * reciprocal(e + 1.0f);
  return z == z ? s : z;
}

// z sigmoid(z) or sigmoid(z), and its derivative.
struct Activated {
  Vec value, slope;
};

SLEEPKERN_INLINE Activated activate(Vec z, bool silu) {
  const Vec s = sigmoid(z), rest = broadcast(1.0f) - s;
  if (silu) return {z * s, s * (z * rest + 1.0f)};
  return {s, s * rest};
}

SLEEPKERN_INLINE int64_t bytes_of(Type type) { return type == Type::float32 ? 4 : 2; }

template <Type TYPE>
constexpr int64_t size_of() {
  return TYPE == Type::float32 ? 4 : 2;
}

// The address of element i.
SLEEPKERN_INLINE const void* at(const Array& x, int64_t i) {
  return static_cast<const char*>(x.data) + i * bytes_of(x.type);
}

// LANES elements from element i on.
template <Type TYPE>
SLEEPKERN_INLINE Vec load_as(const void* row, int64_t i) {
  if constexpr (TYPE == Type::float32) return load(static_cast<const float*>(row) + i);
  return widen(*reinterpret_cast<const HalfVecUnaligned*>(static_cast<const uint16_t*>(row) + i), TYPE);
}

template <Type TYPE>
SLEEPKERN_INLINE void store_as(void* row, int64_t i, Vec x) {
  store_row(reinterpret_cast<const float*>(&x), TYPE, LANES, static_cast<char*>(row) + i * size_of<TYPE>());
}

// The first n < LANES of them, then zeros.
template <Type TYPE>
SLEEPKERN_INLINE Vec load_part(const void* row, int64_t i, int64_t n) {
  alignas(64) float x[LANES] = {};
  load_row(static_cast<const char*>(row) + i * size_of<TYPE>(), TYPE, n, x);
  return load(x);
}

template <Type TYPE>
SLEEPKERN_INLINE void store_part(void* row, int64_t i, int64_t n, Vec x) {
  store_row(reinterpret_cast<const float*>(&x), TYPE, n, static_cast<char*>(row) + i * size_of<TYPE>());
}

template <Type TYPE>
SLEEPKERN_INLINE Vec load_up_to(const void* row, int64_t i, int64_t n) {
  if (n >= LANES) return load_as<TYPE>(row, i);
  return load_part<TYPE>(row, i, n);
}

template <Type TYPE>
SLEEPKERN_INLINE void store_up_to(void* row, int64_t i, int64_t n, Vec x) {
  if (n >= LANES) return store_as<TYPE>(row, i, x);
  store_part<TYPE>(row, i, n, x);
}

}  // namespace
}  // namespace sleepkern::SLEEPKERN_ISA
