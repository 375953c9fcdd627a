// The C++ face of sleepkern/problem.py: sizes and pointers of one forward, already checked.
#pragma once

#include <cstdint>

namespace sleepkern {

enum class Gate { none, head, channel };
enum class Type { float32, bfloat16, float16 };

// A tensor of tokens: token t (of the flattened batch) starts at data + t * stride elements.
struct Rows {
  const void* data;  // nullptr when absent
  int64_t stride;
  Type type;
};

struct Problem {
  Gate gate;
  bool delta;
  bool normalize;
  float scale;
  int64_t sequences, T, H, HV, K, V;
  const int64_t* offsets;  // [sequences + 1] token offsets when packed, else nullptr: sequence n starts at n * T
  Rows q, k;               // [tokens, H, K]; q absent when no readouts are wanted
  Rows v;                  // [tokens, HV, V]
  Rows g;                  // [tokens, HV] or [tokens, HV, K] log decay, absent without gate
  Rows beta;               // [tokens, HV], absent means 1
  const float* state;      // [sequences, HV, K, V], nullptr means 0; may be final_state itself
  void* o;                 // [tokens, HV, V] in v's type, nullptr when not wanted
  float* final_state;      // [sequences, HV, K, V]
};

}  // namespace sleepkern
