// One call of sleep_blocks as its kernel takes it: plain data, by value. Sizes of a layer are those of one thread block
// of the cluster, which has its share of the heads, of the hidden columns and of the columns of h.
#pragma once

#include <cstdint>

#include "cuda/recurrence/params.h"

namespace sleepkern::cuda {

constexpr int MOST_LAYERS = 24;           // a kernel's arguments have 4 KB
constexpr int TAPS = 4;                   // of a short convolution, shorter ones begin with zeros
constexpr int WIDEST_MODEL = 512;         // d; the widest that was measured, and wider windows rarely fit on chip
constexpr int WIDEST_HEAD = WIDEST_KEY;   // K and V; the state of a warp is in registers
constexpr int TILES_OF[] = {2, 5, 8};     // tiles of 16 rows of a group of windows that there are kernels for
constexpr int MOST_TILES = 8;             // accumulators of more do not fit a warp's registers
constexpr int LONGEST = 16 * MOST_TILES;  // tokens of a window
constexpr int FRAGMENT = 512;             // bytes of 16 x 16 weights
constexpr int STAGE = 2 * FRAGMENT;       // bytes of one request of a warp: a step of two groups, or two of one

// Whether a warp holds accumulators of two groups of 16 columns while the partial sums of others arrive: with
// MOST_TILES it has no registers for them.
constexpr bool paired(int tiles) { return tiles < MOST_TILES; }

struct BlockLayer {
  // Gated DeltaNet
  const float* taps;  // [cluster][channels][TAPS]
  const float* gain;  // [VP] of the gated norm
  float* state;       // [B, HV, K, V], in place; what is there counts only if `continued`
  const void* past;   // [B, W - 1, channels of the model] in h's type, nullptr means 0
  void* last;         // [2][B, W - 1, channels of the model]: a pass writes the one of its parity
  // attention
  const float *q_gain, *k_gain;  // [KP], q's times D^-1/2
  void *keys, *values;           // [B, H, kept + L, D] in h's type; the first `kept` are read, the rest written at last

  int32_t recurrent, continued, kept;
  int32_t heads, value_heads;  // of this thread block
  int32_t K, V, KP, VP, W;     // KP, VP: with zeros up to a multiple of 16
  int32_t into, hidden;        // columns, multiples of 16; `into` without the rates
  int32_t first_unit;          // where its sums stand in `changes`
  float mixer_eps, mlp_eps, decay_bias, strength, gain_eps, q_eps, k_eps;

  constexpr int channels() const { return 2 * heads * KP + value_heads * VP; }
  constexpr int rates() const { return recurrent ? 2 * value_heads : 0; }
  constexpr int key_head(int head) const { return heads == value_heads ? head : head / (value_heads / heads); }
  constexpr int mixed() const { return value_heads * VP; }
};

// Where the arrays of shared memory begin (smem_layout.cuh), which the kernel thus has not to keep in registers.
struct Places {
  int32_t h, x, squares, scale, received, wide, rates, factors, ring, arrivals, end;
  int32_t received_too;  // within x
};

struct BlocksCall {
  const void* h;          // [B, L, d]
  void* out;              // the same, after all passes
  const void* weights;    // streams of fragments: weight_stream.cuh
  const int32_t* stages;  // [cluster][WARPS][2]: the first stage of a warp, and how many a pass
  float* changes;         // [passes][units][2] sums of squares: of a pass's change, and after it

  int32_t type;      // of h, Type
  int32_t tiles;     // of 16 rows
  int32_t cluster;   // thread blocks of one group of windows
  int32_t group;     // windows of a group
  int32_t exchange;  // of the groups of 16 columns that a block owns: how many are summed at a time
  int32_t ring;      // stages of a warp in shared memory
  int32_t B, L, d, passes, reinject, carry;
  int32_t columns;       // of h in one thread block, a multiple of 16
  int32_t units, depth;  // sums of a pass; layers
  Places at;
  BlockLayer layers[MOST_LAYERS];

  constexpr int splits() const {  // of the terms of the rates, one a warp; as many as there is room for
    const int most = cluster * exchange;
    return most >= 8 ? 8 : most >= 4 ? 4 : most >= 2 ? 2 : 1;
  }
  constexpr int own_groups() const { return columns / 16; }  // of 16 columns of h, of one CTA
  constexpr int all_groups() const { return cluster * own_groups(); }
  constexpr int exchanges() const { return (own_groups() + exchange - 1) / exchange; }
  // Groups of all CTAs in exchange n.
  constexpr int exchange_size(int n) const {
    const int rest = own_groups() - n * exchange;
    return cluster * (rest < exchange ? rest : exchange);
  }
  // Whether the two groups of a warp are of one exchange, which more groups than warps take part in.
  constexpr bool pairs_in_exchange() const { return paired(tiles) && cluster * exchange > WARPS; }
  constexpr int padded() const { return (L + 7) / 8 * 8; }  // rows of a window: those of a core begin together
  constexpr int blocks() const { return (L + 15) / 16; }    // of 16 tokens, of a window
};
static_assert(sizeof(BlocksCall) <= 4096);

}  // namespace sleepkern::cuda
