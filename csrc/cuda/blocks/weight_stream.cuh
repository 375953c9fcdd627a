// Products with weights that are streamed through shared memory.
//
//   acc [16 TILES][16] = left [16 TILES][16 steps] weight^T, for each group of 16 of the weight's outputs
//
// One warp computes a group for all rows of the left operand. So no two warps use the same weight, and each warp has
// its own stream: fragments of 16 outputs x 16 terms, 512 bytes, in the order of its products over all layers, repeated
// in every pass. Each warp has its own ring of stages. No other warp waits for it, and it fills while the CTA waits,
// exchanges sums or mixes tokens.
//
// Left operands are stored as fragments too: [step][tile of 16 rows][lane][4 words], the order in which lanes
// accumulate them.
#pragma once

#include "cuda/arch/mma_tiles.h"
#include "cuda/arch/ptx.h"
#include "cuda/blocks/params.h"
#include "cuda/recurrence/params.h"

namespace sleepkern::cuda {

// Stages of a warp that are prefetched to L2 before their copy is issued. The ring alone does not cover the latency of
// memory, and the weights of all layers may not fit L2 (Depo's have 66 MB).
constexpr int PREFETCH_STAGES = 16;

// Loads 16 bytes a lane through a generic address, which the compiler resolves to shared memory.
SLEEPKERN_DEVICE Fragment<Mode::bf16> load_fragment(const uint4* at) {
  const uint4 x = *at;
  return {{x.x, x.y, x.z, x.w}, {0}};
}

// The index of the word with columns (column, column + 1), column even, in fragments of `tiles` tiles.
SLEEPKERN_DEVICE int word_of(int tiles, int row, int column) {
  const int lane = (row & 7) * 4 + ((column & 7) >> 1);
  return (((column >> 4) * tiles + (row >> 4)) * 32 + lane) * 4 + ((row >> 3) & 1) + 2 * ((column >> 3) & 1);
}

struct WeightStream {
  const BlocksParams& call;
  const char* from;  // the warp's stages
  char* ring;
  Mbarrier* mbarriers;
  int count;       // stages of a pass
  int left, next;  // stages whose copy is not issued yet; index in the pass of the next one
  int slot, parity;

  SLEEPKERN_DEVICE WeightStream(const BlocksParams& call, int cta_rank, char* rings, Mbarrier* all) : call(call) {
    const int warp = threadIdx.x >> 5;
    const int32_t* mine = call.stages + 2 * (cta_rank * WARPS + warp);
    from = static_cast<const char*>(call.weights) + static_cast<int64_t>(mine[0]) * STAGE;
    count = mine[1];
    left = count * call.passes;
    next = slot = parity = 0;
    ring = rings + warp * call.ring * STAGE;
    mbarriers = all + warp * call.ring;
    plan_prefetch(-PREFETCH_STAGES, PREFETCH_STAGES + call.ring);
    for (int s = 0; s < call.ring; ++s) issue(s);
  }

  // Prefetches to L2 the stages that follow PREFETCH_STAGES stages after the next one, but none of the next pass.
  SLEEPKERN_DEVICE void plan_prefetch(int stages) const { plan_prefetch(next, stages); }
  SLEEPKERN_DEVICE void plan_prefetch(int position, int stages) const {
    const int first = position + PREFETCH_STAGES, most = count - first;
    // mutant: prefetch-beyond-the-last-weights
    warp_prefetch(from + static_cast<int64_t>(first) * STAGE, (stages < most ? stages : most) * STAGE);
  }

  SLEEPKERN_DEVICE void issue(int s) {
    if (left == 0) return;
    --left;
    warp_copy(mbarriers + s, ring + s * STAGE, from + static_cast<int64_t>(next) * STAGE, STAGE);
    next = next + 1 == count ? 0 : next + 1;
  }

  // Waits for the ring's first stage and loads its two fragments.
  SLEEPKERN_DEVICE void front(Fragment<Mode::bf16>& first, Fragment<Mode::bf16>& second) const {
    // mutant: no-wait-for-weights
    copy_wait(mbarriers + slot, parity);
    const uint4* at = reinterpret_cast<const uint4*>(ring + slot * STAGE) + lane_of_warp();
    first = load_fragment(at);
    second = load_fragment(at + FRAGMENT / sizeof(uint4));
  }
  // Releases the ring's first stage and issues the next copy to its memory. It is called after the products: the matrix
  // units are busy with it, and since the whole warp takes part in a product, all lanes have read their operands.
  SLEEPKERN_DEVICE void release() {
    // mutant: weights-overwrite-the-next-slot
    issue(slot);
    if (++slot == call.ring) {
      slot = 0;
      parity ^= 1;
    }
  }
};

template <int TILES>
using Products = float[TILES][2][4];  // [16 TILES][two products of 8 columns]

// acc += left of one step times a fragment.
template <int TILES>
SLEEPKERN_DEVICE void multiply_step(Products<TILES>& acc, const uint4* left, const Fragment<Mode::bf16>& b) {
#pragma unroll
  for (int m = 0; m < TILES; ++m) {
    const Fragment<Mode::bf16> a = load_fragment(left + m * 32);
    mma<Mode::bf16>(acc[m][0], a, b, 0);
    mma<Mode::bf16>(acc[m][1], a, b, 1);
  }
}

// Computes one n-group, or two of them together, over the steps first, first + stride, ...
template <int TILES>
SLEEPKERN_DEVICE void multiply_groups(WeightStream& weights, const uint4* left, int steps, bool two,
                                      Products<TILES>& one, Products<TILES>& other, int first = 0, int stride = 1) {
  weights.plan_prefetch(two ? steps : (steps + 1) / 2);  // an upper bound where warps share the steps
  left += lane_of_warp();
#pragma unroll
  for (int m = 0; m < TILES; ++m) {
    clear(one[m]);
    clear(other[m]);
  }
  Fragment<Mode::bf16> b, next;
  if (two) {
#pragma unroll 1
    for (int step = first; step < steps; step += stride) {
      weights.front(b, next);
#pragma unroll
      for (int m = 0; m < TILES; ++m) {
        const Fragment<Mode::bf16> a = load_fragment(left + (step * TILES + m) * 32);
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          mma<Mode::bf16>(one[m][half], a, b, half);
          mma<Mode::bf16>(other[m][half], a, next, half);
        }
      }
      weights.release();
    }
    return;
  }
#pragma unroll 1
  for (int step = first; step < steps; step += 2 * stride) {
    weights.front(b, next);
    multiply_step<TILES>(one, left + step * TILES * 32, b);
    if (step + stride < steps) multiply_step<TILES>(one, left + (step + stride) * TILES * 32, next);
    weights.release();
  }
}

// Calls each(group, products) for all n-groups.
template <int TILES, class Each>
SLEEPKERN_DEVICE void product(WeightStream& weights, const uint4* left, int steps, int groups, Each each) {
  for (int first = threadIdx.x >> 5; first < groups; first += 2 * WARPS) {
    const bool two = first + WARPS < groups;
    Products<TILES> one, other;
    multiply_groups<TILES>(weights, left, steps, two, one, other);
    each(first, one);
    if (two) each(first + WARPS, other);
  }
}

}  // namespace sleepkern::cuda
