// What all calls are described with: gates, types of numbers, tensors at any address, and how a call ends early.
#pragma once

#include <cstdint>

#include "common/limits.h"

namespace sleepkern {

enum class Gate { none, head, channel };
enum class Type { float32, bfloat16, float16 };

// Offset n of packed sequences, whatever address they lie at on the CPU.
constexpr int64_t offset_at(const int64_t* offsets, int64_t n) {
#ifdef __CUDA_ARCH__
  return offsets[n];
#else
  int64_t offset = 0;
  __builtin_memcpy(&offset, offsets + n, sizeof(offset));  // which a constexpr function may call, unlike std::memcpy
  return offset;
#endif
}

// A tensor of tokens, at any address: token t (of the flattened batch) starts at data + t * stride elements.
struct Rows {
  const void* data;  // nullptr when absent
  int64_t stride;
  Type type;
};

// Numbers side by side, of a type of their own.
struct Array {
  const void* data;  // nullptr when absent
  Type type;
};

struct Interrupt;

// Whether a call is to end early; asked between passes by all its threads, one for each that they share.
bool stops(Interrupt* interrupt);

}  // namespace sleepkern
