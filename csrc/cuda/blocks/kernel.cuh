// sleep_blocks: all passes and layers of a group of windows in one launch, by a cluster of CTAs.
//
//   per layer   h <- h + out mixer(into norm h);  h <- h + down relu(up norm h)^2        h [16 TILES rows][d]
//
//   CTA r of R                  shared memory                                     registers, global memory
//   ------------------          -------------                                     ------------------------
//   columns r d/R .. of h       h, float32, from first pass to last
//   all columns of h            x, bf16, from all CTAs; norm's factor of a row    products: [16 TILES][16] a warp
//   its heads                   q k v gate of its heads, mixed                    fast weights: registers, between
//   its hidden columns          relu^2                                            layers L2; weights: L2, once a pass
//
// The products with `into` and `up` need all columns of h (all-gather): each CTA writes its own columns in bf16 to the
// shared memory of all CTAs, without normalisation, together with their sums of squares. Rows are multiplied by 1 / rms
// after the product. The products of `out` and `down` with a CTA's heads or hidden columns are partial sums of all
// columns of h (reduce-scatter): they go to the CTA of those columns, which adds the partial sums in the order of
// ranks. So a layer has four exchanges, and h in float32 never leaves its CTA.
#pragma once

#include "common/types.h"
#include "cuda/arch/mma_tiles.h"
#include "cuda/arch/ptx.h"
#include "cuda/blocks/attention.cuh"
#include "cuda/blocks/mixer_prologue.cuh"
#include "cuda/blocks/operands.cuh"
#include "cuda/blocks/params.h"
#include "cuda/blocks/smem_layout.cuh"
#include "cuda/blocks/weight_stream.cuh"
#include "cuda/recurrence/params.h"
#include "cuda/recurrence/tokens.cuh"

namespace sleepkern::cuda {

constexpr int ALONE = 2;                        // the most tiles without clusters
constexpr float REINJECT_EPS = 1.1920929e-07f;  // torch's for float32

template <int TILES, int KEYS>
struct ClusterGroup {
  const BlocksParams& call;
  const SmemLayout& smem;
  const Cta& cta;

  SLEEPKERN_DEVICE int own_groups() const { return call.own_groups(); }
  SLEEPKERN_DEVICE int all_groups() const { return call.all_groups(); }

  // Calls tile(n-group, tile, x) for this CTA's tiles of 16 rows x 16 columns of h; x is stored if it returns true. A
  // tile belongs to the same warp in every call, so no barrier is needed between two calls. The warp's number is
  // computed again each time, to save a register.
  template <class Tile>
  SLEEPKERN_DEVICE void each_tile(int first, int last, Tile tile) const {
    const int warp = opaque(threadIdx.x) >> 5, start = first * TILES;
#pragma unroll 1
    for (int index = start + ((warp - start) & (WARPS - 1)); index < last * TILES; index += WARPS) {
      float4* at = reinterpret_cast<float4*>(smem.h()) + index * 64 + lane_of_warp();
      const float4 low = at[0], high = at[32];
      float x[8] = {low.x, low.y, low.z, low.w, high.x, high.y, high.z, high.w};
      if (!tile(index / TILES, index % TILES, x)) continue;
      at[0] = make_float4(x[0], x[1], x[2], x[3]);
      at[32] = make_float4(x[4], x[5], x[6], x[7]);
    }
  }

  // Calls f(i, index in h [B, L, d]) for those of a lane's 8 elements of a tile that are elements of h.
  template <class Each>
  SLEEPKERN_DEVICE void each_number(int group, int tile, Each f) const {
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      const int row = 16 * tile + row_of(i & 3),
                column = cta.rank * call.columns + 16 * group + column_of(i >> 2, i & 3);
      if (column < call.d && cta.has_token(call, row)) f(i, cta.token(call, row) * call.d + column);
    }
  }

  SLEEPKERN_DEVICE void load() const {
    each_tile(0, own_groups(), [&](int group, int tile, float (&x)[8]) {
      for (float& one : x) one = 0.0f;
      each_number(group, tile, [&](int i, int64_t at) { x[i] = load_one(call.h, static_cast<Type>(call.type), at); });
      return true;
    });
  }

  SLEEPKERN_DEVICE void store() const {
    each_tile(0, own_groups(), [&](int group, int tile, float (&x)[8]) {
      each_number(group, tile, [&](int i, int64_t at) { store_one(call.out, static_cast<Type>(call.type), at, x[i]); });
      return false;
    });
  }

  // Writes h in bf16 and its sums of squares to all CTAs. A cluster barrier must follow.
  SLEEPKERN_DEVICE void all_gather_h() const {
    each_tile(0, own_groups(), [&](int group, int tile, float (&x)[8]) {
      const int all = cta.rank * own_groups() + group;
      const uint4 words =
          make_uint4(pack_bf16(x[0], x[1]), pack_bf16(x[2], x[3]), pack_bf16(x[4], x[5]), pack_bf16(x[6], x[7]));
      float upper = x[0] * x[0] + x[1] * x[1] + x[4] * x[4] + x[5] * x[5];
      float lower = x[2] * x[2] + x[3] * x[3] + x[6] * x[6] + x[7] * x[7];
      for (int lanes = 1; lanes < 4; lanes *= 2) {
        upper += shuffle_xor(upper, lanes);
        lower += shuffle_xor(lower, lanes);
      }
      const uint4* to = smem.x() + (all * TILES + tile) * 32 + lane_of_warp();
      const float* sums = smem.squares() + all * 16 * TILES + 16 * tile + row_of(0);
#pragma unroll 1
      for (int r = 0; r < call.cluster; ++r) {
        store_remote(remote_address(to, r), words);
        if ((lane_of_warp() & 3) == 0) {
          store_remote(remote_address(sums, r), upper);
          store_remote(remote_address(sums + 8, r), lower);
        }
      }
      return false;
    });
  }

  // Waits for the h of all CTAs and computes the norm's factor of each row. It ends with a CTA's barrier.
  SLEEPKERN_DEVICE void wait_for_h(float eps) const {
    // mutant: no-cluster-barrier-before-h-is-read
    cluster_arrive();
    cluster_wait();
    for (int row = threadIdx.x; row < 16 * TILES; row += THREADS) {
      float sum = 0.0f;
      for (int g = 0; g < all_groups(); ++g) sum += smem.squares()[g * 16 * TILES + row];
      smem.scale()[row] = rsqrtf(quotient(sum, static_cast<float>(call.d)) + eps);
    }
    block_barrier();
  }

  // h <- h + left weight^T, where `left` is this CTA's part of the terms. Unless `last`, h is gathered afterwards.
  //
  // The partial sums are exchanged in steps, `exchange` n-groups of each CTA in one step, through two buffers in
  // alternation, the last step through `received`. So the buffer of one exchange is read while the next exchange writes
  // the other, and a CTA computes while others arrive at the barrier. A warp computes two n-groups at a time, both of
  // one exchange, or one of this exchange and one of the next.
  SLEEPKERN_DEVICE void add_product(WeightStream& weights, const uint4* left, int steps, bool last) const {
    const int exchanges = call.exchanges(), warp = threadIdx.x >> 5;
    const bool both =
        paired(TILES) && call.cluster * call.exchange > WARPS;  // call.pairs_in_exchange() with a constant
    cluster_arrive();                                           // this CTA has read x
    for (int n = 0; n < exchanges; ++n) {
      const bool follows =
          paired(TILES) && !both && n + 1 < exchanges;  // the warp's second n-group belongs to the next exchange
      const int groups = call.exchange_size(n), others = both      ? groups - WARPS
                                                         : follows ? call.exchange_size(n + 1)
                                                                   : 0;
      Products<TILES> one, other;
      if (warp < groups) multiply_groups<TILES>(weights, left, steps, warp < others, one, other);
      reduce_scatter_add(n - 1, exchanges);
      if (warp < groups) reduce_scatter_send(buffer_of(n, exchanges), warp, one);
      if (both && warp < others) reduce_scatter_send(buffer_of(n, exchanges), warp + WARPS, other);
      cluster_arrive();
      if (!follows) continue;
      reduce_scatter_add(n, exchanges);
      ++n;
      if (warp < others) reduce_scatter_send(buffer_of(n, exchanges), warp, other);
      cluster_arrive();
    }
    reduce_scatter_add(exchanges - 1, exchanges);
    if (!last) all_gather_h();
  }

  // mutant: one-buffer-for-two-exchanges
  SLEEPKERN_DEVICE float* buffer_of(int n, int exchanges) const { return smem.received((exchanges - 1 - n) & 1); }

  // Sends the i-th n-group of an exchange to the CTA of its columns.
  SLEEPKERN_DEVICE void reduce_scatter_send(float* buffer, int i, const Products<TILES>& acc) const {
    const Division of = divide(i, call.cluster);
    const int slot = cta.rank * call.exchange + of.quotient;
    const float4* to = reinterpret_cast<const float4*>(buffer) + slot * TILES * 64 + lane_of_warp();
    const RemoteAddress at = remote_address(to, of.rest);
#pragma unroll
    for (int tile = 0; tile < TILES; ++tile) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const float (&x)[4] = acc[tile][half];
        store_remote(at + tile * 1024 + half * 512,
                     make_uint4(as_bits(x[0]), as_bits(x[1]), as_bits(x[2]), as_bits(x[3])));
      }
    }
  }

  // Waits for all CTAs, then adds the partial sums of exchange n to h in the order of ranks.
  SLEEPKERN_DEVICE void reduce_scatter_add(int n, int exchanges) const {
    // mutant: no-cluster-wait-before-partials-are-added
    cluster_wait();
    if (n < 0) return;
    const float4* buffer = reinterpret_cast<const float4*>(buffer_of(n, exchanges));
    const int first = n * call.exchange,
              end = first + call.exchange < own_groups() ? first + call.exchange : own_groups();
    each_tile(first, end, [&](int group, int tile, float (&x)[8]) {
#pragma unroll 2
      for (int r = 0; r < call.cluster; ++r) {
        const float4* part = buffer + ((r * call.exchange + group - first) * TILES + tile) * 64 + lane_of_warp();
        const float4 a = part[0], b = part[32];
        const float y[8] = {a.x, a.y, a.z, a.w, b.x, b.y, b.z, b.w};
#pragma unroll
        for (int i = 0; i < 8; ++i) x[i] += y[i];
      }
      return true;
    });
  }

  // Stores q, k, v and gate as a tile.
  SLEEPKERN_DEVICE void store_inputs(const BlockLayer& layer, int group, const Products<TILES>& acc) const {
#pragma unroll
    for (int tile = 0; tile < TILES; ++tile) {
#pragma unroll
      for (int n = 0; n < 2; ++n) {
#pragma unroll
        for (int i = 0; i < 4; i += 2) {
          const int row = 16 * tile + row_of(i), column = 16 * group + column_of(n, i);
          const float scale = smem.scale()[row];
          store_pair<Mode::bf16>(smem.wide(), layer.into, row, column, acc[tile][n][i] * scale,
                                 acc[tile][n][i + 1] * scale);
        }
      }
    }
  }

  // Computes log decay and beta of the value heads. These are few columns, and one warp alone would take as long for
  // them as all warps take for q, k, v and gate. So the warps share the terms (split K), and their partial sums are
  // added in order. The partial sums are in the memory of `received`, to which no CTA writes before this one has
  // arrived at an exchange.
  SLEEPKERN_DEVICE void find_rates(const BlockLayer& layer, WeightStream& weights) const {
    const int warp = threadIdx.x >> 5, splits = call.splits();
    float4* parts = reinterpret_cast<float4*>(smem.received(false));
    for (int group = 0; group < (layer.rates() + 15) / 16; ++group) {
      if (warp < splits) {
        Products<TILES> acc, none;
        multiply_groups<TILES>(weights, smem.x(), all_groups(), false, acc, none, warp, splits);
#pragma unroll
        for (int tile = 0; tile < TILES; ++tile) {
#pragma unroll
          for (int n = 0; n < 2; ++n) {
            const float (&x)[4] = acc[tile][n];
            parts[((warp * TILES + tile) * 2 + n) * 32 + lane_of_warp()] = make_float4(x[0], x[1], x[2], x[3]);
          }
        }
      }
      block_barrier();
      for (int e = threadIdx.x; e < 2 * TILES * 128; e += THREADS) {
        const int i = e & 3, lane = e >> 2 & 31, half = e >> 7 & 1, tile = e >> 8;
        const int row = 16 * tile + (lane >> 2) + 8 * (i >> 1);
        const int number = 16 * group + 8 * half + 2 * (lane & 3) + (i & 1);
        if (number >= layer.rates()) continue;
        float sum = 0.0f;
        for (int w = 0; w < splits; ++w) sum += reinterpret_cast<const float*>(parts)[w * TILES * 256 + e];
        smem.rates()[row * layer.rates() + number] = rate(layer, number, sum * smem.scale()[row]);
      }
      block_barrier();
    }
  }
  SLEEPKERN_DEVICE static float rate(const BlockLayer& layer, int i, float x) {
    if (i >= layer.value_heads) return layer.strength * sigmoid(x);
    x += layer.decay_bias;  // log sigmoid
    return fminf(x, 0.0f) - log_of(1.0f + decayed(-fabsf(x)));
  }

  // Stores relu(up)^2 as a left operand.
  SLEEPKERN_DEVICE void store_hidden(const BlockLayer& layer, int group, const Products<TILES>& acc) const {
    uint4* to = reinterpret_cast<uint4*>(smem.wide()) + group * TILES * 32 + lane_of_warp();
#pragma unroll
    for (int tile = 0; tile < TILES; ++tile) {
      float x[2][4];
#pragma unroll
      for (int n = 0; n < 2; ++n) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const float y = fmaxf(acc[tile][n][i] * smem.scale()[16 * tile + row_of(i)], 0.0f);
          x[n][i] = y * y;
        }
      }
      const Fragment<Mode::bf16> f = left_of<Mode::bf16>(x, 0);
      to[tile * 32] = make_uint4(f.high[0], f.high[1], f.high[2], f.high[3]);
    }
  }

  // The mixer, then the MLP, as two iterations of one loop: most instructions run once a layer, so their number matters
  // for the instruction cache. With the widest states a loop would take too many registers, and is unrolled.
  SLEEPKERN_DEVICE void run_layer(const BlockLayer& layer, WeightStream& weights, int pass, bool last) const {
#pragma unroll KEYS / 64
    for (int half = 0; half < 2; ++half) {
      const bool mixer = half == 0;
      wait_for_h(mixer ? layer.mixer_eps : layer.mlp_eps);
      product<TILES>(weights, smem.x(), all_groups(), (mixer ? layer.into : layer.hidden) / 16,
                     [&](int group, const Products<TILES>& acc) {
                       mixer ? store_inputs(layer, group, acc) : store_hidden(layer, group, acc);
                     });
      if (mixer) {
        find_rates(layer, weights);
        // mutant: no-barrier-before-the-mixer
        block_barrier();
        layer.recurrent ? mix_recurrent<KEYS>(call, layer, cta, smem, pass)
                        : attend<KEYS>(call, layer, cta, smem, pass);
      }
      block_barrier();
      add_product(weights, SmemLayout::at<uint4>(mixer ? call.at.x : call.at.wide),
                  (mixer ? layer.mixed() : layer.hidden) / 16, last && !mixer);
    }
  }

  // h <- h / rms(h) + the input of the first pass. h has been gathered before, and is gathered again.
  SLEEPKERN_DEVICE void reinject() const {
    wait_for_h(REINJECT_EPS);
    each_tile(0, own_groups(), [&](int group, int tile, float (&x)[8]) {
#pragma unroll
      for (int i = 0; i < 8; ++i) x[i] *= smem.scale()[16 * tile + row_of(i & 3)];
      each_number(group, tile, [&](int i, int64_t at) { x[i] += load_one(call.h, static_cast<Type>(call.type), at); });
      return true;
    });
    cluster_arrive();  // this CTA has read the sums of squares
    cluster_wait();
    all_gather_h();
  }
};

template <int TILES, int KEYS>
SLEEPKERN_DEVICE void run_group(const BlocksParams& call) {
  const SmemLayout smem{call};
  const Cta cta(call);
  smem.use();
  if (threadIdx.x == 0) {
    for (int i = 0; i < WARPS * call.ring; ++i) mbarrier_create(smem.mbarriers() + i, 32);
  }
  cluster_arrive();  // all CTAs have started, and their shared memory can be written
  cluster_wait();
  WeightStream weights(call, cta.rank, smem.ring(), smem.mbarriers());
  const ClusterGroup<TILES, KEYS> group{call, smem, cta};
  group.load();
  group.all_gather_h();
  for (int pass = 0; pass < call.passes; ++pass) {
    if (pass > 0 && call.reinject) group.reinject();
    for (int i = 0; i < call.depth; ++i) {
      group.run_layer(call.layers[i], weights, pass, pass + 1 == call.passes && i + 1 == call.depth);
    }
  }
  group.store();
}

// KEYS is the width of the widest head. Without clusters a CTA has all columns of h, which leaves memory for few rows.
template <int TILES, int KEYS>
SLEEPKERN_KERNEL(THREADS, 1)
blocks_kernel(SLEEPKERN_CONSTANT BlocksParams call) {
  if constexpr (CLUSTERS || TILES <= ALONE) {
    run_group<TILES, KEYS>(call);
  } else {
    trap();  // planned for another device
  }
}

}  // namespace sleepkern::cuda
