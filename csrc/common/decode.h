// The states of a decode step that reads and writes them where they are.
#pragma once

#include <cstdint>

#include "common/types.h"

namespace sleepkern {

// States of all value heads: row n of head h is the contiguous [K, V] at data + n * stride + h * head_stride elements.
// With indices, entry i is row indices[i], or none where that is negative; else it is row i.
struct StateRows {
  void* data;
  int64_t stride, head_stride, rows;
  const int64_t* indices;
};

// `from` has an entry for each sequence. `to` has one for each sequence as well, which gets the state after its last
// token; with each_token it has one for each token of the flattened batch, which gets the state after that token. An
// absent entry of `from` means outputs of 0, and one of `to` is not written. Without each_token `to` is `from`.
struct DecodeStates {
  StateRows from, to;
  Type type;  // float32 or bfloat16; between the tokens of a call a state is float32
  bool each_token;

  // The address of an entry's state of one head, nullptr where it is absent.
  void* at(const StateRows& x, int64_t entry, int64_t head) const {
    const int64_t row = x.indices ? offset_at(x.indices, entry) : entry;
    if (row < 0) return nullptr;
    return static_cast<char*>(x.data) + (row * x.stride + head * x.head_stride) * (type == Type::float32 ? 4 : 2);
  }
};

}  // namespace sleepkern
