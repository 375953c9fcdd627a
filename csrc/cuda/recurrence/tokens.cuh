// The addresses of tokens, and their loads: any input type and row stride, eight elements at a time.
#pragma once

#include "common/limits.h"
#include "common/recurrence.h"
#include "common/types.h"
#include "cuda/arch/mma_tiles.h"
#include "cuda/arch/ptx.h"
#include "cuda/recurrence/params.h"

namespace sleepkern::cuda {

// A run of at most CHUNK tokens of one head.
struct Chunk {
  int64_t first;  // row of the flattened batch
  int tokens;
  int head;

  SLEEPKERN_BOTH int blocks() const { return (tokens + 15) / 16; }
};

SLEEPKERN_BOTH int64_t first_slot(const Problem& problem, int64_t sequence) {
  return problem.offsets ? problem.offsets[sequence] / CHUNK + sequence : sequence * ((problem.T + CHUNK - 1) / CHUNK);
}

SLEEPKERN_BOTH int64_t slots_of(const Problem& problem) {
  const int64_t chunks = (problem.T + CHUNK - 1) / CHUNK;
  return problem.offsets ? problem.T / CHUNK + problem.sequences : problem.sequences * chunks;
}

SLEEPKERN_BOTH int groups_of(const Problem& problem) { return static_cast<int>((problem.V + 15) / 16); }

constexpr int SUMS = 2 * WARPS + 2;  // floats that `converged` (state_pass.cuh) keeps in shared memory
constexpr float NORM_EPS = static_cast<float>(sleepkern::NORM_EPS);

SLEEPKERN_DEVICE float load_one(const void* data, Type type, int64_t i) {
  if (type == Type::float32) return static_cast<const float*>(data)[i];
  const uint16_t bits = static_cast<const uint16_t*>(data)[i];
  return type == Type::bfloat16 ? from_bf16(bits) : from_half(bits);
}

SLEEPKERN_DEVICE void store_one(void* data, Type type, int64_t i, float x) {
  if (type == Type::float32) {
    static_cast<float*>(data)[i] = x;
  } else {
    static_cast<uint16_t*>(data)[i] = type == Type::bfloat16 ? static_cast<uint16_t>(pack_bf16(x, 0.0f)) : to_half(x);
  }
}

// Loads elements i ... i + 7: the first `valid` ones, and 0 for the rest; 16 bytes at a time where they are aligned.
SLEEPKERN_DEVICE void load_eight(float (&x)[8], const void* data, Type type, int64_t i, int valid) {
  const int width = type == Type::float32 ? 4 : 2;
  const char* p = static_cast<const char*>(data) + i * width;
  if (valid < 8 || (reinterpret_cast<uintptr_t>(p) & 15) != 0) {
    // This branch is rare and its code small: code that does not fit the instruction cache would slow every call.
#pragma unroll
    for (int e = 0; e < 8; ++e) x[e] = 0.0f;
#pragma unroll 1
    for (int e = 0; e < valid; ++e) {
      const float one = load_one(data, type, i + e);
#pragma unroll
      for (int f = 0; f < 8; ++f) x[f] = f == e ? one : x[f];
    }
  } else if (type == Type::float32) {
    const float4 a = reinterpret_cast<const float4*>(p)[0], b = reinterpret_cast<const float4*>(p)[1];
    const float all[8] = {a.x, a.y, a.z, a.w, b.x, b.y, b.z, b.w};
#pragma unroll
    for (int e = 0; e < 8; ++e) x[e] = all[e];
  } else {
    const uint4 a = *reinterpret_cast<const uint4*>(p);
    const uint32_t words[4] = {a.x, a.y, a.z, a.w};
#pragma unroll
    for (int e = 0; e < 8; ++e) {
      const uint16_t bits = static_cast<uint16_t>(words[e / 2] >> (16 * (e % 2)));
      x[e] = type == Type::bfloat16 ? from_bf16(bits) : from_half(bits);
    }
  }
}

// Loads rows of a chunk, `width` elements from element `offset` of each, to a tile [CHUNK][COLUMNS] padded with 0. With
// `normalize` a row first gets length 1; then scaled(row, column, x) is stored for x. A warp takes 8 rows, so that 8
// lanes of a 16-byte store write 8 rows of a core.
template <Mode MODE, int COLUMNS, class Scaled>
SLEEPKERN_DEVICE void load_tile(Number<MODE>* tile, const Rows& rows, const Chunk& chunk, int64_t offset, int width,
                                bool normalize, Scaled scaled) {
  const int row = 8 * (threadIdx.x >> 5) + (threadIdx.x & 7), group = (threadIdx.x & 31) >> 3;
  const int64_t start = (chunk.first + row) * rows.stride + offset;
  float x[(COLUMNS + 31) / 32][8], square = 0.0f;
#pragma unroll
  for (int i = 0; i < (COLUMNS + 31) / 32; ++i) {
    const int column = 8 * (4 * i + group);
    const int left = width - column, valid = row < chunk.tokens ? (left < 0 ? 0 : left < 8 ? left : 8) : 0;
    load_eight(x[i], rows.data, rows.type, start + column, valid);
#pragma unroll
    for (int e = 0; e < 8; ++e) square += x[i][e] * x[i][e];
  }
  float factor = 1.0f;
  if (normalize) {
    square += shuffle_xor(square, 8);
    square += shuffle_xor(square, 16);
    factor = rsqrtf(square + NORM_EPS);
  }
#pragma unroll
  for (int i = 0; i < (COLUMNS + 31) / 32; ++i) {
    const int column = 8 * (4 * i + group);
    if (column < COLUMNS) {
#pragma unroll
      for (int e = 0; e < 8; ++e) x[i][e] = scaled(row, column + e, x[i][e] * factor);
      store_eight<MODE>(tile, COLUMNS, row, column, x[i]);
    }
  }
}

}  // namespace sleepkern::cuda
