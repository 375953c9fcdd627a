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
#include "cpu/recurrence/raw_gates.h"
#include "cpu/recurrence/rounding.h"
#include "cpu/simd/bf16.h"
#include "cpu/simd/vec.h"

namespace sleepkern::SLEEPKERN_ISA {
namespace {

SLEEPKERN_STAGE void load_gates(const Chunk& chunk, Workspace& work) {
  const Problem& problem = chunk.problem;
  const bool head_decay = problem.gate == Gate::head;
  alignas(64) float g[CHUNK] = {};
  for (int64_t t = 0; t < CHUNK; ++t) {
    const bool live = t < chunk.count;
    work.beta[t] = !live               ? 0.0f
                   : problem.beta.data ? load_scalar(chunk.row(problem.beta, t, chunk.head), problem.beta.type, 0)
                                       : 1.0f;
    if (live && head_decay) g[t] = load_scalar(chunk.row(problem.g, t, chunk.head), problem.g.type, 0);
  }
  if (problem.beta_scale != 0) make_betas(chunk, work.beta);
  if (problem.raw_decay && head_decay) make_head_decays(chunk, g);
  double G = 0;
  for (int64_t t = 0; t < CHUNK; ++t) {
    G += g[t] < MIN_LOG_DECAY ? MIN_LOG_DECAY : g[t];
    work.log_decay[t] = G;
  }
  for (int64_t t = 0; t < CHUNK; t += LANES) {
    alignas(64) float G_start[LANES], G_end[LANES];
    for (int l = 0; l < LANES; ++l) {
      G_start[l] = static_cast<float>(work.log_decay[t + l]);
      G_end[l] = static_cast<float>(G - work.log_decay[t + l]);
    }
    Vec E = exp_nonpositive(load(G_start));
    store(work.decay_from_start + t, E);
    store(work.gram_kk_scale + t, load(work.beta + t));
    store(work.gram_qk_scale + t, broadcast(problem.scale));
    store(work.prediction_scale + t, E * load(work.beta + t));
    store(work.output_scale + t, E * problem.scale);
    store(work.decay_to_end + t, exp_nonpositive(load(G_end)));
  }
  if (problem.gate != Gate::channel) {
    const float chunk_decay = exp_nonpositive(broadcast(static_cast<float>(G)))[0];
    for (int64_t d = 0; d < work.K_rows; ++d) work.chunk_decay[d] = chunk_decay;
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
// holds k_norm of k_j.
template <class E>
SLEEPKERN_STAGE void decay_matrix(const Chunk& chunk, Workspace& work) {
  const double* G = work.log_decay;
  const int64_t end = round_up(chunk.count, PANEL);
  auto decay_at = [&](int64_t j, int64_t i) { return work.decays + column_at(i, CHUNK) + j * PANEL; };
  auto norm = [&](int64_t j) { return IS_BF16X2<E> ? work.k_norm[j] : 1.0f; };
  for (int64_t first = 0; first < end; first += LANES) {
    const double R = G[first + LANES - 1];
    alignas(64) float decay_to_R[LANES];
    store(decay_to_R, exp_nonpositive(narrow(R - load_double(G + first))));
    for (int64_t j = first; j < first + LANES; ++j) {
      for (int64_t i = first / PANEL * PANEL; i < first; i += LANES) store(decay_at(j, i), Vec{});
      store(decay_at(j, first), decay_row(G, j, first) * norm(j));
    }
    for (int64_t i = first + LANES; i < end; i += LANES) {
      const Vec decay_from_R = exp_nonpositive(narrow(load_double(G + i) - R));
      for (int64_t j = first; j < first + LANES; ++j)
        store(decay_at(j, i), decay_from_R * (decay_to_R[j - first] * norm(j)));
    }
  }
}

// Computes P and M.
template <class E>
SLEEPKERN_STAGE void chunk_grams(const Chunk& chunk, Workspace& work) {
  const Operands<E> x = operands<E>(work, 0);
  const int64_t depth = steps<E>(work.K);
  Vec resemblance{};  // with bf16x2: sum of squared k_i.k_j exp(G_i - G_j)
  auto finish = [&](Vec x, int64_t at, int64_t i) {
    const Vec decayed = x * load(work.decays + at);
    if constexpr (IS_BF16X2<E>) {
      const Vec normed = decayed * load(work.k_norm + i);
      resemblance += normed * normed;
    }
    return decayed * load(work.gram_kk_scale + i);
  };
  auto finish_qk = [&work](Vec x, int64_t at, int64_t i) {
    return x * load(work.decays + at) * load(work.gram_qk_scale + i);
  };
  if (chunk.problem.delta) upper_gram<1>(x.keys, x.keys, depth, chunk.count, CHUNK, work.gram_kk, finish);
  if constexpr (IS_BF16X2<E>) expect_in_state(chunk, work, sum(resemblance));
  if (!chunk.problem.want_output) return;
  upper_gram<1>(x.keys, x.q_panels, depth, chunk.count, CHUNK, work.gram_qk, finish_qk);
  if constexpr (IS_BF16X2<E>) expect_in_outputs(chunk, work);
  if constexpr (IS_BF16X2<E>) {
    for (int64_t i = 0; i < chunk.count; i += PANEL) {
      rows_to_bf16x2(work.gram_qk + i * CHUNK, min_of(i + PANEL, chunk.padded), work.gram_qk_bf16 + i * CHUNK / 2);
    }
  }
}

// The chunk factors with operands of bfloat16. k and q are packed unscaled, which rounds neither; their factors are
// applied to sums and to values.
SLEEPKERN_STAGE void chunk_factors_bf16(const Chunk& chunk, Workspace& work) {
  auto as_bf16x2 = [](float* x) { return reinterpret_cast<Bf16x2*>(x); };
  load_gates(chunk, work);
  auto load_rows = [&](const Rows& x, int64_t t, float* norm, float* length) {
    for (int l = 0; l < LANES; ++l) {
      float* row = work.rows + l * work.row_size;
      load_as_it_is(chunk, work, x, t + l, row);
      float square = squared_length(work, row);
      norm[t + l] = chunk.problem.normalize ? normalising(work, row, square) : 1.0f;
      length[t + l] = square * norm[t + l] * norm[t + l];
    }
  };
  for (int64_t t = 0; t < round_up(chunk.count, PANEL); t += LANES) {
    load_rows(chunk.problem.k, t, work.k_norm, work.chunk_rounding.k_length);
    pack_tokens(work, work.rows, t, as_bf16x2(work.keys));
    pack_rows(work, work.rows, t, as_bf16x2(work.k_tails));
    for (float* by : {work.prediction_scale, work.gram_kk_scale}) store(by + t, load(by + t) * load(work.k_norm + t));
    store(work.write_scale + t, load(work.decay_to_end + t) * load(work.k_norm + t));
    if (!chunk.problem.want_output) continue;
    load_rows(chunk.problem.q, t, work.q_norm, work.chunk_rounding.q_length);
    pack_tokens(work, work.rows, t, as_bf16x2(work.q_panels));
    for (float* by : {work.output_scale, work.gram_qk_scale}) store(by + t, load(by + t) * load(work.q_norm + t));
  }
  decay_matrix<Bf16x2>(chunk, work);
  chunk_grams<Bf16x2>(chunk, work);
}

// Computes the chunk factors. E is float, or Bf16x2 where products take bfloat16.
template <class E>
SLEEPKERN_STAGE void chunk_factors(const Chunk& chunk, Workspace& work) {
  if constexpr (IS_BF16X2<E>) return chunk_factors_bf16(chunk, work);
  const Problem& problem = chunk.problem;
  load_gates(chunk, work);
  if (problem.gate == Gate::channel) {
    chunk_factors_channel(chunk, work);
    return;
  }
  const int64_t end = round_up(chunk.count, PANEL);
  for (int64_t t = 0; t < end; t += LANES) {
    for (int l = 0; l < LANES; ++l)
      work.k_norm[t + l] = load_token(chunk, work, problem.k, t + l, work.rows + l * work.row_size);
    pack_tokens(work, work.rows, t, work.keys);
    if (work.keys_transposed) pack_rows(work, work.rows, t, work.keys_transposed);
    for (int l = 0; l < LANES; ++l) {
      float* row = work.rows + l * work.row_size;
      const Vec factor = broadcast(work.decay_to_end[t + l]);
      for (int64_t d = 0; d < work.K_rows; d += LANES) store(row + d, load(row + d) * factor);
    }
    pack_rows(work, work.rows, t, work.k_tails);
    if (!problem.want_output) continue;
    for (int l = 0; l < LANES; ++l)
      work.q_norm[t + l] = load_token(chunk, work, problem.q, t + l, work.rows + l * work.row_size);
    pack_tokens(work, work.rows, t, work.q_panels);
    if (work.q_panels_transposed) pack_rows(work, work.rows, t, work.q_panels_transposed);
  }
  decay_matrix<float>(chunk, work);
  chunk_grams<float>(chunk, work);
}

}  // namespace
}  // namespace sleepkern::SLEEPKERN_ISA
