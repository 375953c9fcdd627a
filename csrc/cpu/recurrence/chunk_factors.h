// The chunk factors: all values of a chunk that do not depend on the state. No other stage of the forward knows the
// rule.
//
//   keys, q_panels      k^T, q^T (normalised if the problem says so), times E for channel decay
//   k_tails            Kt = k exp(G_C - G)
//   gram_kk, gram_qk   M_ij = b_i k_i.k_j exp(G_i - G_j), i > j;   P_ij = scale q_i.k_j exp(G_i - G_j), i >= j
//
// Exponents are sums of log decays between two tokens, and never positive.
#pragma once

#include <cstdint>

#include "common/recurrence.h"
#include "cpu/gemm/microkernel.h"
#include "cpu/recurrence/buffers.h"
#include "cpu/recurrence/chunk_factors_channel.h"
#include "cpu/recurrence/pack_tokens.h"
#include "cpu/recurrence/rounding.h"
#include "cpu/simd/bf16.h"
#include "cpu/simd/vec.h"

namespace sleepkern::SLEEPKERN_ISA {
namespace {

SLEEPKERN_STAGE void prepare_gates(const Chunk& c, Workspace& w) {
  const Problem& p = c.p;
  const bool head_decay = p.gate == Gate::head;
  double G = 0;
  for (int64_t t = 0; t < CHUNK; ++t) {
    const bool live = t < c.count;
    w.beta[t] = !live ? 0.0f : p.beta.data ? load_scalar(c.row(p.beta, t, c.head), p.beta.type, 0) : 1.0f;
    if (live && head_decay) {
      const float g = load_scalar(c.row(p.g, t, c.head), p.g.type, 0);
      G += g < MIN_LOG_DECAY ? MIN_LOG_DECAY : g;
    }
    w.log_decay[t] = G;
  }
  for (int64_t t = 0; t < CHUNK; t += LANES) {
    alignas(64) float since_start[LANES], until_end[LANES];
    for (int l = 0; l < LANES; ++l) {
      since_start[l] = static_cast<float>(w.log_decay[t + l]);
      until_end[l] = static_cast<float>(G - w.log_decay[t + l]);
    }
    Vec E = exp_nonpositive(load(since_start));
    store(w.since_start + t, E);
    store(w.gram_scale + t, load(w.beta + t));
    store(w.score_scale + t, broadcast(p.scale));
    store(w.key_scale + t, E * load(w.beta + t));
    store(w.read_scale + t, E * p.scale);
    store(w.to_end + t, exp_nonpositive(load(until_end)));
  }
  if (p.gate != Gate::channel) {
    const float keep = exp_nonpositive(broadcast(static_cast<float>(G)))[0];
    for (int64_t d = 0; d < w.K_rows; ++d) w.keep[d] = keep;
  }
}

// exp(G_i - G_j) of row j and LANES columns from i on; 0 for i < j. Differences are computed in double.
SLEEPKERN_INLINE Vec decay_row(const double* G, int64_t j, int64_t i) {
  const Vec span = narrow(load_double(G + i) - G[j]);
  const BitVec later = reinterpret_cast<BitVec>(lane_numbers() >= static_cast<int32_t>(j - i));
  const Vec decay = exp_nonpositive(reinterpret_cast<Vec>(reinterpret_cast<BitVec>(span) & later));
  return reinterpret_cast<Vec>(reinterpret_cast<BitVec>(decay) & later);
}

// Computes the decay between any two tokens. For columns after the vector that holds row j, with R the last token of
// that vector, the product exp(G_i - R) exp(R - G_j) needs fewer exponentials. With bf16x2 operands the decay also
// holds key_norm of k_j.
template <class E>
SLEEPKERN_STAGE void prepare_decays(const Chunk& c, Workspace& w) {
  const double* G = w.log_decay;
  const int64_t end = round_up(c.count, PANEL);
  auto place = [&](int64_t j, int64_t i) { return w.decays + column_at(i, CHUNK) + j * PANEL; };
  auto norm = [&](int64_t j) { return IS_PAIR<E> ? w.key_norm[j] : 1.0f; };
  for (int64_t own = 0; own < end; own += LANES) {
    const double R = G[own + LANES - 1];
    alignas(64) float until[LANES];
    store(until, exp_nonpositive(narrow(R - load_double(G + own))));
    for (int64_t j = own; j < own + LANES; ++j) {
      for (int64_t i = own / PANEL * PANEL; i < own; i += LANES) store(place(j, i), Vec{});
      store(place(j, own), decay_row(G, j, own) * norm(j));
    }
    for (int64_t i = own + LANES; i < end; i += LANES) {
      const Vec since = exp_nonpositive(narrow(load_double(G + i) - R));
      for (int64_t j = own; j < own + LANES; ++j) store(place(j, i), since * (until[j - own] * norm(j)));
    }
  }
}

// Computes P and M.
template <class E>
SLEEPKERN_STAGE void prepare_grams(const Chunk& c, Workspace& w) {
  const Operands<E> x = operands<E>(w, 0);
  const int64_t depth = steps<E>(w.K);
  Vec resemblance{};  // with bf16x2: sum of squared k_i.k_j exp(G_i - G_j)
  auto finish = [&](Vec x, int64_t at, int64_t i) {
    const Vec decayed = x * load(w.decays + at);
    if constexpr (IS_PAIR<E>) {
      const Vec normed = decayed * load(w.key_norm + i);
      resemblance += normed * normed;
    }
    return decayed * load(w.gram_scale + i);
  };
  auto finish_scores = [&w](Vec x, int64_t at, int64_t i) { return x * load(w.decays + at) * load(w.score_scale + i); };
  if (c.p.delta) upper_gram<1>(x.keys, x.keys, depth, c.count, CHUNK, w.gram_kk, finish);
  if constexpr (IS_PAIR<E>) expect_in_state(c, w, sum(resemblance));
  if (!c.p.reads) return;
  upper_gram<1>(x.keys, x.q_panels, depth, c.count, CHUNK, w.scores, finish_scores);
  if constexpr (IS_PAIR<E>) expect_in_outputs(c, w);
  if constexpr (IS_PAIR<E>) {
    for (int64_t i = 0; i < c.count; i += PANEL) {
      pair_rows(w.scores + i * CHUNK, min_of(i + PANEL, c.padded), w.score_pairs + i * CHUNK / 2);
    }
  }
}

// The chunk factors with operands of bfloat16. k and q are packed unscaled, which rounds neither; their factors are
// applied to sums and to values.
SLEEPKERN_STAGE void prepare_pairs(const Chunk& c, Workspace& w) {
  auto pairs = [](float* x) { return reinterpret_cast<Pair*>(x); };
  prepare_gates(c, w);
  auto load_rows = [&](const Rows& x, int64_t t, float* norm, float* length) {
    for (int l = 0; l < LANES; ++l) {
      float* row = w.rows + l * w.row_size;
      load_as_it_is(c, w, x, t + l, row);
      float square = squared_length(w, row);
      norm[t + l] = c.p.normalize ? normalising(w, row, square) : 1.0f;
      length[t + l] = square * norm[t + l] * norm[t + l];
    }
  };
  for (int64_t t = 0; t < round_up(c.count, PANEL); t += LANES) {
    load_rows(c.p.k, t, w.key_norm, w.chunk_rounding.key_length);
    pack_tokens(w, w.rows, t, pairs(w.keys));
    pack_rows(w, w.rows, t, pairs(w.k_tails));
    for (float* by : {w.key_scale, w.gram_scale}) store(by + t, load(by + t) * load(w.key_norm + t));
    store(w.to_write + t, load(w.to_end + t) * load(w.key_norm + t));
    if (!c.p.reads) continue;
    load_rows(c.p.q, t, w.reader_norm, w.chunk_rounding.reader_length);
    pack_tokens(w, w.rows, t, pairs(w.q_panels));
    for (float* by : {w.read_scale, w.score_scale}) store(by + t, load(by + t) * load(w.reader_norm + t));
  }
  prepare_decays<Pair>(c, w);
  prepare_grams<Pair>(c, w);
}

// Computes the chunk factors. E is float, or Pair where products take bfloat16.
template <class E>
SLEEPKERN_STAGE void prepare(const Chunk& c, Workspace& w) {
  if constexpr (IS_PAIR<E>) return prepare_pairs(c, w);
  const Problem& p = c.p;
  prepare_gates(c, w);
  if (p.gate == Gate::channel) {
    prepare_channel_decay(c, w);
    return;
  }
  const int64_t end = round_up(c.count, PANEL);
  for (int64_t t = 0; t < end; t += LANES) {
    for (int l = 0; l < LANES; ++l) w.key_norm[t + l] = load_token(c, w, p.k, t + l, w.rows + l * w.row_size);
    pack_tokens(w, w.rows, t, w.keys);
    if (w.keys_transposed) pack_rows(w, w.rows, t, w.keys_transposed);
    for (int l = 0; l < LANES; ++l) {
      float* row = w.rows + l * w.row_size;
      const Vec factor = broadcast(w.to_end[t + l]);
      for (int64_t d = 0; d < w.K_rows; d += LANES) store(row + d, load(row + d) * factor);
    }
    pack_rows(w, w.rows, t, w.k_tails);
    if (!p.reads) continue;
    for (int l = 0; l < LANES; ++l) w.reader_norm[t + l] = load_token(c, w, p.q, t + l, w.rows + l * w.row_size);
    pack_tokens(w, w.rows, t, w.q_panels);
    if (w.q_panels_transposed) pack_rows(w, w.rows, t, w.q_panels_transposed);
  }
  prepare_decays<float>(c, w);
  prepare_grams<float>(c, w);
}

}  // namespace
}  // namespace sleepkern::SLEEPKERN_ISA
