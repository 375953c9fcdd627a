// The chunk factors for channel decay (KDA, GLA). The decay is inside the sum over channels,
//
//   P_ij = scale sum_d q_id k_jd exp(G_id - G_jd),
//
// and cannot be split into exp(G_i) exp(-G_j) without overflow. The dyadic split takes a block of 2h tokens. Rows i of
// its second half and j of its first half use the first half's last token R as a reference, exp(G_i - R) exp(R - G_j):
// both exponents are non-positive, and one matrix product gives all these pairs. Each half is the same problem with h /
// 2. Blocks of BASE tokens are summed directly. All these exponentials are products of at most CHUNK factors a =
// exp(g): that takes one exponential for each element of g, and no difference of long sums, which would lose digits.
#pragma once

#include <cstdint>
#include <cstring>

#include "common/recurrence.h"
#include "cpu/gemm/microkernel.h"
#include "cpu/recurrence/buffers.h"
#include "cpu/recurrence/pack_tokens.h"
#include "cpu/recurrence/raw_gates.h"
#include "cpu/simd/vec.h"

namespace sleepkern::SLEEPKERN_ISA {
namespace {

constexpr int64_t BASE = ROWS;

// Computes the factors of the `count` tokens first, first + step, ...: the product of a up to and including each token
// (inclusive), or up to the token before it. A product below float32's normal range becomes 0: subnormals are slow.
static void running_decay(const Workspace& work, int64_t first, int64_t count, int64_t step, bool inclusive) {
  for (int64_t d = 0; d < work.row_size; d += LANES) {
    Vec product = broadcast(1.0f);
    for (int64_t n = 0, t = first; n < count; ++n, t += step) {
      const Vec with = flush_subnormal(product * load(work.gates + t * work.row_size + d));
      store(work.factors + t * work.row_size + d, inclusive ? with : product);
      product = with;
    }
  }
}

// Packs rows of k or q times the factors in panels, and in their transposed form if `transposed` is given.
static void pack_decayed(const Workspace& work, const float* rows, int64_t end, float* panels,
                         float* transposed = nullptr) {
  for (int64_t t = 0; t < end; t += LANES) {
    for (int64_t x = 0; x < LANES * work.row_size; x += LANES) {
      store(work.rows + x, load(rows + t * work.row_size + x) * load(work.factors + t * work.row_size + x));
    }
    pack_tokens(work, work.rows, t, panels);
    for (int l = 0; transposed && l < LANES; ++l) pack_row(work, work.rows + l * work.row_size, t + l, transposed);
  }
}

static void load_channel_rows(const Chunk& chunk, Workspace& work) {
  const bool raw = chunk.problem.raw_decay;
  const DecayGate gate(chunk.problem, chunk.head);
  alignas(64) float bias[HEAD_LIMIT];
  if (raw) load_channel_bias(chunk.problem, chunk.head, bias);
  for (int64_t t = 0; t < CHUNK; ++t) {
    float* g = work.gates + t * work.row_size;
    for (int64_t d = 0; d < work.row_size; d += LANES) store(g + d, Vec{});
    if (t < chunk.count) load_row(chunk.row(chunk.problem.g, t, chunk.head * work.K), chunk.problem.g.type, work.K, g);
    if (t < chunk.count && raw) make_channel_decays(gate, work.K, bias, g);
    if (t < chunk.count) clear_beyond(g, work.K);
    for (int64_t d = 0; d < work.row_size; d += LANES) store(g + d, exp_nonpositive(load(g + d)));
    work.k_norm[t] = load_token(chunk, work, chunk.problem.k, t, work.k_rows + t * work.row_size);
    if (chunk.problem.want_output)
      work.q_norm[t] = load_token(chunk, work, chunk.problem.q, t, work.q_rows + t * work.row_size);
  }
}

// Computes one product of the split: rows j are tokens [start, start + h), columns i are [start + h, start + 2h).
static void level_gram(const Workspace& work, int64_t start, int64_t h, const float* right, float* out) {
  const int64_t middle = start + h;
  for (int64_t i = middle / PANEL * PANEL; i < middle + h; i += PANEL) {
    const int64_t low = max_of(middle, i) - i, high = min_of(middle + h, i + PANEL) - i;
    for (int64_t j = start; j < middle; j += ROWS) {
      Tile t;
      clear(t);
      multiply_add<1>(t, work.level_keys + column_at(j, work.K), right + i * work.K, work.K);
      alignas(64) float block[ROWS * PANEL];
      store(t, block);
      for (int64_t r = 0; r < ROWS; ++r) {
        for (int64_t l = low; l < high; ++l) out[i * CHUNK + (j + r) * PANEL + l] = block[r * PANEL + l];
      }
    }
  }
}

// Sums the pairs j <= i of BASE neighbouring tokens directly, for both grams; gram_qk is zero for i < j. k_j decays
// from one i to the next.
static void base_grams(const Chunk& chunk, const Workspace& work, int64_t start) {
  float* reach = work.rows;
  for (int64_t j = start; j < start + BASE; ++j) {
    std::memcpy(reach, work.k_rows + j * work.row_size, work.row_size * sizeof(float));
    for (int64_t i = start; i < start + BASE; ++i) {
      const float *k = work.k_rows + i * work.row_size, *q = work.q_rows + i * work.row_size;
      Vec kk{}, qk{};
      for (int64_t d = 0; i >= j && d < work.row_size; d += LANES) {
        Vec x = load(reach + d);
        if (i > j) {
          x = flush_subnormal(x * load(work.gates + i * work.row_size + d));
          store(reach + d, x);
        }
        if (chunk.problem.delta) kk += x * load(k + d);
        if (chunk.problem.want_output) qk += x * load(q + d);
      }
      if (chunk.problem.delta) work.gram_kk[column_at(i, CHUNK) + j * PANEL] = sum(kk);
      if (chunk.problem.want_output) work.gram_qk[column_at(i, CHUNK) + j * PANEL] = sum(qk);
    }
  }
}

// Multiplies column i of a gram by by[i], or by a constant factor.
static void scale_columns(float* gram, int64_t end, const float* by, float factor) {
  for (int64_t i = 0; i < end; i += PANEL) {
    SLEEPKERN_EACH_VEC(n) {
      const Vec f = by ? load(by + i + n * LANES) : broadcast(factor);
      for (int64_t j = 0; j < min_of(i + PANEL, end); ++j) {
        float* at = gram + i * CHUNK + j * PANEL + n * LANES;
        store(at, load(at) * f);
      }
    }
  }
}

// Computes the factors of one level: exp(R - G) in the first, exp(G - R) in the second halves of blocks of 2h tokens.
static void split_decay(const Workspace& work, int64_t h) {
  for (int64_t start = 0; start < CHUNK; start += 2 * h) {
    running_decay(work, start + h - 1, h, -1, false);
    running_decay(work, start + h, h, 1, true);
  }
}

static void channel_grams(const Chunk& chunk, Workspace& work) {
  const int64_t end = round_up(chunk.count, PANEL);
  for (int64_t h = CHUNK / 2; h >= BASE; h /= 2) {
    if (h >= end) continue;
    split_decay(work, h);
    pack_decayed(work, work.k_rows, end, work.level_keys);
    if (chunk.problem.want_output) pack_decayed(work, work.q_rows, end, work.level_q_panels);
    for (int64_t start = 0; start + h < end; start += 2 * h) {
      if (chunk.problem.delta) level_gram(work, start, h, work.level_keys, work.gram_kk);
      if (chunk.problem.want_output) level_gram(work, start, h, work.level_q_panels, work.gram_qk);
    }
  }
  for (int64_t start = 0; start < end; start += BASE) base_grams(chunk, work, start);
  if (chunk.problem.delta) scale_columns(work.gram_kk, end, work.beta, 0);
  if (chunk.problem.want_output) scale_columns(work.gram_qk, end, nullptr, chunk.problem.scale);
}

SLEEPKERN_STAGE void chunk_factors_channel(const Chunk& chunk, Workspace& work) {
  const int64_t end = round_up(chunk.count, PANEL);
  load_channel_rows(chunk, work);
  channel_grams(chunk, work);
  running_decay(work, 0, CHUNK, 1, true);
  const float* all = work.factors + (CHUNK - 1) * work.row_size;
  for (int64_t d = 0; d < work.K_rows; d += LANES) store(work.chunk_decay + d, load(all + d));
  pack_decayed(work, work.k_rows, end, work.keys, work.keys_transposed);
  if (chunk.problem.want_output) pack_decayed(work, work.q_rows, end, work.q_panels, work.q_panels_transposed);
  for (int64_t t = 0; work.decay_from_start_rows && t < end; ++t)
    pack_row(work, work.factors + t * work.row_size, t, work.decay_from_start_rows);
  running_decay(work, CHUNK - 1, CHUNK, -1, false);
  for (int64_t t = 0; t < end; ++t) {
    float* row = work.factors + t * work.row_size;
    if (work.decay_to_end_rows) pack_row(work, row, t, work.decay_to_end_rows);
    for (int64_t d = 0; d < work.row_size; d += LANES) {
      store(row + d, load(row + d) * load(work.k_rows + t * work.row_size + d));
    }
    pack_row(work, row, t, work.k_tails);
  }
  for (int64_t t = 0; work.k_tail_columns && t < end; t += LANES)
    pack_tokens(work, work.factors + t * work.row_size, t, work.k_tail_columns);
}

}  // namespace
}  // namespace sleepkern::SLEEPKERN_ISA
