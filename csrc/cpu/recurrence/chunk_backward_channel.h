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
static void transpose_decayed(const Workspace& work, const float* rows, int64_t end, float* transposed) {
  for (int64_t t = 0; t < end; ++t) {
    for (int64_t d = 0; d < work.row_size; d += LANES) {
      store(work.rows + d, load(rows + t * work.row_size + d) * load(work.factors + t * work.row_size + d));
    }
    pack_row(work, work.rows, t, transposed);
  }
}

// Adds the tile's rows, times the factors of tokens t .. t + ROWS, to the tokens' rows of `out`. Adds the same times
// the tokens' rows x, and by[t] if given, to `gains`.
SLEEPKERN_INLINE void add_decayed(const Workspace& work, const Tile& tile, int64_t t, int64_t d, const float* x,
                                  const float* by, float* out, Tile& gains) {
  SLEEPKERN_EACH_ROW(r) {
    const int64_t at = (t + r) * work.row_size + d;
    float* to = out + d * CHUNK + (t + r) * PANEL;
    SLEEPKERN_EACH_VEC(n) {
      const Vec value = tile.at[r][n] * load(work.factors + at + n * LANES), gain = value * load(x + at + n * LANES);
      store(to + n * LANES, load(to + n * LANES) + value);
      gains.at[r][n] += by ? gain * by[t + r] : gain;
    }
  }
}

// Adds to dg of tokens t .. t + ROWS, of one key panel at d, the gains of the tokens from each on, in the tile and
// after it.
SLEEPKERN_INLINE void add_gains_after(const BackwardBuffers& grads, const Tile& gains, int64_t t, int64_t d,
                                      Vec (&after)[VECS]) {
  SLEEPKERN_EACH_ROW(n) {
    const int r = ROWS - 1 - n;
    float* to = grads.dgates + d * CHUNK + (t + r) * PANEL;
    SLEEPKERN_EACH_VEC(x) {
      after[x] += gains.at[r][x];
      store(to + x * LANES, load(to + x * LANES) + after[x]);
    }
  }
}

// Adds to dg of these tokens the gains of the tokens before each.
SLEEPKERN_INLINE void add_gains_before(const BackwardBuffers& grads, const Tile& gains, int64_t t, int64_t d,
                                       Vec (&before)[VECS]) {
  SLEEPKERN_EACH_ROW(r) {
    float* to = grads.dgates + d * CHUNK + (t + r) * PANEL;
    SLEEPKERN_EACH_VEC(x) {
      store(to + x * LANES, load(to + x * LANES) + before[x]);
      before[x] += gains.at[r][x];
    }
  }
}

// Computes the terms of dg from paths through the states at the chunk's ends. At this point dq, z and dk- hold only the
// terms of these paths.
SLEEPKERN_STAGE void gather_gates(const Chunk& chunk, const Workspace& work, const BackwardBuffers& grads) {
  for (int64_t d = 0; d < work.K_rows; d += LANES) {
    const int64_t column = d / PANEL * PANEL * CHUNK + d % PANEL;
    Vec before = load(grads.dchunk_decay + d), after{};
    for (int64_t t = 0; t < chunk.count; ++t) {
      store(grads.dgates + column + t * PANEL, before);
      before += load(work.k_rows + t * work.row_size + d) * load(grads.dk_panels + column + t * PANEL);
    }
    for (int64_t t = chunk.count - 1; t >= 0; --t) {
      const int64_t at = column + t * PANEL, row = t * work.row_size + d;
      if (chunk.problem.want_output) after += load(work.q_rows + row) * load(grads.dq_panels + at);
      if (chunk.problem.delta) after += load(work.k_rows + row) * load(grads.dz_panels + at) * work.beta[t];
      store(grads.dgates + at, load(grads.dgates + at) + after);
    }
  }
}

// One product of the split of one key panel at d: j are tokens [start, start + h), i are [start + h, start + 2h). The
// second half may end early, with the chunk's tokens.
SLEEPKERN_STAGE void backward_level(const Chunk& chunk, const Workspace& work, const BackwardBuffers& grads,
                                    int64_t start, int64_t h, int64_t d) {
  const int64_t middle = start + h, after = min_of(middle + h, chunk.padded);
  const float *k = work.level_keys + d * CHUNK, *q = work.level_q_panels + d * CHUNK;
  Vec gains_after[VECS] = {}, gains_before[VECS] = {};
  for (int64_t i = after - ROWS; i >= middle; i -= ROWS) {
    const int64_t gram = column_at(i, CHUNK) + start * PANEL;
    Tile t, gains;
    clear(gains);
    if (chunk.problem.want_output) {
      clear(t);
      multiply_add<1>(t, grads.dgram_qk + gram, k + start * PANEL, h);
      add_decayed(work, t, i, d, work.q_rows, nullptr, grads.dq_panels, gains);
    }
    if (chunk.problem.delta) {
      clear(t);
      multiply_add<1>(t, grads.dgram_kk + gram, k + start * PANEL, h);
      add_decayed(work, t, i, d, work.k_rows, work.beta, grads.dz_panels, gains);
    }
    add_gains_after(grads, gains, i, d, gains_after);
  }
  for (int64_t j = start; j < middle; j += ROWS) {
    const int64_t gram = column_at(j, CHUNK) + middle * PANEL;
    Tile t, gains;
    clear(t);
    clear(gains);
    if (chunk.problem.want_output)
      multiply_add<1>(t, grads.dgram_qk_transposed + gram, q + middle * PANEL, after - middle);
    if (chunk.problem.delta) multiply_add<1>(t, grads.dgram_kk_transposed + gram, k + middle * PANEL, after - middle);
    add_decayed(work, t, j, d, work.k_rows, nullptr, grads.dk_panels, gains);
    add_gains_before(grads, gains, j, d, gains_before);
  }
}

// The pairs j <= i of BASE neighbouring tokens, summed directly, for LANES channels from d on. `reach` of token i is
// the term of dg from its pairs with the tokens so far.
SLEEPKERN_INLINE void backward_base(const Chunk& chunk, const Workspace& work, const BackwardBuffers& grads,
                                    int64_t start, int64_t d) {
  const int64_t column = d / PANEL * PANEL * CHUNK + d % PANEL;
  Vec reach[BASE] = {};
  for (int64_t j = start; j < start + BASE; ++j) {
    const Vec k = load(work.k_rows + j * work.row_size + d);
    Vec decay = broadcast(1.0f), dk{}, gain{};
    for (int64_t i = j; i < start + BASE; ++i) {
      if (i > j) decay = flush_subnormal(decay * load(work.gates + i * work.row_size + d));
      const int64_t gram = column_at(i, CHUNK) + j * PANEL, to = column + i * PANEL;
      Vec pair{};
      if (chunk.problem.want_output) {
        const Vec f = decay * grads.dgram_qk[gram];
        store(grads.dq_panels + to, load(grads.dq_panels + to) + f * k);
        pair += f * load(work.q_rows + i * work.row_size + d);
      }
      if (chunk.problem.delta && i > j) {
        const Vec f = decay * grads.dgram_kk[gram];
        store(grads.dz_panels + to, load(grads.dz_panels + to) + f * k);
        pair += f * work.beta[i] * load(work.k_rows + i * work.row_size + d);
      }
      dk += pair;
      if (i == j) continue;
      reach[i - start] += pair * k;
      gain += reach[i - start];
    }
    store(grads.dk_panels + column + j * PANEL, load(grads.dk_panels + column + j * PANEL) + dk);
    if (j + 1 == start + BASE) continue;
    float* next = grads.dgates + column + (j + 1) * PANEL;
    store(next, load(next) + gain);
  }
}

SLEEPKERN_STAGE void backward_channel_grams(const Chunk& chunk, const Workspace& work, const BackwardBuffers& grads) {
  const int64_t end = round_up(chunk.count, PANEL);
  for (int64_t h = CHUNK / 2; h >= BASE; h /= 2) {
    if (h >= chunk.padded) continue;
    split_decay(work, h);
    transpose_decayed(work, work.k_rows, end, work.level_keys);
    if (chunk.problem.want_output) transpose_decayed(work, work.q_rows, end, work.level_q_panels);
    for (int64_t start = 0; start + h < chunk.padded; start += 2 * h) {
      for (int64_t d = 0; d < work.K_rows; d += PANEL) backward_level(chunk, work, grads, start, h, d);
    }
  }
  for (int64_t start = 0; start < chunk.padded; start += BASE) {
    for (int64_t d = 0; d < work.K_rows; d += LANES) backward_base(chunk, work, grads, start, d);
  }
}

}  // namespace
}  // namespace sleepkern::SLEEPKERN_ISA
