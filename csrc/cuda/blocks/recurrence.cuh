// The recurrence over a window, 16 tokens at a time. For one such token block with tokens i and j, and G the running
// sum of log a:
//
//   M_ij = b_i k_i.k_j exp(G_i - G_j), i > j;  X = (I + M)^-1
//   P_ij = q_i.k_j exp(G_i - G_j), i >= j
//   D = X b (v - exp(G) S^T k)
//   o = exp(G) S^T q + P D
//   S <- exp(G_C) S + sum_j exp(G_C - G_j) k_j D_j^T
//
// First each warp computes X and P of a token block, X by exact substitution in float32. Then a warp scans a window for
// 16 value columns of a head: S^T [16][K] stays in registers, the accumulators of one product are the left operand of
// the next, and there is no barrier. The factors of k and q (1 / |k|, 1 / |q|, K^-1/2) are applied to the sums.
//
// The state is in global memory between two passes over a layer: the states of all layers do not fit on chip (Rule 110:
// 256 KB a window), and L2 returns one in less time than one of the layer's products takes.
#pragma once

#include "cuda/arch/mma_tiles.h"
#include "cuda/arch/ptx.h"
#include "cuda/blocks/operands.cuh"
#include "cuda/blocks/params.h"
#include "cuda/blocks/smem_layout.cuh"
#include "cuda/blocks/weight_stream.cuh"
#include "cuda/recurrence/params.h"

namespace sleepkern::cuda {

// One block of 16 tokens of a head: X and P as right operands, and the factors of its tokens.
struct TokenBlock {
  uint4* X;            // [lane]; M [16][16] is stored in the memory of X and P first
  uint4* P;            // [lane]
  float4* scale;       // [token] b, b exp(G) / |k|, exp(G) / |q|, exp(G_C - G) / |k|
  float* block_decay;  // exp(G_C)

  SLEEPKERN_DEVICE TokenBlock(const BlocksParams& c, const BlockLayer& l, const SmemLayout& m, int w, int head,
                              int block) {
    char* base =
        m.token_blocks(l) + static_cast<int64_t>((w * l.value_heads + head) * c.blocks() + block) * TOKEN_BLOCK_BYTES;
    X = reinterpret_cast<uint4*>(base);
    P = X + 32;
    scale = reinterpret_cast<float4*>(P + 32);
    block_decay = reinterpret_cast<float*>(scale + 16);
  }
};

template <class Each>
SLEEPKERN_DEVICE void each_token_block(const BlocksParams& c, const BlockLayer& l, const Cta& p, Each each) {
  const int tasks = p.windows * l.value_heads * c.blocks();
  for (int task = threadIdx.x >> 5; task < tasks; task += WARPS) {
    const Division of = divide(task, c.blocks()), window = divide(of.quotient, l.value_heads);
    each(window.quotient, window.rest, of.rest);
  }
}

SLEEPKERN_DEVICE void invert_token_block(const TokenBlock& factors, const float* M) {
  const int lane = lane_of_warp(), column = lane & 15;
  float x[16];
#pragma unroll
  for (int i = 0; i < 16; ++i) {
    float sum[4] = {i == column ? 1.0f : 0.0f, 0.0f, 0.0f, 0.0f};  // four independent sums
#pragma unroll
    for (int j = 0; j < i; j += 4) {
      const float4 four = *reinterpret_cast<const float4*>(M + 16 * i + j);
      const float row[4] = {four.x, four.y, four.z, four.w};
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        if (j + e < i) sum[e] -= row[e] * x[j + e];
      }
    }
    x[i] = sum[0] + sum[1] + (sum[2] + sum[3]);
  }
  warp_barrier();  // all lanes have read M
  uint16_t* X = reinterpret_cast<uint16_t*>(factors.X);
#pragma unroll
  for (int i = 0; i < 16; ++i) {  // both halves of the warp compute the same columns
    const int word = 2 * (i >> 3) + (column >> 3), owner = (i & 7) * 4 + ((column & 7) >> 1);
    if (lane < 16) X[2 * (4 * owner + word) + (column & 1)] = narrow<Mode::bf16>(x[i]);
  }
}

SLEEPKERN_DEVICE void token_block_factors(const BlocksParams& c, const BlockLayer& l, const Cta& p, const SmemLayout& m,
                                          int w, int head, int block) {
  const int lane = lane_of_warp(), rows = 16 * c.tiles, start = w * c.padded() + 16 * block;
  const int key_head = l.key_head(head), q_at = key_head * l.KP, k_at = l.heads * l.KP + q_at;
  const TokenBlock factors(c, l, m, w, head, block);
  // The lane's token; the upper half of the warp has the same tokens.
  const int token = lane & 15, row = start + token;
  float G = 0.0f, b = 0.0f, q_factor = 0.0f, k_factor = 0.0f;
  if (16 * block + token < c.L) {
    G = m.rates()[row * l.rates() + head];
    b = m.rates()[row * l.rates() + l.value_heads + head];
    q_factor = m.factors()[key_head * rows + row];
    k_factor = m.factors()[(l.heads + key_head) * rows + row];
  }
#pragma unroll
  for (int step = 1; step < 16; step *= 2) {
    const float other = shuffle_up(G, step);
    if (token >= step) G += other;
  }
  const float last = shuffle_from(G, 15), grown = decayed(G);
  if (lane < 16) {
    factors.scale[token] = make_float4(b, b * k_factor * grown, q_factor * grown, k_factor * decayed(last - G));
    if (lane == 15) *factors.block_decay = grown;
  }
  const Blocks16 wide(c, m.wide(), l.into, w);
  float kk[2][4], qk[2][4];
  clear(kk);
  clear(qk);
#pragma unroll 1
  for (int d = 0; d < l.KP; d += 16) {
    const Fragment<Mode::bf16> k = wide.left(start, k_at + d), q = wide.left(start, q_at + d);
    const Fragment<Mode::bf16> right = wide.right(start, k_at + d);
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      mma<Mode::bf16>(kk[half], k, right, half);
      mma<Mode::bf16>(qk[half], q, right, half);
    }
  }
  float* M = reinterpret_cast<float*>(factors.X);
  float P[2][4], G_i[2], write[2], read[2];  // of the lane's two rows i
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    G_i[r] = shuffle_from(G, row_of(2 * r));
    write[r] = shuffle_from(b * k_factor, row_of(2 * r));
    read[r] = shuffle_from(q_factor, row_of(2 * r));
  }
#pragma unroll
  for (int n = 0; n < 2; ++n) {
#pragma unroll
    for (int odd = 0; odd < 2; ++odd) {
      const int j = column_of(n, odd);
      const float G_j = shuffle_from(G, j), k_scale = shuffle_from(k_factor, j);
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        const int e = 2 * r + odd, i = row_of(e);
        const float between = decayed(fminf(G_i[r] - G_j, 0.0f)) * k_scale;
        M[16 * i + j] = i > j ? write[r] * kk[n][e] * between : 0.0f;
        P[n][e] = i >= j ? read[r] * qk[n][e] * between : 0.0f;
      }
    }
  }
  // mutant: no-warp-barrier-before-inversion
  warp_barrier();
  invert_token_block(factors, M);
  factors.P[lane] = make_uint4(pack_bf16(P[0][0], P[0][1]), pack_bf16(P[1][0], P[1][1]), pack_bf16(P[0][2], P[0][3]),
                               pack_bf16(P[1][2], P[1][3]));
}

// S^T [16 value columns from v0 on][K] of a head of a window, and its address.
template <int KEYS>
struct StateTile {
  static constexpr int TILES = KEYS / 8;
  float S[TILES][4];
  float* at;  // [K][V]
  int K, V, v0;

  SLEEPKERN_DEVICE StateTile(float* at, int K, int V, int v0) : at(at), K(K), V(V), v0(v0) { clear(S); }

  // Calls f(n, i, address of S[n][i], in_bounds) for FIRST <= n < LAST; padding is not in bounds.
  template <int FIRST, int LAST, class Each>
  SLEEPKERN_DEVICE void each(Each f) const {
    const int k = column_of(FIRST, 0), v = v0 + row_of(0), left = K - column_of(0, 0);
    const bool low = v < V, high = v + 8 < V;
    float* p = at + k * V + v;
#pragma unroll
    for (int n = FIRST; n < LAST; ++n) {
      if (8 * n >= K) continue;
      float* next = p + V;
      f(n, 0, p, low && 8 * n < left);
      f(n, 1, next, low && 8 * n + 1 < left);
      f(n, 2, p + 8, high && 8 * n < left);
      f(n, 3, next + 8, high && 8 * n + 1 < left);
      p += opaque(8 * V);  // without opaque all addresses are computed before the first is used
    }
  }

  SLEEPKERN_DEVICE void load() {
    each<0, TILES>([&](int n, int i, const float* from, bool there) { S[n][i] = there ? *from : 0.0f; });
  }

  // Stores the state, and adds the squares of its change to `change` and of its elements to `size`; if not `begun`, the
  // state before was zero. All old elements from FIRST to LAST are loaded first, so that the loads overlap.
  template <int FIRST, int LAST>
  SLEEPKERN_DEVICE void store(bool begun, float& change, float& size) const {
    float before[LAST - FIRST][4];
    clear(before);
    if (begun) {
      each<FIRST, LAST>(
          [&](int n, int i, const float* from, bool there) { before[n - FIRST][i] = there ? *from : 0.0f; });
    }
    each<FIRST, LAST>([&](int n, int i, float* to, bool there) {
      const float step = S[n][i] - before[n - FIRST][i];
      change += step * step;
      size += S[n][i] * S[n][i];
      if (there) *to = S[n][i];
    });
  }
};

// Scans window w for 16 value columns from v0 on of value head `head`.
template <int KEYS>
SLEEPKERN_DEVICE void state_pass(const BlocksParams& c, const BlockLayer& l, const Cta& p, const SmemLayout& m,
                                 int pass, int w, int head, int v0) {
  const int steps = l.KP / 16, HV = c.cluster * l.value_heads, number = p.rank * l.value_heads + head;
  const int q_at = l.key_head(head) * l.KP, k_at = l.heads * l.KP + q_at;
  const int v_at = 2 * l.heads * l.KP + head * l.VP + v0;
  const int into = opaque(l.into);  // without opaque all offsets in the tile are computed before the loop
  const Blocks16 wide(c, m.wide(), into, w);
  const bool begun = l.continued || pass > 0;
  using Tile = StateTile<KEYS>;
  Tile state(l.state + (static_cast<int64_t>(p.first + w) * HV + number) * l.K * l.V, l.K, l.V, v0);
  if (begun) state.load();
  for (int block = 0; block < c.blocks(); ++block) {
    const TokenBlock factors(c, l, m, w, head, block);
    const int start = w * c.padded() + 16 * block;
    float R[2][4], O[2][4], D[2][4];
    clear(R);
    clear(O);
    clear(D);
#pragma unroll
    for (int step = 0; step < Tile::TILES / 2; ++step) {
      if (step >= steps) continue;
      const Fragment<Mode::bf16> left = left_of<Mode::bf16>(state.S, step);
      const Fragment<Mode::bf16> k = wide.right(start, k_at + 16 * step), q = wide.right(start, q_at + 16 * step);
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        mma<Mode::bf16>(R[half], left, k, half);
        mma<Mode::bf16>(O[half], left, q, half);
      }
    }
    float4 scale[2][2];
#pragma unroll
    for (int n = 0; n < 2; ++n) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        if (i < 2) scale[n][i] = factors.scale[column_of(n, i)];
        const float4& of = scale[n][i & 1];
        const int token = 16 * block + column_of(n, i);
        const uint16_t* v = m.wide() + at<Mode::bf16>(into, start + column_of(n, i), v_at + row_of(i));
        R[n][i] = token < c.L ? of.x * from_bf16(*v) - of.y * R[n][i] : 0.0f;
        O[n][i] *= of.z;
      }
    }
    const Fragment<Mode::bf16> X = load_fragment(factors.X + lane_of_warp()),
                               P = load_fragment(factors.P + lane_of_warp());
    const Fragment<Mode::bf16> rest = left_of<Mode::bf16>(R, 0);
#pragma unroll
    for (int half = 0; half < 2; ++half) mma<Mode::bf16>(D[half], rest, X, half);
    const Fragment<Mode::bf16> written = left_of<Mode::bf16>(D, 0);
#pragma unroll
    for (int half = 0; half < 2; ++half) mma<Mode::bf16>(O[half], written, P, half);
#pragma unroll
    for (int n = 0; n < 2; ++n) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        uint16_t* o = m.wide() + at<Mode::bf16>(into, start + column_of(n, i), v_at + row_of(i));
        if (16 * block + column_of(n, i) < c.L) *o = narrow<Mode::bf16>(O[n][i]);
        // mutant: written-values-are-not-decayed
        D[n][i] *= scale[n][i & 1].w;
      }
    }
    const Fragment<Mode::bf16> kept = left_of<Mode::bf16>(D, 0);
    const float block_decay = *factors.block_decay;
#pragma unroll
    for (int n = 0; n < Tile::TILES / 2; ++n) {
      if (n >= steps) continue;
      const Fragment<Mode::bf16> k = wide.right_transposed(start, k_at + 16 * n);
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        float (&S)[4] = state.S[2 * n + half];
#pragma unroll
        for (int i = 0; i < 4; ++i) S[i] *= block_decay;
        mma<Mode::bf16>(S, kept, k, half);
      }
    }
  }
  float change = 0.0f, size = 0.0f;
  state.template store<0, Tile::TILES / 2>(begun, change, size);
  state.template store<Tile::TILES / 2, Tile::TILES>(begun, change, size);
#pragma unroll
  for (int lanes = 1; lanes < 32; lanes *= 2) {
    change += shuffle_xor(change, lanes);
    size += shuffle_xor(size, lanes);
  }
  if (lane_of_warp() != 0) return;
  const int index = ((p.first + w) * HV + number) * (l.VP / 16) + v0 / 16;
  float* sums = c.changes + 2 * (static_cast<int64_t>(pass) * c.sums + l.first_sum + index);
  sums[0] = change;
  sums[1] = size;
}

}  // namespace sleepkern::cuda
