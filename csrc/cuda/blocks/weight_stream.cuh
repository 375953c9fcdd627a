// Products with weights that stream through shared memory.
//
//   acc [16 TILES][16] = left [16 TILES][16 steps] weight^T, for each group of 16 of the weight's outputs
//
// A group belongs to one warp, which takes all rows of the left operand. So no weight is wanted by two warps, and each
// warp has a stream of its own: fragments of 16 outputs x 16 terms, 512 bytes, in the order in which it multiplies by
// them, through all products of all layers, again and again in every pass. They come through a ring of the warp's own,
// which nobody else waits for and which goes on filling while the block waits, exchanges or mixes tokens.
//
// Left operands lie as fragments too: [step][tile of 16 rows][lane][4 words], as lanes hold what left they accumulate.
#pragma once

#include "cuda/arch/mma_tiles.h"
#include "cuda/arch/ptx.h"
#include "cuda/blocks/params.h"
#include "cuda/recurrence/params.h"

namespace sleepkern::cuda {

// Stages of a warp that L2 has fetched, or is fetching, before they are asked for: the ring holds less than arrives
// while memory answers, and all layers' weights may be more than L2 keeps (Depo's: 66 MB).
constexpr int AHEAD = 16;

// 16 bytes of each lane, generic where the compiler sees shared memory.
SLEEPKERN_DEVICE Fragment<Mode::bf16> load_fragment(const uint4* at) {
  const uint4 x = *at;
  return {{x.x, x.y, x.z, x.w}, {0}};
}

// Word of the pair of columns (column, column + 1), an even one, in fragments of `tiles` tiles.
SLEEPKERN_DEVICE int word_of(int tiles, int row, int column) {
  const int lane = (row & 7) * 4 + ((column & 7) >> 1);
  return (((column >> 4) * tiles + (row >> 4)) * 32 + lane) * 4 + ((row >> 3) & 1) + 2 * ((column >> 3) & 1);
}

struct Stream {
  const BlocksCall& c;
  const char* from;  // the warp's stages
  char* ring;
  Arrival* arrivals;
  int count;       // stages of a pass
  int left, next;  // stages still to ask for; place in the pass of the next one
  int slot, parity;

  SLEEPKERN_DEVICE Stream(const BlocksCall& c, int rank, char* rings, Arrival* all) : c(c) {
    const int warp = threadIdx.x >> 5;
    const int32_t* mine = c.stages + 2 * (rank * WARPS + warp);
    from = static_cast<const char*>(c.weights) + static_cast<int64_t>(mine[0]) * STAGE;
    count = mine[1];
    left = count * c.passes;
    next = slot = parity = 0;
    ring = rings + warp * c.ring * STAGE;
    arrivals = all + warp * c.ring;
    plan_prefetch(-AHEAD, AHEAD + c.ring);
    for (int s = 0; s < c.ring; ++s) ask(s);
  }

  // Into L2 what comes AHEAD stages after the next `stages`; but for what begins a pass.
  SLEEPKERN_DEVICE void plan_prefetch(int stages) const { plan_prefetch(next, stages); }
  SLEEPKERN_DEVICE void plan_prefetch(int place, int stages) const {
    const int first = place + AHEAD, most = count - first;
    // mutant: prefetch-beyond-the-last-weights
    warp_prefetch(from + static_cast<int64_t>(first) * STAGE, (stages < most ? stages : most) * STAGE);
  }

  SLEEPKERN_DEVICE void ask(int s) {
    if (left == 0) return;
    --left;
    warp_copy(arrivals + s, ring + s * STAGE, from + static_cast<int64_t>(next) * STAGE, STAGE);
    next = next + 1 == count ? 0 : next + 1;
  }

  // The two fragments of the stage at the front.
  SLEEPKERN_DEVICE void front(Fragment<Mode::bf16>& first, Fragment<Mode::bf16>& second) const {
    // mutant: no-wait-for-weights
    copy_wait(arrivals + slot, parity);
    const uint4* at = reinterpret_cast<const uint4*>(ring + slot * STAGE) + lane_of_warp();
    first = load_fragment(at);
    second = load_fragment(at + FRAGMENT / sizeof(uint4));
  }
  // Asks for another stage in their place. After the products: the matrix units are busy meanwhile, and as a product is
  // made by the whole warp, all lanes have read what they multiply by.
  SLEEPKERN_DEVICE void turn() {
    // mutant: weights-overwrite-the-next-slot
    ask(slot);
    if (++slot == c.ring) {
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

// One group, or two of them side by side: the steps first, first + stride, ...
template <int TILES>
SLEEPKERN_DEVICE void multiply_groups(Stream& weights, const uint4* left, int steps, bool two, Products<TILES>& one,
                                      Products<TILES>& other, int first = 0, int stride = 1) {
  weights.plan_prefetch(two ? steps : (steps + 1) / 2);  // or fewer, where others have some of the steps
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
      weights.turn();
    }
    return;
  }
#pragma unroll 1
  for (int step = first; step < steps; step += 2 * stride) {
    weights.front(b, next);
    multiply_step<TILES>(one, left + step * TILES * 32, b);
    if (step + stride < steps) multiply_step<TILES>(one, left + (step + stride) * TILES * 32, next);
    weights.turn();
  }
}

// made(group, products) for all groups.
template <int TILES, class Made>
SLEEPKERN_DEVICE void product(Stream& weights, const uint4* left, int steps, int groups, Made made) {
  for (int first = threadIdx.x >> 5; first < groups; first += 2 * WARPS) {
    const bool two = first + WARPS < groups;
    Products<TILES> one, other;
    multiply_groups<TILES>(weights, left, steps, two, one, other);
    made(first, one);
    if (two) made(first + WARPS, other);
  }
}

}  // namespace sleepkern::cuda
