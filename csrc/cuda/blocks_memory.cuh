// What a thread block of sleep_blocks has in shared memory, and which windows are its own.
#pragma once

#include "cuda/blocks_stream.cuh"

namespace sleepkern::cuda {

constexpr int UNIT = 1408;  // bytes that a block of 16 tokens of a head needs besides: blocks_walk.cuh

// Sizes of a call that shared memory depends on.
struct Sizes {
  int64_t tiles, cluster, exchange, ring, columns;
  int64_t wide, rates, heads;  // most columns of any layer
  int64_t scratch;             // most bytes of `mixed` and what a mixer needs besides

  SLEEPKERN_BOTH explicit Sizes(const BlocksCall& c)
      : tiles(c.tiles), cluster(c.cluster), exchange(c.exchange), ring(c.ring), columns(c.columns) {
    wide = rates = heads = scratch = 0;
    const auto raise = [](int64_t& x, int64_t y) { x = x < y ? y : x; };
    for (int i = 0; i < c.depth; ++i) {
      const BlockLayer& l = c.layers[i];
      raise(wide, l.into);
      raise(wide, l.hidden);
      raise(rates, l.rates());
      raise(heads, l.heads);
      raise(scratch, 32 * c.tiles * l.mixed() + c.group * (l.recurrent ? l.value_heads * c.blocks() * UNIT : 0));
    }
  }
};

struct Shared {
  Arena arena;
  float* h;         // [columns / 16][tiles][2][32][4] this block's columns of the residual, as accumulators
  uint4* x;         // [tiles][all columns / 16][32] h of all blocks in bf16, as a left operand; everyone writes here
  uint4* mixed;     // [tiles][mixed / 16][32] out of the mixer, where x was
  float* squares;   // [all columns / 16][rows] sums of h^2 over 16 columns; everyone writes here
  float* scale;     // [rows] what norms multiply a row with
  float* received;  // [cluster][exchange][tiles][2][32][4] parts of sums of this block's columns; everyone writes here
  uint16_t* wide;   // [rows][into] tile out of `into`, later relu(up)^2 as a left operand
  float* rates;     // [rows][rates] decay, then strength, of each value head
  float* factors;   // [2][heads][rows]
  char* ring;       // [WARPS][ring][STAGE] weights
  Arrival* arrivals;  // [WARPS][ring]
  int tiles;

  SLEEPKERN_BOTH Shared(char* base, const Sizes& s) : arena{base} {
    const int64_t rows = 16 * s.tiles, all = s.cluster * s.columns;
    h = arena.take<float>(rows * s.columns);
    x = arena.take<uint4>((2 * rows * all > s.scratch ? 2 * rows * all : s.scratch) / 16);
    mixed = x;
    squares = arena.take<float>(rows * all / 16);
    scale = arena.take<float>(rows);
    received = arena.take<float>(s.cluster * s.exchange * 16 * rows);
    wide = arena.take<uint16_t>(rows * s.wide);
    rates = arena.take<float>(rows * s.rates);
    factors = arena.take<float>(2 * s.heads * rows);
    ring = arena.take<char>(WARPS * s.ring * STAGE);
    arrivals = arena.take<Arrival>(WARPS * s.ring);
    tiles = static_cast<int>(s.tiles);
  }
  // What the mixer of a layer needs besides `mixed`, behind it where x was.
  SLEEPKERN_DEVICE char* units(const BlockLayer& l) const {
    return reinterpret_cast<char*>(mixed) + 32 * tiles * l.mixed();
  }
};

// A thread block's rank in its cluster and the windows [first, first + windows) of that.
struct Place {
  int rank, first, windows;

  SLEEPKERN_DEVICE explicit Place(const BlocksCall& c) {
    rank = static_cast<int>(blockIdx.x) % c.cluster;
    first = static_cast<int>(blockIdx.x) / c.cluster * c.group;
    windows = c.B - first < c.group ? c.B - first : c.group;
  }
  // A row is a token, or padding of its window or of the group.
  SLEEPKERN_DEVICE bool has_token(const BlocksCall& c, int row) const {
    return row < windows * c.padded() && row % c.padded() < c.L;
  }
  // Where a row with a token lies in h [B, L, d].
  SLEEPKERN_DEVICE int64_t token(const BlocksCall& c, int row) const {
    return static_cast<int64_t>(first + row / c.padded()) * c.L + row % c.padded();
  }
};

}  // namespace sleepkern::cuda
