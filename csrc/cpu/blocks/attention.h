// Causal attention of one head over a window and the cached tokens before it, with q and k normalised.
//
// The scores are transposed, with keys as rows and PANEL queries as columns. So the softmax runs over rows for all
// queries at once, and its result is the left operand of the product with the values.
//
//   s = k^T q / sqrt(D);  p = exp(s - max s);  o = p v / sum p
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#include "cpu/gemm/gemm.h"
#include "cpu/gemm/microkernel.h"
#include "cpu/runtime/arena.h"
#include "cpu/simd/vec.h"

namespace sleepkern::SLEEPKERN_ISA {
namespace {

struct AttentionArrays {
  float* queries;  // [L / PANEL][D][PANEL]
  float* keys;     // [S / PANEL][D][PANEL], S = kept + L
  float* values;   // [D / PANEL][S][PANEL]
  float* scores;   // [S][PANEL]
  float* row;      // [LANES][D] rows being packed
};

static void lay_out(AttentionArrays& arrays, int64_t L, int64_t S, int64_t D, ArenaCursor& take) {
  const int64_t below = (round_up(D, LANES) - D) * PANEL;  // pack_head writes beyond the last panel
  arrays.queries = take(round_up(L, PANEL) * D + below);
  arrays.keys = take(round_up(S, PANEL) * D + below);
  arrays.values = take(round_up(D, PANEL) * round_up(S, ROWS));
  arrays.scores = take(round_up(S, PANEL) * PANEL);
  arrays.row = take(LANES * round_up(D, LANES));
}

struct AttentionHead {
  const float *q, *k, *v;  // [L, .] rows of the window, `stride` floats apart
  int64_t stride, L, D, kept;
  const float *keys, *values;    // [kept, D] cached tokens
  float *all_keys, *all_values;  // [kept + L, D], nullptr when not wanted
  const float *q_gain, *k_gain;
  float q_eps, k_eps;
  float* o;  // [L, .] rows, `o_stride` floats apart
  int64_t o_stride;
};

// Multiplies a row by its norm's factor, gain and scale.
static void normalise_row(const float* from, const float* gain, float eps, float scale, int64_t D, float* to) {
  const float factor = scale * rms_factor(from, D, eps);
  for (int64_t d = 0; d < D; ++d) to[d] = from[d] * factor * gain[d];
}

// Packs rows [0, n) in panels, with zero rows up to a whole panel; row_of(row, out) writes one row to `out`. A panel's
// last vector may extend beyond its steps into the next panel, which is written later.
template <class RowOf>
SLEEPKERN_INLINE void pack_head(AttentionArrays& arrays, int64_t n, int64_t D, float* panels, RowOf row_of) {
  const int64_t row_size = round_up(D, LANES);
  for (int64_t t = 0; t < round_up(n, PANEL); t += LANES) {
    for (int64_t l = 0; l < LANES; ++l) {
      if (t + l < n) {
        row_of(t + l, arrays.row + l * row_size);
      } else {
        std::memset(arrays.row + l * row_size, 0, D * sizeof(float));
      }
    }
    float* to = panels + column_at(t, D);
    for (int64_t d = 0; d < D; d += LANES) transpose(arrays.row + d, row_size, to + d * PANEL, PANEL);
  }
}

SLEEPKERN_STAGE void pack_attention(const AttentionHead& head, AttentionArrays& arrays) {
  const int64_t S = head.kept + head.L, D = head.D, bytes = D * sizeof(float);
  const float scale = 1 / std::sqrt(static_cast<float>(D));
  pack_head(arrays, head.L, D, arrays.queries, [&](int64_t t, float* to) {
    normalise_row(head.q + t * head.stride, head.q_gain, head.q_eps, scale, D, to);
  });
  pack_head(arrays, S, D, arrays.keys, [&](int64_t s, float* to) {
    if (s < head.kept) {
      std::memcpy(to, head.keys + s * D, bytes);
    } else {
      normalise_row(head.k + (s - head.kept) * head.stride, head.k_gain, head.k_eps, 1.0f, D, to);
    }
    if (head.all_keys) std::memcpy(head.all_keys + s * D, to, bytes);
  });
  const int64_t depth = round_up(S, ROWS);
  for (int64_t s = 0; s < depth; ++s) {
    const float* from = s < head.kept ? head.values + s * D : head.v + (s - head.kept) * head.stride;
    for (int64_t d = 0; d < D; d += LANES) {
      scaled_part(from + d, D - d, s < S ? 1.0f : 0.0f, arrays.values + column_at(d, depth) + s * PANEL);
    }
    for (int64_t d = round_up(D, LANES); d < round_up(D, PANEL); d += LANES) {
      store(arrays.values + column_at(d, depth) + s * PANEL, Vec{});
    }
    if (s < S && head.all_values) std::memcpy(head.all_values + s * D, from, bytes);
  }
}

// Replaces the transposed scores of PANEL queries from `first` on by their exponentials, and stores each query's sum.
// Of the keys [0, keys) query t sees those up to kept + t.
SLEEPKERN_STAGE void softmax(const AttentionHead& head, const AttentionArrays& arrays, int64_t first, int64_t keys,
                             float* sums) {
  alignas(64) float index[LANES];
  for (int l = 0; l < LANES; ++l) index[l] = static_cast<float>(l);
  SLEEPKERN_EACH_VEC(n) {
    const Vec seen = load(index) + static_cast<float>(head.kept + first + n * LANES);  // the last key that a query sees
    float* column = arrays.scores + n * LANES;
    Vec most = load(column), total{};
    for (int64_t s = 0; s < keys; ++s) {
      const Vec x = load(column + s * PANEL);
      const BitVec larger =
          reinterpret_cast<BitVec>(x > most) & reinterpret_cast<BitVec>(seen >= static_cast<float>(s));
      most = reinterpret_cast<Vec>(select(larger, reinterpret_cast<BitVec>(x), reinterpret_cast<BitVec>(most)));
    }
    for (int64_t s = 0; s < keys; ++s) {
      // mutant: attention-without-own-token
      const BitVec visible = reinterpret_cast<BitVec>(seen >= static_cast<float>(s));
      const Vec p = exp_nonpositive(load(column + s * PANEL) - most);
      const Vec kept = reinterpret_cast<Vec>(visible & reinterpret_cast<BitVec>(p));
      store(column + s * PANEL, kept);
      total += kept;
    }
    store(sums + n * LANES, total);
  }
}

SLEEPKERN_STAGE void attend(const AttentionHead& head) {
  const int64_t S = head.kept + head.L, depth = round_up(S, ROWS);
  AttentionArrays& arrays = thread_local_arrays<AttentionArrays>(head.L, S, head.D);
  pack_attention(head, arrays);
  alignas(64) float sums[PANEL], rows[ROWS * PANEL];
  for (int64_t first = 0; first < head.L; first += PANEL) {
    const int64_t keys = min_of(depth, round_up(head.kept + first + PANEL, ROWS));
    for (int64_t s = 0; s < keys; s += ROWS) {
      Tile t;
      clear(t);
      multiply_add<1>(t, arrays.keys + column_at(s, head.D), arrays.queries + first * head.D, head.D);
      store(t, arrays.scores + s * PANEL);
    }
    softmax(head, arrays, first, keys, sums);
    for (int64_t i = 0; i < min_of(PANEL, head.L - first); i += ROWS) {
      const int64_t seen = min_of(depth, head.kept + first + i + ROWS);  // keys that the last of ROWS queries sees
      for (int64_t d = 0; d < head.D; d += PANEL) {
        Tile t;
        clear(t);
        multiply_add<1>(t, arrays.scores + i, arrays.values + d * depth, seen);
        store(t, rows);
        for (int64_t r = 0; r < min_of(ROWS, head.L - first - i); ++r) {
          float *o = head.o + (first + i + r) * head.o_stride + d, *from = rows + r * PANEL;
          const float share = 1 / sums[i + r];
          SLEEPKERN_EACH_VEC(n) store(from + n * LANES, load(from + n * LANES) * share);
          std::memcpy(o, from, min_of(PANEL, head.D - d) * sizeof(float));
        }
      }
    }
  }
}

}  // namespace
}  // namespace sleepkern::SLEEPKERN_ISA
