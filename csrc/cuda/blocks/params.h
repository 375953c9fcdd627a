// The arguments of sleep_blocks' kernel: plain data, passed by value. Sizes of a layer are those of one CTA of the
// cluster, which has its share of the heads, of the hidden columns and of the columns of h.
#pragma once

#include <cstdint>

#include "cuda/recurrence/params.h"

namespace sleepkern::cuda {

constexpr int MOST_LAYERS = 24;  // a kernel's arguments are limited to 4 KB
constexpr int TAPS = 4;          // width of the short convolution; shorter ones begin with zeros
constexpr int WIDEST_MODEL =
    512;  // largest d; it is the widest that was measured, and wider windows rarely fit on chip
constexpr int WIDEST_HEAD = WIDEST_KEY;   // largest K and V; the state of a warp is in registers
constexpr int TILES_OF[] = {2, 5, 8};     // kernels exist for groups of windows of so many tiles of 16 rows
constexpr int MOST_TILES = 8;             // accumulators of more do not fit a warp's registers
constexpr int LONGEST = 16 * MOST_TILES;  // tokens of a window
constexpr int FRAGMENT = 512;             // bytes of 16 x 16 weights
constexpr int STAGE = 2 * FRAGMENT;       // bytes of one copy of a warp: one step of two n-groups, or two steps of one

// Whether a warp holds accumulators of two n-groups of 16 columns while it adds the partial sums of other CTAs. With
// MOST_TILES it has no registers for that.
constexpr bool paired(int tiles) { return tiles < MOST_TILES; }

struct BlockLayer {
  // Gated DeltaNet
  const float* taps;  // [cluster][channels][TAPS]
  const float* gain;  // [VP] of the gated norm
  float* state;       // [B, HV, K, V], in place; the initial state is read only if `continued`
  const void* past;   // [B, W - 1, channels of the model] in h's type, nullptr means 0
  void* last;         // [2][B, W - 1, channels of the model]; a pass writes [pass % 2]
  // attention
  const float *q_gain, *k_gain;  // [KP], q's times D^-1/2
  void *keys,
      *values;  // [B, H, kept + L, D] in h's type; the first `kept` tokens are read, the last pass writes the rest

  int32_t recurrent, continued, kept;
  int32_t heads, value_heads;  // of this CTA
  int32_t K, V, KP, VP, W;     // KP, VP: K and V with zeros up to a multiple of 16
  int32_t into, hidden;        // columns, multiples of 16; `into` without the rates
  int32_t first_sum;           // index of the layer's first sums in `changes`
  float mixer_eps, mlp_eps, decay_bias, strength, gain_eps, q_eps, k_eps;

  constexpr int channels() const { return 2 * heads * KP + value_heads * VP; }
  constexpr int rates() const { return recurrent ? 2 * value_heads : 0; }
  constexpr int key_head(int head) const { return heads == value_heads ? head : head / (value_heads / heads); }
  constexpr int mixed() const { return value_heads * VP; }
};

// The offsets of the arrays in shared memory (smem_layout.cuh). As arguments they take no registers.
struct SmemOffsets {
  int32_t h, x, squares, scale, received, wide, rates, factors, ring, mbarriers, end;
  int32_t received_too;  // within x
};

struct BlocksParams {
  const void* h;          // [B, L, d]
  void* out;              // the same, after all passes
  const void* weights;    // streams of fragments: weight_stream.cuh
  const int32_t* stages;  // [cluster][WARPS][2]: the first stage of a warp, and how many a pass
  float* changes;         // [passes][units][2] sums of squares: of a pass's change, and of the states after it

  int32_t type;      // of h, Type
  int32_t tiles;     // of 16 rows
  int32_t cluster;   // CTAs of one group of windows
  int32_t group;     // windows of a group
  int32_t exchange;  // n-groups of each CTA that one exchange sums
  int32_t ring;      // stages of a warp's ring in shared memory
  int32_t B, L, d, passes, reinject, carry;
  int32_t columns;      // columns of h in one CTA, a multiple of 16
  int32_t sums, depth;  // pairs of sums of a pass; layers
  SmemOffsets at;
  BlockLayer layers[MOST_LAYERS];

  constexpr int splits()
      const {  // split-K factor of the product for the rates, one split a warp; it is bounded by the scratch memory
    const int most = cluster * exchange;
    return most >= 8 ? 8 : most >= 4 ? 4 : most >= 2 ? 2 : 1;
  }
  constexpr int own_groups() const { return columns / 16; }  // n-groups of 16 columns of h of one CTA
  constexpr int all_groups() const { return cluster * own_groups(); }
  constexpr int exchanges() const { return (own_groups() + exchange - 1) / exchange; }
  // The n-groups of all CTAs in exchange n.
  constexpr int exchange_size(int n) const {
    const int rest = own_groups() - n * exchange;
    return cluster * (rest < exchange ? rest : exchange);
  }
  // Whether the two n-groups of a warp belong to one exchange: it then has more n-groups than there are warps.
  constexpr bool pairs_in_exchange() const { return paired(tiles) && cluster * exchange > WARPS; }
  constexpr int padded() const { return (L + 7) / 8 * 8; }  // rows of a window, padded to whole cores of 8 rows
  constexpr int blocks() const { return (L + 15) / 16; }    // token blocks of 16 tokens of a window
};
static_assert(sizeof(BlocksParams) <= 4096);

}  // namespace sleepkern::cuda
