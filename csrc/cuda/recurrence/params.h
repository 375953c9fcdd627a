// What the launches of one call have in common: plain data, passed to the kernels by value.
#pragma once

#include <cstdint>

#include "common/recurrence.h"

namespace sleepkern::cuda {

constexpr int CHUNK = 64;     // tokens of a chunk; only whole groups of 16 are worked on
constexpr int THREADS = 256;  // of every block
constexpr int WARPS = THREADS / 32;
constexpr int WIDEST_KEY = 128;
constexpr int WIDEST_BLOCK = 16 * WARPS;  // value columns of a block: 16 a warp
constexpr int VALUES = 64;                // value columns that prepare has in shared memory at a time

// Factors of chunks in global memory, written by prepare and copied to shared memory as they lie. The chunks of
// sequence s have the slots from first_slot(s) on; index = slot * HV + head.
struct Factors {
  void* tiles;    // [index][W, keys]: -W and Kt, tiles [CHUNK][KP]
  float* gamma;   // [index][KP]: decay of the chunk
  float* U;       // [index][groups of 16 value columns][16 * CHUNK]: accumulators, thread after thread
  void* queries;  // [index][Qe, P]: tiles [CHUNK][KP] and [CHUNK][CHUNK]; nullptr where nothing is read
};

struct Call {
  Problem p;  // pointers to the device's memory
  int mode;   // Mode
  int passes;
  float tol;        // a head stops once its estimated residual is at most this, if residuals are wanted
  float* residual;  // [sequences, HV], nullptr without tol
  int32_t* made;    // [sequences, HV] passes made, with tol
  bool affine, rank;
  float* before;     // [sequences, HV, K, V] with affine and outputs: the state before the last pass
  int block;         // value columns of a block, a multiple of 16
  int value_blocks;  // blocks across V
  int slots;         // chunks that shared memory holds
  Factors factors;

  // mutant: residuals-where-tol-is-positive
  constexpr bool stops() const { return residual != nullptr; }
};

// Powers of a transition, forward and backward: transition_powers.cuh.
struct Chain {
  int64_t heads;  // sequences * HV
  int K, V, passes;
  int block, value_blocks;
  const float* A;       // [heads, K, K]
  const float* start;   // [heads, K, V] S_0, nullptr means 0
  const float* after;   // [heads, K, V] S_1 (powers)
  float* states;        // [passes, heads, K, V] S_0 ... S_(passes - 1)
  const int32_t* made;  // [heads] passes that each head made, nullptr for all (adjoint)
  const float* last;    // [heads, K, V] gradient of the state before the last pass (adjoint)
  float* dA;            // [value_blocks, heads, K, K]
  float* dB;            // [heads, K, V]
  float* dstart;        // [heads, K, V]
};

// A few tokens of decode: decode.cuh.
struct Steps {
  Problem p;              // state and final_state are the same memory
  const int64_t* places;  // [sequences] where in the pool a sequence's state lies, below 0: nowhere; nullptr: in order
  int64_t stride;         // numbers between two states of the pool
};

}  // namespace sleepkern::cuda
