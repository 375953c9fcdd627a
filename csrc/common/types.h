// The types that describe all calls: gates, element types, and tensors at any address.
#pragma once

#include <cstdint>

#include "common/limits.h"

namespace sleepkern {

enum class Gate { none, head, channel };
enum class Type { float32, bfloat16, float16 };

// Offset n of packed sequences; on the CPU the array may be at any address, aligned or not.
constexpr int64_t offset_at(const int64_t* offsets, int64_t n) {
#ifdef __CUDA_ARCH__
  return offsets[n];
#else
  int64_t offset = 0;
  __builtin_memcpy(&offset, offsets + n, sizeof(offset));  // a constexpr function may call this, but not std::memcpy
  return offset;
#endif
}

// A tensor of tokens, at any address: token t (of the flattened batch) starts at data + t * stride elements.
struct Rows {
  const void* data;  // nullptr when absent
  int64_t stride;
  Type type;
};

// A contiguous array and its element type.
struct Array {
  const void* data;  // nullptr when absent
  Type type;
};

struct Interrupt;

// Whether a call is to end early. Each thread of the call checks it between two passes.
bool stops(Interrupt* interrupt);

}  // namespace sleepkern
