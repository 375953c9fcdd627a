// Decode on states of either type, which lie anywhere, and with the state after each token. params.h has the plain
// case.
#pragma once

#include <cstdint>

#include "cuda/recurrence/params.h"

namespace sleepkern::cuda {

// The state and final_state of `problem` are not read. Each [K, V] of a head is contiguous.
struct DecodeStates : DecodeParams {
  bool bf16;  // the states are bfloat16, else float32
  void* states;
  int64_t head_stride;  // elements between two heads of a state
  void* out;            // gets the state after each token; nullptr: `states` gets that after the last one
  const int64_t*
      out_indices;  // [sequences, T] an index in the pool `out`, below 0 for none; nullptr: out is [B, T, ...]
  int64_t out_stride, out_token_stride, out_head_stride;
};

void decode_states(const DecodeStates& call, void* stream);

}  // namespace sleepkern::cuda
