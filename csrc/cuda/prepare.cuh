// prepare: from k, beta and g of a chunk to what its passes need. One block a chunk of a head.
//
//   G = running sum of g   E = exp(G)   M_ij = b_i k_i.k_j exp(G_i - G_j), i > j   X = (I + M)^-1
//   W = X diag(b) (E k)    U = X diag(b) v    Kt_j = k_j exp(G_C - G_j)    Gam = exp(G_C)
//   P_ij = scale q_i.k_j exp(G_i - G_j), i >= j                            Qe_i = scale E_i q_i
//
// Exponents are never positive. The diagonal 16 x 16 blocks of X come from exact substitution in float32, those below
// from products of split tf32 numbers, which keep float32's precision: powers of M would not survive keys that are
// alike.
//
// Shared memory, in bytes at K = 128, bf16 (float32): keys and -W 16 K each (32 K); scratch: v 8 K (16 K), M 16 K, then
// X diag(b E) in its place; X^T 16 K and X diag(b) 8 K (16 K), before them q; gates, and G itself with channel decay,
// 32 K.
#pragma once

#include "cuda/rows.cuh"

namespace sleepkern::cuda {

constexpr float FORGET = -105.0f;  // exp of it is 0 in float32; differences of G stay exact where g is less, or -inf

template <Mode MODE, int KP, bool CHANNEL>
struct Workspace {
  using N = Number<MODE>;
  N* V;       // [CHUNK][VALUES]
  float* M;   // [CHUNK][CHUNK]
  N* XE;      // [CHUNK][CHUNK] X diag(b E), where M was
  float* XT;  // [CHUNK][CHUNK] X transposed
  N* XB;      // [CHUNK][CHUNK] X diag(b)
  N* Q;       // [CHUNK][KP], where XT and XB come to lie
  float* XD;  // [CHUNK][16] diagonal blocks of X
  float* G;   // see Decay
  float* beta;

  SLEEPKERN_BOTH explicit Workspace(Arena& arena) {
    V = arena.take<N>(CHUNK * VALUES);
    M = arena.take<float>(CHUNK * CHUNK);
    XE = reinterpret_cast<N*>(M);
    constexpr int inverse = CHUNK * CHUNK * (sizeof(float) + sizeof(N)), queries = CHUNK * KP * sizeof(N);
    XT = reinterpret_cast<float*>(arena.take<char>(inverse > queries ? inverse : queries));
    XB = reinterpret_cast<N*>(XT + CHUNK * CHUNK);
    Q = reinterpret_cast<N*>(XT);
    XD = arena.take<float>(CHUNK * 16);
    G = arena.take<float>(CHANNEL ? CHUNK * KP + CHUNK / 8 * KP : 2 * CHUNK);
    beta = arena.take<float>(CHUNK);
  }
};

// Shared memory of a block that prepares a chunk. P comes last, so that all other places are known when
// this is compiled.
template <Mode MODE, int KP, bool CHANNEL>
struct ChunkMemory {
  Arena arena;
  Number<MODE>*keys, *W;
  float *gamma, *sums;  // decay of the chunk; room for settles
  Workspace<MODE, KP, CHANNEL> scratch;
  Number<MODE>* P;

  SLEEPKERN_BOTH ChunkMemory(char* base, bool reads)
      : arena{base},
        keys(arena.take<Number<MODE>>(CHUNK * KP)),
        W(arena.take<Number<MODE>>(CHUNK * KP)),
        gamma(arena.take<float>(KP)),
        sums(arena.take<float>(SUMS)),
        scratch(arena),
        P(reads ? arena.take<Number<MODE>>(CHUNK * CHUNK) : nullptr) {}
};

// The running sum G is wanted in differences, which are small where G itself may be large. With one decay a token it is
// kept in two floats; with channel decay it starts anew every 16 rows, and whole blocks are added as needed.
template <int KP, bool CHANNEL>
struct Decay {
  const float* G;

  // exp(G_i - G_j), i >= j; with channel decay i and j in the same 16 rows.
  SLEEPKERN_DEVICE float between(int i, int j, int d) const {
    if (CHANNEL) return decayed(G[i * KP + d] - G[j * KP + d]);
    return decayed((G[i] - G[j]) + (G[CHUNK + i] - G[CHUNK + j]));
  }
  // exp(G_i).
  SLEEPKERN_DEVICE float from_start(int i, int d) const {
    if (CHANNEL) return decayed(G[i * KP + d] + before()[(i >> 4) * KP + d]);
    return decayed(G[i] + G[CHUNK + i]);
  }
  // exp(G_C - G_i).
  SLEEPKERN_DEVICE float to_end(int i, int d) const {
    if (CHANNEL) return decayed((G[(i | 15) * KP + d] - G[i * KP + d]) + after()[(i >> 4) * KP + d]);
    return between(CHUNK - 1, i, d);
  }
  // Sums over the blocks before and after a block, [4][KP] each.
  SLEEPKERN_DEVICE const float* before() const { return G + CHUNK * KP; }
  SLEEPKERN_DEVICE const float* after() const { return before() + CHUNK / 16 * KP; }
};

// G and beta of a chunk; what lies beyond its tokens has g = 0 and beta = 0.
template <int KP, bool CHANNEL>
SLEEPKERN_DEVICE void load_gates(const Problem& p, const Chunk& chunk, float* G, float* beta) {
  const int lane = lane_of_warp(), warp = threadIdx.x >> 5;
  if (CHANNEL) {
    for (int e = threadIdx.x; e < 4 * KP; e += THREADS) {
      const int d = e % KP;
      float sum = 0.0f;
      for (int j = 16 * (e / KP); j < 16 * (e / KP) + 16; ++j) {
        if (j < chunk.tokens && d < p.K) {
          sum += fmaxf(FORGET, load_one(p.g.data, p.g.type, (chunk.first + j) * p.g.stride + chunk.head * p.K + d));
        }
        G[j * KP + d] = sum;
      }
    }
  } else if (warp == 0) {
    float before = 0.0f, before_low = 0.0f;
    const auto add = [](float& high, float& low, float x, float x_low) {  // exact but for the low parts
      const float sum = high + x, part = sum - high;
      low += x_low + ((high - (sum - part)) + (x - part));
      high = sum;
    };
    for (int j = lane; j < CHUNK; j += 32) {
      float sum = 0.0f, low = 0.0f;
      if (j < chunk.tokens && p.g.data) {
        sum = fmaxf(FORGET, load_one(p.g.data, p.g.type, (chunk.first + j) * p.g.stride + chunk.head));
      }
      for (int step = 1; step < 32; step *= 2) {
        const float other = shuffle_up(sum, step), other_low = shuffle_up(low, step);
        if (lane >= step) add(sum, low, other, other_low);
      }
      add(sum, low, before, before_low);
      G[j] = sum;
      G[CHUNK + j] = low;
      before = shuffle_from(sum, 31);
      before_low = shuffle_from(low, 31);
    }
  }
  if (warp == WARPS - 1) {
    for (int j = lane; j < CHUNK; j += 32) {
      beta[j] = j >= chunk.tokens ? 0.0f
                : p.beta.data     ? load_one(p.beta.data, p.beta.type, (chunk.first + j) * p.beta.stride + chunk.head)
                                  : 1.0f;
    }
  }
}

// What Decay has of whole blocks of 16 rows.
template <int KP>
SLEEPKERN_DEVICE void sum_blocks(float* G) {
  float* sums = G + CHUNK * KP;
  for (int d = threadIdx.x; d < KP; d += THREADS) {
    float before = 0.0f, after = 0.0f;
    for (int I = 0; I < CHUNK / 16; ++I) {
      sums[I * KP + d] = before;
      before += G[(16 * I + 15) * KP + d];
    }
    for (int I = CHUNK / 16 - 1; I >= 0; --I) {
      sums[(CHUNK / 16 + I) * KP + d] = after;
      after += G[(16 * I + 15) * KP + d];
    }
  }
}

// The 16 x 16 block (I, J) of M, or of P for i >= j; element(i, j, x) takes x = left_i . right_j.
template <class Element>
SLEEPKERN_DEVICE void each_element(const float (&acc)[2][4], int I, int J, Element element) {
#pragma unroll
  for (int n = 0; n < 2; ++n) {
    for (int i = 0; i < 4; ++i) element(16 * I + row_of(i), 16 * J + column_of(n, i), acc[n][i]);
  }
}

// M and P with one decay a token: the decay is a factor of the finished products.
template <Mode MODE, int KP, bool CHANNEL>
SLEEPKERN_DEVICE void scores(const Problem& p, const Chunk& chunk, const Number<MODE>* keys,
                             const Workspace<MODE, KP, CHANNEL>& w, Number<MODE>* P) {
  const int blocks = chunk.blocks(), warp = threadIdx.x >> 5;
  const int pairs = blocks * (blocks + 1) / 2;
  for (int task = warp; task < (P ? 2 * pairs : pairs); task += WARPS) {
    const bool read = task >= pairs;
    int I = 0, J = read ? task - pairs : task;
    while (J > I) J -= ++I;
    float acc[2][4];
    clear(acc);
    const LeftReader<MODE, KP> left(read ? w.Q : keys);
    const RightReader<MODE, KP> right(keys);
    for (int step = 0; step < KP / STEP<MODE>; ++step) multiply<MODE>(acc, left.load(I, step), right, step, 1, J);
    const Decay<KP, CHANNEL> decay{w.G};
    each_element(acc, I, J, [&](int i, int j, float x) {
      if (read) {
        put<MODE>(P, CHUNK, i, j, i >= j ? p.scale * x * decay.between(i, j, 0) : 0.0f);
      } else {
        put<Mode::exact>(w.M, CHUNK, i, j, i > j ? w.beta[i] * x * decay.between(i, j, 0) : 0.0f);
      }
    });
  }
}

// X = (I + M)^-1: XD and XT. First the diagonal blocks, a lane a column; then the blocks below them, a warp a column of
// blocks: X_IJ^T = -(sum of X_LJ^T M_IL^T over J <= L < I) X_II^T.
template <Mode MODE, int KP, bool CHANNEL>
SLEEPKERN_DEVICE void invert(const Chunk& chunk, const Workspace<MODE, KP, CHANNEL>& w) {
  constexpr Mode FULL = Mode::exact;
  const int blocks = chunk.blocks(), warp = threadIdx.x >> 5, J = threadIdx.x >> 4, c = threadIdx.x & 15;
  if (J < blocks) {
    float x[16];
#pragma unroll
    for (int i = 0; i < 16; ++i) {
      x[i] = i == c ? 1.0f : 0.0f;
#pragma unroll
      for (int j = 0; j < 16; ++j) {
        if (j < i) x[i] -= w.M[at<FULL>(CHUNK, 16 * J + i, 16 * J + j)] * x[j];
      }
      w.XD[at<FULL>(16, 16 * J + i, c)] = x[i];
      w.XT[at<FULL>(CHUNK, 16 * J + c, 16 * J + i)] = x[i];
    }
  }
  block_barrier();
  const LeftReader<FULL, CHUNK> above(w.XT);
  const RightReader<FULL, CHUNK> erased(w.M);
  const RightReader<FULL, 16> diagonal(w.XD);
  for (int I = warp + 1; I < blocks; ++I) {
    float sum[2][4], block[2][4];
    clear(sum);
    clear(block);
    for (int step = 2 * warp; step < 2 * I; ++step) multiply<FULL>(sum, above.load(warp, step), erased, step, 1, I);
#pragma unroll
    for (int step = 0; step < 2; ++step) multiply<FULL>(block, left_of<FULL>(sum, step), diagonal, step, 1, I);
    each_element(block, warp, I, [&](int j, int i, float x) { w.XT[at<FULL>(CHUNK, j, i)] = -x; });
    warp_barrier();
  }
  block_barrier();
}

// X diag(b E) and X diag(b), as left operands.
template <Mode MODE, int KP, bool CHANNEL>
SLEEPKERN_DEVICE void scale_inverse(const Chunk& chunk, const Workspace<MODE, KP, CHANNEL>& w) {
  const int rows = 16 * chunk.blocks();
  const Decay<KP, CHANNEL> decay{w.G};
  for (int e = threadIdx.x; e < CHUNK * CHUNK / 2; e += THREADS) {
    const int i = e & (CHUNK - 1), j = 2 * (e / CHUNK);
    float x[2] = {}, y[2] = {};
    for (int n = 0; n < 2; ++n) {
      if (i < rows && j + n <= i) x[n] = w.XT[at<Mode::exact>(CHUNK, j + n, i)] * w.beta[j + n];
      if (!CHANNEL) y[n] = x[n] * decay.from_start(j + n, 0);
    }
    put_pair<MODE>(w.XB, CHUNK, i, j, x[0], x[1]);
    if (!CHANNEL) put_pair<MODE>(w.XE, CHUNK, i, j, y[0], y[1]);
  }
}

// -W [CHUNK][KP] = -X diag(b) (E k), 16 rows and half the columns a warp; rows beyond the tokens become 0.
template <Mode MODE, int KP>
SLEEPKERN_DEVICE void erase_factor(const Chunk& chunk, const Number<MODE>* inverse, const Number<MODE>* keys,
                                   Number<MODE>* W) {
  static_assert(WARPS == 8 && CHUNK == 64, "a warp takes a quarter of the rows and half of the columns");
  const int warp = threadIdx.x >> 5, I = warp >> 1, half = warp & 1;
  float acc[KP / 16][4];
  clear(acc);
  if (I < chunk.blocks()) {
    const LeftReader<MODE, CHUNK> left(inverse);
    const TransposedReader<MODE, KP, true> right(keys);
    for (int step = 0; step < 16 * (I + 1) / STEP<MODE>; ++step) {
      multiply<MODE>(acc, left.load(I, step), right, step, KP / 32, half * KP / 32);
    }
  }
#pragma unroll
  for (int n = 0; n < KP / 16; ++n) {
#pragma unroll
    for (int i = 0; i < 4; i += 2) {
      put_pair<MODE>(W, KP, 16 * I + row_of(i), half * KP / 2 + column_of(n, i), -acc[n][i], -acc[n][i + 1]);
    }
  }
}

// U of 16 value columns as accumulators U^T [16][CHUNK]; group counts the groups of the tile.
template <Mode MODE, int KP, bool CHANNEL>
SLEEPKERN_DEVICE void write_factor(const Workspace<MODE, KP, CHANNEL>& w, int group, int blocks,
                                   float (&U)[CHUNK / 8][4]) {
  const TransposedReader<MODE, VALUES, false> left(w.V);
  const RightReader<MODE, CHUNK> right(w.XB);
  clear(U);
  for (int step = 0; step < 16 * blocks / STEP<MODE>; ++step) {
    multiply<MODE>(U, left.load(group, step), right, step, blocks);
  }
}

// Qe into the place of q.
template <Mode MODE, int KP, bool CHANNEL>
SLEEPKERN_DEVICE void load_queries(const Problem& p, const Chunk& chunk, Number<MODE>* Q, const float* G) {
  const int64_t offset = static_cast<int64_t>(chunk.head / static_cast<int>(p.HV / p.H)) * p.K;
  const Decay<KP, CHANNEL> decay{G};
  load_tile<MODE, KP>(Q, p.q, chunk, offset, p.K, p.normalize,
                      [&](int row, int d, float x) { return p.scale * x * decay.from_start(row, d); });
}

template <Mode MODE, int KP, bool CHANNEL>
SLEEPKERN_DEVICE void channel_scores(const Problem& p, const Chunk& chunk, const Number<MODE>* keys,
                                     const Workspace<MODE, KP, CHANNEL>& w, Number<MODE>* P);

// All but U and Qe. keys and W are tiles [CHUNK][KP]; P [CHUNK][CHUNK], nullptr where nothing is read. Ends with a
// barrier, and leaves keys without their decay for finish_keys.
template <Mode MODE, int KP, bool CHANNEL>
SLEEPKERN_DEVICE void prepare_chunk(const Problem& p, const Chunk& chunk, Number<MODE>* keys, Number<MODE>* W,
                                    Number<MODE>* P, const Workspace<MODE, KP, CHANNEL>& w) {
  const int64_t offset = static_cast<int64_t>(chunk.head / static_cast<int>(p.HV / p.H)) * p.K;
  auto plain = [](int, int, float x) { return x; };
  load_gates<KP, CHANNEL>(p, chunk, w.G, w.beta);
  load_tile<MODE, KP>(keys, p.k, chunk, offset, p.K, p.normalize, plain);
  if (P) {
    load_tile<MODE, KP>(w.Q, p.q, chunk, offset, p.K, p.normalize, plain);
    for (int e = threadIdx.x; e < CHUNK * CHUNK; e += THREADS) P[e] = 0;  // the blocks above the diagonal
  }
  block_barrier();
  if constexpr (CHANNEL) {
    sum_blocks<KP>(w.G);
    block_barrier();
    channel_scores<MODE, KP, CHANNEL>(p, chunk, keys, w, P);
  } else {
    scores<MODE, KP, CHANNEL>(p, chunk, keys, w, P);
  }
  block_barrier();
  invert<MODE, KP, CHANNEL>(chunk, w);
  scale_inverse<MODE, KP, CHANNEL>(chunk, w);
  if constexpr (CHANNEL) {
    load_tile<MODE, KP>(keys, p.k, chunk, offset, p.K, p.normalize,
                        [&](int row, int d, float x) { return x * Decay<KP, CHANNEL>{w.G}.from_start(row, d); });
  }
  block_barrier();
  erase_factor<MODE, KP>(chunk, CHANNEL ? w.XB : w.XE, keys, W);
  block_barrier();
}

// Kt in the place of k, and Gam; a barrier must follow.
template <Mode MODE, int KP, bool CHANNEL>
SLEEPKERN_DEVICE void finish_keys(const Problem& p, const Chunk& chunk, Number<MODE>* keys, float* gamma,
                                  const float* G) {
  const int64_t offset = static_cast<int64_t>(chunk.head / static_cast<int>(p.HV / p.H)) * p.K;
  const Decay<KP, CHANNEL> decay{G};
  load_tile<MODE, KP>(keys, p.k, chunk, offset, p.K, p.normalize,
                      [&](int row, int d, float x) { return x * decay.to_end(row, d); });
  for (int d = threadIdx.x; d < KP; d += THREADS) gamma[d] = decay.from_start(CHUNK - 1, d);
}

}  // namespace sleepkern::cuda

#include "cuda/prepare_channel.cuh"
