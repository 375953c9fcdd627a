// Gradients through the grams of channel decay: the backward of the dyadic split in chunk_factors_channel.h.
//
//   dq_i  += sum_j dP_ij k_j exp(G_i - G_j)         z_i += sum_j dM_ij k_j exp(G_i - G_j)
//   dk-_j += sum_i (dP_ij q_i + b_i dM_ij k_i) exp(G_i - G_j)
//
// At each level the factor is exp(G_i - R) exp(R - G_j): one exponential multiplies the operand, the other the result.
// All j of a level's first half are before all i of its second half. So a pair decays at a token t of the second half
// if i >= t, and at a token t of the first half if j < t. dg of t sums their terms of dq and z, times q_i and b_i k_i,
// or their terms of dk-, times k_j.
#pragma once

#include <cstdint>

#include "cpu/gemm/microkernel.h"
#include "cpu/recurrence/backward_buffers.h"
#include "cpu/recurrence/buffers.h"
#include "cpu/recurrence/chunk_factors_channel.h"
#include "cpu/recurrence/pack_tokens.h"
#include "cpu/simd/vec.h"

namespace sleepkern::SLEEPKERN_ISA {
namespace {

// Packs rows of k or q times the level's factors, transposed.
static void transpose_decayed(const Workspace& w, const float* rows, int64_t end, float* transposed) {
  for (int64_t t = 0; t < end; ++t) {
    for (int64_t d = 0; d < w.row_size; d += LANES) {
      store(w.rows + d, load(rows + t * w.row_size + d) * load(w.factors + t * w.row_size + d));
    }
    pack_row(w, w.rows, t, transposed);
  }
}

// Adds the tile's rows, times the factors of tokens t .. t + ROWS, to the tokens' rows of `out`. Adds the same times
// the tokens' rows x, and by[t] if given, to `gains`.
SLEEPKERN_INLINE void add_decayed(const Workspace& w, const Tile& tile, int64_t t, int64_t d, const float* x,
                                  const float* by, float* out, Tile& gains) {
  SLEEPKERN_EACH_ROW(r) {
    const int64_t at = (t + r) * w.row_size + d;
    float* to = out + d * CHUNK + (t + r) * PANEL;
    SLEEPKERN_EACH_VEC(n) {
      const Vec value = tile.at[r][n] * load(w.factors + at + n * LANES), gain = value * load(x + at + n * LANES);
      store(to + n * LANES, load(to + n * LANES) + value);
      gains.at[r][n] += by ? gain * by[t + r] : gain;
    }
  }
}

// Adds to dg of tokens t .. t + ROWS, of one key panel at d, the gains of the tokens from each on, in the tile and
// after it.
SLEEPKERN_INLINE void add_gains_after(const BackwardBuffers& a, const Tile& gains, int64_t t, int64_t d,
                                      Vec (&after)[VECS]) {
  SLEEPKERN_EACH_ROW(n) {
    const int r = ROWS - 1 - n;
    float* to = a.dgates + d * CHUNK + (t + r) * PANEL;
    SLEEPKERN_EACH_VEC(x) {
      after[x] += gains.at[r][x];
      store(to + x * LANES, load(to + x * LANES) + after[x]);
    }
  }
}

// Adds to dg of these tokens the gains of the tokens before each.
SLEEPKERN_INLINE void add_gains_before(const BackwardBuffers& a, const Tile& gains, int64_t t, int64_t d,
                                       Vec (&before)[VECS]) {
  SLEEPKERN_EACH_ROW(r) {
    float* to = a.dgates + d * CHUNK + (t + r) * PANEL;
    SLEEPKERN_EACH_VEC(x) {
      store(to + x * LANES, load(to + x * LANES) + before[x]);
      before[x] += gains.at[r][x];
    }
  }
}

// Computes the terms of dg from paths through the states at the chunk's ends. At this point dq, z and dk- hold only the
// terms of these paths.
SLEEPKERN_STAGE void gather_gates(const Chunk& c, const Workspace& w, const BackwardBuffers& a) {
  for (int64_t d = 0; d < w.K_rows; d += LANES) {
    const int64_t column = d / PANEL * PANEL * CHUNK + d % PANEL;
    Vec before = load(a.dchunk_decay + d), after{};
    for (int64_t t = 0; t < c.count; ++t) {
      store(a.dgates + column + t * PANEL, before);
      before += load(w.k_rows + t * w.row_size + d) * load(a.dk_panels + column + t * PANEL);
    }
    for (int64_t t = c.count - 1; t >= 0; --t) {
      const int64_t at = column + t * PANEL, row = t * w.row_size + d;
      if (c.p.want_output) after += load(w.q_rows + row) * load(a.dq_panels + at);
      if (c.p.delta) after += load(w.k_rows + row) * load(a.dz_panels + at) * w.beta[t];
      store(a.dgates + at, load(a.dgates + at) + after);
    }
  }
}

// One product of the split of one key panel at d: j are tokens [start, start + h), i are [start + h, start + 2h). The
// second half may end early, with the chunk's tokens.
SLEEPKERN_STAGE void backward_level(const Chunk& c, const Workspace& w, const BackwardBuffers& a, int64_t start,
                                    int64_t h, int64_t d) {
  const int64_t middle = start + h, after = min_of(middle + h, c.padded);
  const float *k = w.level_keys + d * CHUNK, *q = w.level_q_panels + d * CHUNK;
  Vec gains_after[VECS] = {}, gains_before[VECS] = {};
  for (int64_t i = after - ROWS; i >= middle; i -= ROWS) {
    const int64_t gram = column_at(i, CHUNK) + start * PANEL;
    Tile t, gains;
    clear(gains);
    if (c.p.want_output) {
      clear(t);
      multiply_add<1>(t, a.dgram_qk + gram, k + start * PANEL, h);
      add_decayed(w, t, i, d, w.q_rows, nullptr, a.dq_panels, gains);
    }
    if (c.p.delta) {
      clear(t);
      multiply_add<1>(t, a.dgram_kk + gram, k + start * PANEL, h);
      add_decayed(w, t, i, d, w.k_rows, w.beta, a.dz_panels, gains);
    }
    add_gains_after(a, gains, i, d, gains_after);
  }
  for (int64_t j = start; j < middle; j += ROWS) {
    const int64_t gram = column_at(j, CHUNK) + middle * PANEL;
    Tile t, gains;
    clear(t);
    clear(gains);
    if (c.p.want_output) multiply_add<1>(t, a.dgram_qk_transposed + gram, q + middle * PANEL, after - middle);
    if (c.p.delta) multiply_add<1>(t, a.dgram_kk_transposed + gram, k + middle * PANEL, after - middle);
    add_decayed(w, t, j, d, w.k_rows, nullptr, a.dk_panels, gains);
    add_gains_before(a, gains, j, d, gains_before);
  }
}

// The pairs j <= i of BASE neighbouring tokens, summed directly, for LANES channels from d on. `reach` of token i is
// the term of dg from its pairs with the tokens so far.
SLEEPKERN_INLINE void backward_base(const Chunk& c, const Workspace& w, const BackwardBuffers& a, int64_t start,
                                    int64_t d) {
  const int64_t column = d / PANEL * PANEL * CHUNK + d % PANEL;
  Vec reach[BASE] = {};
  for (int64_t j = start; j < start + BASE; ++j) {
    const Vec k = load(w.k_rows + j * w.row_size + d);
    Vec decay = broadcast(1.0f), dk{}, gain{};
    for (int64_t i = j; i < start + BASE; ++i) {
      if (i > j) decay = flush_subnormal(decay * load(w.gates + i * w.row_size + d));
      const int64_t gram = column_at(i, CHUNK) + j * PANEL, to = column + i * PANEL;
      Vec pair{};
      if (c.p.want_output) {
        const Vec f = decay * a.dgram_qk[gram];
        store(a.dq_panels + to, load(a.dq_panels + to) + f * k);
        pair += f * load(w.q_rows + i * w.row_size + d);
      }
      if (c.p.delta && i > j) {
        const Vec f = decay * a.dgram_kk[gram];
        store(a.dz_panels + to, load(a.dz_panels + to) + f * k);
        pair += f * w.beta[i] * load(w.k_rows + i * w.row_size + d);
      }
      dk += pair;
      if (i == j) continue;
      reach[i - start] += pair * k;
      gain += reach[i - start];
    }
    store(a.dk_panels + column + j * PANEL, load(a.dk_panels + column + j * PANEL) + dk);
    if (j + 1 == start + BASE) continue;
    float* next = a.dgates + column + (j + 1) * PANEL;
    store(next, load(next) + gain);
  }
}

SLEEPKERN_STAGE void backward_channel_grams(const Chunk& c, const Workspace& w, const BackwardBuffers& a) {
  const int64_t end = round_up(c.count, PANEL);
  for (int64_t h = CHUNK / 2; h >= BASE; h /= 2) {
    if (h >= c.padded) continue;
    split_decay(w, h);
    transpose_decayed(w, w.k_rows, end, w.level_keys);
    if (c.p.want_output) transpose_decayed(w, w.q_rows, end, w.level_q_panels);
    for (int64_t start = 0; start + h < c.padded; start += 2 * h) {
      for (int64_t d = 0; d < w.K_rows; d += PANEL) backward_level(c, w, a, start, h, d);
    }
  }
  for (int64_t start = 0; start < c.padded; start += BASE) {
    for (int64_t d = 0; d < w.K_rows; d += LANES) backward_base(c, w, a, start, d);
  }
}

}  // namespace
}  // namespace sleepkern::SLEEPKERN_ISA
