// Parts of the bf16 tile of a layer's inputs: 8 columns of a row, and 16 rows x 16 columns as operands.
#pragma once

#include "cuda/arch/mma_tiles.h"
#include "cuda/arch/ptx.h"
#include "cuda/blocks/params.h"
#include "cuda/blocks/smem_layout.cuh"

namespace sleepkern::cuda {

SLEEPKERN_DEVICE float sigmoid(float x) {
  const float e = decayed(-fabsf(x));
  return quotient(x < 0.0f ? e : 1.0f, 1.0f + e);
}

// The two values of a bf16x2.
SLEEPKERN_DEVICE float low_of(uint32_t word) { return from_bits(word << 16); }
SLEEPKERN_DEVICE float high_of(uint32_t word) { return from_bits(word & 0xffff0000u); }

// The address of 8 columns of a row of a tile.
SLEEPKERN_DEVICE uint4* eight_at(uint16_t* tile, int columns, int row, int column) {
  return reinterpret_cast<uint4*>(tile + at<Mode::bf16>(columns, row, column));
}
SLEEPKERN_DEVICE void read_eight(float (&x)[8], const uint4& words) {
  const uint32_t w[4] = {words.x, words.y, words.z, words.w};
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    x[2 * i] = low_of(w[i]);
    x[2 * i + 1] = high_of(w[i]);
  }
}
SLEEPKERN_DEVICE uint4 eight_of(const float (&x)[8]) {
  return make_uint4(pack_bf16(x[0], x[1]), pack_bf16(x[2], x[3]), pack_bf16(x[4], x[5]), pack_bf16(x[6], x[7]));
}

// Loads 8 gains of a norm, from a multiple of 8 on.
SLEEPKERN_DEVICE void load_gains(float (&x)[8], const float* gains) {
  const float4 a = reinterpret_cast<const float4*>(gains)[0], b = reinterpret_cast<const float4*>(gains)[1];
  const float all[8] = {a.x, a.y, a.z, a.w, b.x, b.y, b.z, b.w};
#pragma unroll
  for (int i = 0; i < 8; ++i) x[i] = all[i];
}

// The sum of squares of `width` columns of a row from `column` on; the four lanes l, l + 8, ... of a row compute it
// together.
SLEEPKERN_DEVICE float sum_of_squares(uint16_t* tile, int columns, int row, int column, int width) {
  float sum = 0.0f;
  for (int d = 8 * (lane_of_warp() >> 3); d < width; d += 32) {
    float x[8];
    read_eight(x, *eight_at(tile, columns, row, column + d));
#pragma unroll
    for (int e = 0; e < 8; ++e) sum += x[e] * x[e];
  }
  sum += shuffle_xor(sum, 8);
  return sum + shuffle_xor(sum, 16);
}

// 16 rows x 16 columns of `wide`, of one window, from a row on that is a multiple of 8. A row beyond the window is
// replaced by one of the window's last rows. Its factor is 0, but 0 times a NaN of another window would be NaN.
struct Blocks16 {
  const uint16_t* tile;
  int cores, last;  // cores in a row of cores; the window's last row of cores

  SLEEPKERN_DEVICE Blocks16(const BlocksParams& call, const uint16_t* tile, int columns, int window)
      // mutant: rows-beyond-a-window-are-its-neighbours
      : tile(tile), cores(columns / 8), last((window + 1) * call.padded() / 8 - 1) {}

  SLEEPKERN_DEVICE Fragment<Mode::bf16> load(int row, int column, bool rows_first, bool transposed) const {
    const int lane = lane_of_warp(), low = (lane >> 3) & 1, high = lane >> 4;
    int core = row / 8 + (rows_first ? low : high);
    core = core < last ? core : last;
    const int at = core * cores + column / 8 + (rows_first ? high : low);
    const SharedAddress address = shared_address(tile) + at * 128 + 16 * (lane & 7);
    Fragment<Mode::bf16> f;
    if (transposed) {
      load_matrices_transposed(f.high, address);
    } else {
      load_matrices(f.high, address);
    }
    return f;
  }
  SLEEPKERN_DEVICE Fragment<Mode::bf16> left(int row, int column) const { return load(row, column, true, false); }
  SLEEPKERN_DEVICE Fragment<Mode::bf16> right(int row, int column) const { return load(row, column, false, false); }
  SLEEPKERN_DEVICE Fragment<Mode::bf16> right_transposed(int row, int column) const {
    return load(row, column, true, true);
  }
};

}  // namespace sleepkern::cuda
