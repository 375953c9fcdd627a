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

  SLEEPKERN_DEVICE TokenBlock(const BlocksParams& call, const BlockLayer& layer, const SmemLayout& smem, int w,
                              int head, int block) {
    char* base = smem.token_blocks(layer) +
                 static_cast<int64_t>((w * layer.value_heads + head) * call.blocks() + block) * TOKEN_BLOCK_BYTES;
    X = reinterpret_cast<uint4*>(base);
    P = X + 32;
    scale = reinterpret_cast<float4*>(P + 32);
    block_decay = reinterpret_cast<float*>(scale + 16);
  }
};

template <class Each>
SLEEPKERN_DEVICE void each_token_block(const BlocksParams& call, const BlockLayer& layer, const Cta& cta, Each each) {
  const int tasks = cta.windows * layer.value_heads * call.blocks();
  for (int task = threadIdx.x >> 5; task < tasks; task += WARPS) {
    const Division of = divide(task, call.blocks()), window = divide(of.quotient, layer.value_heads);
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

// The scalars of a lane's token; the upper half of the warp has the same tokens.
struct TokenScalars {
  float G, beta, q_scale, k_scale;  // G is the running sum of log decay

  SLEEPKERN_DEVICE TokenScalars(const BlocksParams& call, const BlockLayer& layer, const SmemLayout& smem, int w,
                                int head, int block)
      : G(0.0f), beta(0.0f), q_scale(0.0f), k_scale(0.0f) {
    const int key_head = layer.key_head(head), rows = 16 * call.tiles;
    const int token = lane_of_warp() & 15, row = w * call.padded() + 16 * block + token;
    if (16 * block + token < call.L) {
      G = smem.rates()[row * layer.rates() + head];
      beta = smem.rates()[row * layer.rates() + layer.value_heads + head];
      q_scale = smem.factors()[key_head * rows + row];
      k_scale = smem.factors()[(layer.heads + key_head) * rows + row];
    }
#pragma unroll
    for (int step = 1; step < 16; step *= 2) {
      const float other = shuffle_up(G, step);
      if (token >= step) G += other;
    }
  }

  // Stores the factors by which the scan multiplies this token's terms, and the decay of the block.
  SLEEPKERN_DEVICE void store(const TokenBlock& factors) const {
    const int lane = lane_of_warp();
    const float last = shuffle_from(G, 15), grown = decayed(G);
    if (lane < 16) {
      factors.scale[lane] = make_float4(beta, beta * k_scale * grown, q_scale * grown, k_scale * decayed(last - G));
      if (lane == 15) *factors.block_decay = grown;
    }
  }
};

// k k^T and q k^T of 16 tokens from row `start` on of `wide`.
SLEEPKERN_DEVICE void token_block_grams(const Blocks16& wide, int start, int q_at, int k_at, int KP, float (&kk)[2][4],
                                        float (&qk)[2][4]) {
  clear(kk);
  clear(qk);
#pragma unroll 1
  for (int d = 0; d < KP; d += 16) {
    const Fragment<Mode::bf16> k = wide.left(start, k_at + d), q = wide.left(start, q_at + d);
    const Fragment<Mode::bf16> right = wide.right(start, k_at + d);
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      mma<Mode::bf16>(kk[half], k, right, half);
      mma<Mode::bf16>(qk[half], q, right, half);
    }
  }
}

// Stores M in shared memory and makes P of qk: both grams times the factors of their tokens and the decay between them.
SLEEPKERN_DEVICE void decay_grams(const TokenScalars& x, const float (&kk)[2][4], const float (&qk)[2][4], float* M,
                                  float (&P)[2][4]) {
  float G_i[2], write[2], read[2];  // of the lane's two rows i
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    G_i[r] = shuffle_from(x.G, row_of(2 * r));
    write[r] = shuffle_from(x.beta * x.k_scale, row_of(2 * r));
    read[r] = shuffle_from(x.q_scale, row_of(2 * r));
  }
#pragma unroll
  for (int n = 0; n < 2; ++n) {
#pragma unroll
    for (int odd = 0; odd < 2; ++odd) {
      const int j = column_of(n, odd);
      const float G_j = shuffle_from(x.G, j), k_scale = shuffle_from(x.k_scale, j);
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        const int e = 2 * r + odd, i = row_of(e);
        const float between = decayed(fminf(G_i[r] - G_j, 0.0f)) * k_scale;
        M[16 * i + j] = i > j ? write[r] * kk[n][e] * between : 0.0f;
        P[n][e] = i >= j ? read[r] * qk[n][e] * between : 0.0f;
      }
    }
  }
}

// Computes the factors of token block `block` of a head in window w, by one warp.
SLEEPKERN_DEVICE void token_block_factors(const BlocksParams& call, const BlockLayer& layer, const SmemLayout& smem,
                                          int w, int head, int block) {
  const int q_at = layer.key_head(head) * layer.KP, k_at = layer.heads * layer.KP + q_at;
  const TokenBlock factors(call, layer, smem, w, head, block);
  const TokenScalars tokens(call, layer, smem, w, head, block);
  tokens.store(factors);
  float kk[2][4], qk[2][4], P[2][4];
  token_block_grams(Blocks16(call, smem.wide(), layer.into, w), w * call.padded() + 16 * block, q_at, k_at, layer.KP,
                    kk, qk);
  float* M = reinterpret_cast<float*>(factors.X);
  decay_grams(tokens, kk, qk, M, P);
  // mutant: no-warp-barrier-before-inversion
  warp_barrier();
  invert_token_block(factors, M);
  factors.P[lane_of_warp()] = make_uint4(pack_bf16(P[0][0], P[0][1]), pack_bf16(P[1][0], P[1][1]),
                                         pack_bf16(P[0][2], P[0][3]), pack_bf16(P[1][2], P[1][3]));
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
    float* element = at + k * V + v;
#pragma unroll
    for (int n = FIRST; n < LAST; ++n) {
      if (8 * n >= K) continue;
      float* next = element + V;
      f(n, 0, element, low && 8 * n < left);
      f(n, 1, next, low && 8 * n + 1 < left);
      f(n, 2, element + 8, high && 8 * n < left);
      f(n, 3, next + 8, high && 8 * n + 1 < left);
      element += opaque(8 * V);  // without opaque all addresses are computed before the first is used
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

// The columns of a head in `wide`, whose rows have `into` columns: q, k, and 16 value columns.
struct HeadColumns {
  int q, k, v, steps, into;
};

// The elements of 16 tokens and 16 value columns in a lane, as accumulators.
using TokenValues = float[2][4];

// R = S^T k^T and O = S^T q^T of the 16 tokens from row `start` on.
template <int KEYS>
SLEEPKERN_DEVICE void multiply_state(const StateTile<KEYS>& state, const Blocks16& wide, const HeadColumns& head,
                                     int start, TokenValues& R, TokenValues& O) {
  clear(R);
  clear(O);
#pragma unroll
  for (int step = 0; step < StateTile<KEYS>::TILES / 2; ++step) {
    if (step >= head.steps) continue;
    const Fragment<Mode::bf16> left = left_of<Mode::bf16>(state.S, step);
    const Fragment<Mode::bf16> k = wide.right(start, head.k + 16 * step), q = wide.right(start, head.q + 16 * step);
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      mma<Mode::bf16>(R[half], left, k, half);
      mma<Mode::bf16>(O[half], left, q, half);
    }
  }
}

// From R and O of multiply_state: D, the values that the block writes, times their decay to its end; o replaces v.
SLEEPKERN_DEVICE void correct_values(const TokenBlock& factors, const HeadColumns& head, uint16_t* tile, int start,
                                     int tokens, TokenValues& R, TokenValues& O, TokenValues& D) {
  float4 scale[2][2];
#pragma unroll
  for (int n = 0; n < 2; ++n) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if (i < 2) scale[n][i] = factors.scale[column_of(n, i)];
      const float4& of = scale[n][i & 1];
      const uint16_t* v = tile + at<Mode::bf16>(head.into, start + column_of(n, i), head.v + row_of(i));
      R[n][i] = column_of(n, i) < tokens ? of.x * from_bf16(*v) - of.y * R[n][i] : 0.0f;
      O[n][i] *= of.z;
    }
  }
  const Fragment<Mode::bf16> X = load_fragment(factors.X + lane_of_warp()),
                             P = load_fragment(factors.P + lane_of_warp());
  const Fragment<Mode::bf16> rest = left_of<Mode::bf16>(R, 0);
  clear(D);
#pragma unroll
  for (int half = 0; half < 2; ++half) mma<Mode::bf16>(D[half], rest, X, half);
  const Fragment<Mode::bf16> written = left_of<Mode::bf16>(D, 0);
#pragma unroll
  for (int half = 0; half < 2; ++half) mma<Mode::bf16>(O[half], written, P, half);
#pragma unroll
  for (int n = 0; n < 2; ++n) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      uint16_t* o = tile + at<Mode::bf16>(head.into, start + column_of(n, i), head.v + row_of(i));
      if (column_of(n, i) < tokens) *o = narrow<Mode::bf16>(O[n][i]);
      // mutant: written-values-are-not-decayed
      D[n][i] *= scale[n][i & 1].w;
    }
  }
}

// S^T <- block_decay S^T + D^T k.
template <int KEYS>
SLEEPKERN_DEVICE void update_state(StateTile<KEYS>& state, const Blocks16& wide, const HeadColumns& head, int start,
                                   float block_decay, const TokenValues& D) {
  const Fragment<Mode::bf16> written = left_of<Mode::bf16>(D, 0);
#pragma unroll
  for (int n = 0; n < StateTile<KEYS>::TILES / 2; ++n) {
    if (n >= head.steps) continue;
    const Fragment<Mode::bf16> k = wide.right_transposed(start, head.k + 16 * n);
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      float (&S)[4] = state.S[2 * n + half];
#pragma unroll
      for (int i = 0; i < 4; ++i) S[i] *= block_decay;
      mma<Mode::bf16>(S, written, k, half);
    }
  }
}

// Stores the state of a warp, and adds up its sums of squares: of its change, and of itself.
template <int KEYS>
SLEEPKERN_DEVICE void store_state_and_sums(const StateTile<KEYS>& state, bool begun, float* sums) {
  constexpr int TILES = StateTile<KEYS>::TILES;
  float change = 0.0f, size = 0.0f;
  state.template store<0, TILES / 2>(begun, change, size);
  state.template store<TILES / 2, TILES>(begun, change, size);
#pragma unroll
  for (int lanes = 1; lanes < 32; lanes *= 2) {
    change += shuffle_xor(change, lanes);
    size += shuffle_xor(size, lanes);
  }
  if (lane_of_warp() != 0) return;
  sums[0] = change;
  sums[1] = size;
}

// Scans window w for 16 value columns from v0 on of value head `head`.
template <int KEYS>
SLEEPKERN_DEVICE void state_pass(const BlocksParams& call, const BlockLayer& layer, const Cta& cta,
                                 const SmemLayout& smem, int pass, int w, int head, int v0) {
  const int HV = call.cluster * layer.value_heads, number = cta.rank * layer.value_heads + head,
            q_at = layer.key_head(head) * layer.KP;
  // without opaque all offsets in the tile are computed before the loop
  const HeadColumns columns{q_at, layer.heads * layer.KP + q_at, 2 * layer.heads * layer.KP + head * layer.VP + v0,
                            layer.KP / 16, opaque(layer.into)};
  const Blocks16 wide(call, smem.wide(), columns.into, w);
  const bool begun = layer.continued || pass > 0;
  StateTile<KEYS> state(layer.state + (static_cast<int64_t>(cta.first + w) * HV + number) * layer.K * layer.V, layer.K,
                        layer.V, v0);
  if (begun) state.load();
  for (int block = 0; block < call.blocks(); ++block) {
    const TokenBlock factors(call, layer, smem, w, head, block);
    const int start = w * call.padded() + 16 * block;
    TokenValues R, O, D;
    multiply_state(state, wide, columns, start, R, O);
    correct_values(factors, columns, smem.wide(), start, call.L - 16 * block, R, O, D);
    update_state(state, wide, columns, start, *factors.block_decay, D);
  }
  const int index = ((cta.first + w) * HV + number) * (layer.VP / 16) + v0 / 16;
  store_state_and_sums(state, begun,
                       call.changes + 2 * (static_cast<int64_t>(pass) * call.sums + layer.first_sum + index));
}

}  // namespace sleepkern::cuda
