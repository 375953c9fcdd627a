// The arguments of the launches: plain data, passed to the kernels by value.
#pragma once

#include <cstdint>

#include "common/recurrence.h"

namespace sleepkern::cuda {

constexpr int CHUNK = 64;     // tokens of a chunk; kernels compute whole blocks of 16 tokens, as many as a chunk has
constexpr int THREADS = 256;  // threads of a CTA
constexpr int WARPS = THREADS / 32;
constexpr int WIDEST_KEY = 128;
constexpr int WIDEST_V_TILE = 16 * WARPS;  // value columns of a v-tile: 16 a warp
constexpr int VALUES = 64;                 // value columns that chunk_factors has in shared memory at a time

// Factors of chunks in global memory, in the layout of shared memory: chunk_factors writes them, and later kernels copy
// them. The chunks of sequence s have the slots from first_slot(s) on; index = slot * HV + head.
struct ChunkFactors {
  void* tiles;         // [index][W, keys]: -W and Kt, tiles [CHUNK][KP]
  float* chunk_decay;  // [index][KP]: decay of the chunk
  float* U;            // [index][groups of 16 value columns][16 * CHUNK]: accumulators in the order of threads
  void* queries;       // [index][Qe, P]: tiles [CHUNK][KP] and [CHUNK][CHUNK]; nullptr without outputs
};

struct ReplayParams {
  Problem problem;  // pointers to the device's memory
  int mode;         // Mode
  int passes;
  float tol;             // a head stops once its estimated residual is at most this, if `residual` is given
  float* residual;       // [sequences, HV], nullptr without tol
  int32_t* passes_done;  // [sequences, HV] number of passes of each head, with tol
  bool affine, token_space;
  float* before;  // [sequences, HV, K, V] with affine and outputs: the state before the last pass
  int v_tile;     // value columns of a v-tile, a multiple of 16
  int v_tiles;    // v-tiles of a head
  int slots;      // chunks of which shared memory holds the factors
  ChunkFactors factors;

  // mutant: residuals-where-tol-is-positive
  constexpr bool stops() const { return residual != nullptr; }
};

// Powers of a transition, forward and backward (transition_powers.cuh).
struct PowersParams {
  int64_t heads;  // sequences * HV
  int K, V, passes;
  int v_tile, v_tiles;
  const float* A;              // [heads, K, K]
  const float* start;          // [heads, K, V] S_0, nullptr means 0
  const float* after;          // forward: [heads, K, V] S_1
  float* states;               // [passes, heads, K, V] S_0 ... S_(passes - 1)
  const int32_t* passes_done;  // backward: [heads] passes of each head, nullptr if all have `passes`
  const float* last;           // backward: [heads, K, V] gradient of the state before the last pass
  float* dA;                   // [v_tiles, heads, K, K]
  float* dB;                   // [heads, K, V]
  float* dstart;               // [heads, K, V]
};

// A few tokens of decode (decode.cuh).
struct DecodeParams {
  Problem problem;         // state and final_state are the same memory
  const int64_t* indices;  // [sequences] a state's index in the pool, below 0 for padding; nullptr means 0, 1, 2, ...
  int64_t stride;          // elements between two states of the pool
};

}  // namespace sleepkern::cuda
