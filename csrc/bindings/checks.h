// The checks of every entry point of the module: sizes, type codes, strides, and that needed addresses are not 0. The
// memory at an address is the caller's responsibility. Each failure is one sentence.
#pragma once

#include <pybind11/pybind11.h>

#include <cstdint>
#include <initializer_list>
#include <string>

#include "common/recurrence.h"

namespace sleepkern {

[[noreturn]] inline void refuse(const char* name, const std::string& got, const std::string& expected) {
  throw pybind11::value_error(std::string(name) + ": got " + got + "; expected " + expected);
}

inline void check_between(const char* name, int64_t got, int64_t least, int64_t most) {
  if (got >= least && got <= most) return;
  refuse(name, std::to_string(got), "from " + std::to_string(least) + " to " + std::to_string(most));
}

inline void check_at_least(const char* name, int64_t got, int64_t least) {
  if (got < least) refuse(name, std::to_string(got), "at least " + std::to_string(least));
}

inline void check_given(const char* name, const void* address, bool needed = true) {
  if (needed && !address) refuse(name, "address 0", "the address of a tensor");
}

// Checks that a tensor of these sizes has a number of bytes that an address can reach.
inline void check_product(const char* names, std::initializer_list<int64_t> sizes) {
  int64_t product = 8;
  for (int64_t size : sizes) {
    if (__builtin_mul_overflow(product, size, &product)) refuse(names, "a product beyond 2^60", "sizes of a tensor");
  }
}

inline Type check_type(const char* name, int code) {
  check_between(name, code, 0, 2);
  return static_cast<Type>(code);
}

// `needed`: tokens of the tensor will be read.
inline void check_rows(const char* name, const Rows& x, int64_t tokens, bool needed) {
  check_given(name, x.data, needed && tokens > 0);
  if (!x.data) return;
  check_at_least(name, x.stride, 0);
  check_product(name, {tokens, x.stride});
}

// Checks that offsets, in the CPU's memory, rise from 0 to the number of tokens.
inline void check_offsets(const int64_t* offsets, int64_t sequences, int64_t tokens) {
  if (!offsets) return;
  int64_t before = 0;
  for (int64_t n = 0; n <= sequences; ++n) {
    const int64_t offset = offset_at(offsets, n), least = n == 0 ? 0 : before, most = n == 0 ? 0 : tokens;
    if (offset < least || offset > most || (n == sequences && offset != tokens)) {
      refuse("cu_seqlens", std::to_string(offset) + " at " + std::to_string(n),
             "offsets that rise from 0 to " + std::to_string(tokens));
    }
    before = offset;
  }
}

inline void check_heads(int64_t H, int64_t HV) {
  check_at_least("H", H, 1);
  check_at_least("HV", HV, 1);
  if (HV % H != 0) refuse("HV", std::to_string(HV), "a multiple of H = " + std::to_string(H));
}

inline void check(const Problem& p) {
  check_at_least("sequences", p.sequences, 0);
  check_at_least("T", p.T, 0);
  check_heads(p.H, p.HV);
  check_between("K", p.K, 1, HEAD_LIMIT);
  check_between("V", p.V, 1, HEAD_LIMIT);
  check_product("sequences, T, HV, K, V", {p.sequences, p.T, p.HV, p.K < p.V ? p.V : p.K});
  check_product("sequences, HV, K, V", {p.sequences, p.HV, p.K, p.V});
  const int64_t tokens = p.offsets ? p.T : p.sequences * p.T;
  check_rows("q", p.q, tokens, false);
  check_rows("k", p.k, tokens, true);
  check_rows("v", p.v, tokens, true);
  check_rows("g", p.g, tokens, p.gate != Gate::none);
  check_rows("beta", p.beta, tokens, false);
}

}  // namespace sleepkern
