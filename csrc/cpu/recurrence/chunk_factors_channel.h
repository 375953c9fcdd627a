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
#include "cpu/simd/vec.h"

namespace sleepkern::SLEEPKERN_ISA {
namespace {

constexpr int64_t BASE = ROWS;

// Computes the factors of the `count` tokens first, first + step, ...: the product of a up to and including each token
// (inclusive), or up to the token before it. A product below float32's normal range becomes 0: subnormals are slow.
static void running_decay(const Workspace& w, int64_t first, int64_t count, int64_t step, bool inclusive) {
  for (int64_t d = 0; d < w.row_size; d += LANES) {
    Vec product = broadcast(1.0f);
    for (int64_t n = 0, t = first; n < count; ++n, t += step) {
      const Vec with = flush_subnormal(product * load(w.gates + t * w.row_size + d));
      store(w.factors + t * w.row_size + d, inclusive ? with : product);
      product = with;
    }
  }
}

// Packs rows of k or q times the factors in panels, and in their transposed form if `transposed` is given.
static void pack_decayed(const Workspace& w, const float* rows, int64_t end, float* panels,
                         float* transposed = nullptr) {
  for (int64_t t = 0; t < end; t += LANES) {
    for (int64_t x = 0; x < LANES * w.row_size; x += LANES) {
      store(w.rows + x, load(rows + t * w.row_size + x) * load(w.factors + t * w.row_size + x));
    }
    pack_tokens(w, w.rows, t, panels);
    for (int l = 0; transposed && l < LANES; ++l) pack_row(w, w.rows + l * w.row_size, t + l, transposed);
  }
}

static void load_channel_rows(const Chunk& c, Workspace& w) {
  for (int64_t t = 0; t < CHUNK; ++t) {
    float* g = w.gates + t * w.row_size;
    for (int64_t d = 0; d < w.row_size; d += LANES) store(g + d, Vec{});
    if (t < c.count) load_row(c.row(c.p.g, t, c.head * w.K), c.p.g.type, w.K, g);
    if (t < c.count) clear_beyond(g, w.K);
    for (int64_t d = 0; d < w.row_size; d += LANES) store(g + d, exp_nonpositive(load(g + d)));
    w.k_norm[t] = load_token(c, w, c.p.k, t, w.k_rows + t * w.row_size);
    if (c.p.want_output) w.q_norm[t] = load_token(c, w, c.p.q, t, w.q_rows + t * w.row_size);
  }
}

// Computes one product of the split: rows j are tokens [start, start + h), columns i are [start + h, start + 2h).
static void level_gram(const Workspace& w, int64_t start, int64_t h, const float* right, float* out) {
  const int64_t middle = start + h;
  for (int64_t i = middle / PANEL * PANEL; i < middle + h; i += PANEL) {
    const int64_t low = max_of(middle, i) - i, high = min_of(middle + h, i + PANEL) - i;
    for (int64_t j = start; j < middle; j += ROWS) {
      Tile t;
      clear(t);
      multiply_add<1>(t, w.level_keys + column_at(j, w.K), right + i * w.K, w.K);
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
static void base_grams(const Chunk& c, const Workspace& w, int64_t start) {
  float* reach = w.rows;
  for (int64_t j = start; j < start + BASE; ++j) {
    std::memcpy(reach, w.k_rows + j * w.row_size, w.row_size * sizeof(float));
    for (int64_t i = start; i < start + BASE; ++i) {
      const float *k = w.k_rows + i * w.row_size, *q = w.q_rows + i * w.row_size;
      Vec kk{}, qk{};
      for (int64_t d = 0; i >= j && d < w.row_size; d += LANES) {
        Vec x = load(reach + d);
        if (i > j) {
          x = flush_subnormal(x * load(w.gates + i * w.row_size + d));
          store(reach + d, x);
        }
        if (c.p.delta) kk += x * load(k + d);
        if (c.p.want_output) qk += x * load(q + d);
      }
      if (c.p.delta) w.gram_kk[column_at(i, CHUNK) + j * PANEL] = sum(kk);
      if (c.p.want_output) w.gram_qk[column_at(i, CHUNK) + j * PANEL] = sum(qk);
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
static void split_decay(const Workspace& w, int64_t h) {
  for (int64_t start = 0; start < CHUNK; start += 2 * h) {
    running_decay(w, start + h - 1, h, -1, false);
    running_decay(w, start + h, h, 1, true);
  }
}

static void channel_grams(const Chunk& c, Workspace& w) {
  const int64_t end = round_up(c.count, PANEL);
  for (int64_t h = CHUNK / 2; h >= BASE; h /= 2) {
    if (h >= end) continue;
    split_decay(w, h);
    pack_decayed(w, w.k_rows, end, w.level_keys);
    if (c.p.want_output) pack_decayed(w, w.q_rows, end, w.level_q_panels);
    for (int64_t start = 0; start + h < end; start += 2 * h) {
      if (c.p.delta) level_gram(w, start, h, w.level_keys, w.gram_kk);
      if (c.p.want_output) level_gram(w, start, h, w.level_q_panels, w.gram_qk);
    }
  }
  for (int64_t start = 0; start < end; start += BASE) base_grams(c, w, start);
  if (c.p.delta) scale_columns(w.gram_kk, end, w.beta, 0);
  if (c.p.want_output) scale_columns(w.gram_qk, end, nullptr, c.p.scale);
}

SLEEPKERN_STAGE void chunk_factors_channel(const Chunk& c, Workspace& w) {
  const int64_t end = round_up(c.count, PANEL);
  load_channel_rows(c, w);
  channel_grams(c, w);
  running_decay(w, 0, CHUNK, 1, true);
  const float* all = w.factors + (CHUNK - 1) * w.row_size;
  for (int64_t d = 0; d < w.K_rows; d += LANES) store(w.chunk_decay + d, load(all + d));
  pack_decayed(w, w.k_rows, end, w.keys, w.keys_transposed);
  if (c.p.want_output) pack_decayed(w, w.q_rows, end, w.q_panels, w.q_panels_transposed);
  for (int64_t t = 0; w.decay_from_start_rows && t < end; ++t)
    pack_row(w, w.factors + t * w.row_size, t, w.decay_from_start_rows);
  running_decay(w, CHUNK - 1, CHUNK, -1, false);
  for (int64_t t = 0; t < end; ++t) {
    float* row = w.factors + t * w.row_size;
    if (w.decay_to_end_rows) pack_row(w, row, t, w.decay_to_end_rows);
    for (int64_t d = 0; d < w.row_size; d += LANES) {
      store(row + d, load(row + d) * load(w.k_rows + t * w.row_size + d));
    }
    pack_row(w, row, t, w.k_tails);
  }
  for (int64_t t = 0; w.k_tail_columns && t < end; t += LANES)
    pack_tokens(w, w.factors + t * w.row_size, t, w.k_tail_columns);
}

}  // namespace
}  // namespace sleepkern::SLEEPKERN_ISA
