// The shared memory of a CTA of sleep_blocks, and the windows of its cluster.
#pragma once

#include "cuda/arch/mma_tiles.h"
#include "cuda/arch/ptx.h"
#include "cuda/blocks/params.h"
#include "cuda/blocks/weight_stream.cuh"
#include "cuda/recurrence/params.h"

namespace sleepkern::cuda {

constexpr int TOKEN_BLOCK_BYTES = 1408;  // bytes of the factors of a block of 16 tokens of a head (recurrence.cuh)

// Computes the offsets on the host, in the order of the arrays in memory; SmemLayout describes the arrays.
inline SmemOffsets smem_offsets(const BlocksParams& call) {
  int64_t wide = 0, rates = 0, heads = 0, mixed = 0, scratch = 0;  // maximum over the layers; the last two in bytes
  const auto raise = [](int64_t& x, int64_t y) { x = x < y ? y : x; };
  const int64_t rows = 16 * call.tiles, all = call.cluster * call.columns;
  for (int i = 0; i < call.depth; ++i) {
    const BlockLayer& layer = call.layers[i];
    raise(wide, layer.into);
    raise(wide, layer.hidden);
    raise(rates, layer.rates());
    raise(heads, layer.heads);
    raise(mixed, 2 * rows * layer.mixed());
    raise(scratch, 2 * rows * layer.mixed() +
                       call.group * (layer.recurrent ? layer.value_heads * call.blocks() * TOKEN_BLOCK_BYTES : 0));
  }
  const int64_t parts = 4 * call.cluster * call.exchange * 16 * rows;
  if (call.exchange * 16 < call.columns) raise(scratch, mixed + parts);  // several exchanges
  raise(scratch, 2 * rows * all);
  Arena arena{nullptr};
  const auto take = [&](int64_t bytes) {
    const int64_t at = arena.used;
    arena.take<char>(bytes);
    return static_cast<int32_t>(at);
  };
  SmemOffsets at{};
  at.h = take(4 * rows * call.columns);
  at.x = take(scratch);
  at.squares = take(4 * rows * all / 16);
  at.scale = take(4 * rows);
  at.received = take(parts);
  at.wide = take(2 * rows * wide);
  at.rates = take(4 * rows * rates);
  at.factors = take(8 * heads * rows);
  at.ring = take(WARPS * call.ring * STAGE);
  at.mbarriers = take(WARPS * call.ring * sizeof(Mbarrier));
  at.end = static_cast<int32_t>(arena.used);
  at.received_too = at.x + static_cast<int32_t>(scratch - parts);
  return at;
}

struct SmemLayout {
  const BlocksParams& call;

  template <class T>
  SLEEPKERN_DEVICE static T* at(int32_t offset) {
    return reinterpret_cast<T*>(shared_memory() + offset);
  }
  // [columns / 16][tiles][2][32][4] this CTA's columns of the residual, as accumulators
  SLEEPKERN_DEVICE float* h() const { return at<float>(call.at.h); }
  // [all columns / 16][tiles][32] h of all CTAs in bf16, as a left operand; all CTAs write to it
  SLEEPKERN_DEVICE uint4* x() const { return at<uint4>(call.at.x); }
  // [mixed / 16][tiles][32] output of the mixer, in the memory of x; after it the factors of the mixer's token blocks
  SLEEPKERN_DEVICE uint4* mixed() const { return x(); }
  SLEEPKERN_DEVICE char* token_blocks(const BlockLayer& layer) const {
    return at<char>(call.at.x + 32 * call.tiles * layer.mixed());
  }
  // [all columns / 16][rows] sums of h^2 over 16 columns; all CTAs write to it
  SLEEPKERN_DEVICE float* squares() const { return at<float>(call.at.squares); }
  // [rows] factor of a row in the current norm
  SLEEPKERN_DEVICE float* scale() const { return at<float>(call.at.scale); }
  // [cluster][exchange][tiles][2][32][4] partial sums of this CTA's columns; all CTAs write to it. There are two such
  // buffers; the second overlays the end of x.
  SLEEPKERN_DEVICE float* received(bool too) const { return at<float>(too ? call.at.received_too : call.at.received); }
  // [rows][into] tile of the product with `into`, later relu(up)^2 as a left operand
  SLEEPKERN_DEVICE uint16_t* wide() const { return at<uint16_t>(call.at.wide); }
  // [rows][rates] log decay of each value head, then beta of each
  SLEEPKERN_DEVICE float* rates() const { return at<float>(call.at.rates); }
  // [2][heads][rows] factors of q and k
  SLEEPKERN_DEVICE float* factors() const { return at<float>(call.at.factors); }
  // [WARPS][ring][STAGE] weights, and [WARPS][ring] their mbarriers
  SLEEPKERN_DEVICE char* ring() const { return at<char>(call.at.ring); }
  SLEEPKERN_DEVICE Mbarrier* mbarriers() const { return at<Mbarrier>(call.at.mbarriers); }

  // Tells the emulator which bytes may be accessed.
  SLEEPKERN_DEVICE void use() const {
    const int32_t* offset = &call.at.h;
    for (int i = 0; i < 10; ++i) use_shared(shared_memory() + offset[i], offset[i + 1] - offset[i] - GUARD);
  }
};

// x / y and its remainder, for integers from 0 to 2^20. An integer division takes three times as long, and there are
// many between the products of a layer.
struct Division {
  int quotient, rest;
};
SLEEPKERN_DEVICE Division divide(int x, int y) {
  const int n = static_cast<int>(quotient(static_cast<float>(x) + 0.5f, static_cast<float>(y)));
  return {n, x - n * y};
}

// A CTA's rank in its cluster, and the windows [first, first + windows) of that cluster.
struct Cta {
  int rank, first, windows;

  SLEEPKERN_DEVICE explicit Cta(const BlocksParams& call) {
    rank = static_cast<int>(blockIdx.x) % call.cluster;
    first = static_cast<int>(blockIdx.x) / call.cluster * call.group;
    windows = call.B - first < call.group ? call.B - first : call.group;
  }
  // Whether a row is a token, and not padding of its window or of the group.
  SLEEPKERN_DEVICE bool has_token(const BlocksParams& call, int row) const {
    const Division of = divide(row, call.padded());
    return of.quotient < windows && of.rest < call.L;
  }
  // The index of a row's token in h [B, L, d].
  SLEEPKERN_DEVICE int64_t token(const BlocksParams& call, int row) const {
    const Division of = divide(row, call.padded());
    return static_cast<int64_t>(first + of.quotient) * call.L + of.rest;
  }
};

}  // namespace sleepkern::cuda
