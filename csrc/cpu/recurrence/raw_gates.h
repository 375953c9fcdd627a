// The gates of raw projections, made where a kernel loads g and beta. backends/torch_gates.py is the definition:
//
//   x = raw g + dt_bias;   g = -exp(A_log) softplus(x), or with a lower bound L:  g = L sigmoid(exp(A_log) x)
//   beta = beta_scale sigmoid(raw beta)
//
// A backward takes the gradients of g and beta to those of the raw values, and sums those of A_log and dt_bias: a chunk
// in float32, the chunks of a head in double.
#pragma once

#include <cmath>
#include <cstdint>

#include "common/limits.h"
#include "common/recurrence.h"
#include "cpu/recurrence/buffers.h"
#include "cpu/recurrence/pack_tokens.h"
#include "cpu/simd/activation.h"
#include "cpu/simd/vec.h"

namespace sleepkern::SLEEPKERN_ISA {
namespace {

// log(1 + e) for e from 0 to 1, relative error 2e-7 also where e is tiny: 2 artanh(s), s = e / (2 + e), by its series.
SLEEPKERN_INLINE Vec log_one_plus(Vec e) {
  const Vec s = e / (e + 2.0f), z = s * s;
  Vec y = broadcast(1 / 13.0f);
  y = y * z + 1 / 11.0f;
  y = y * z + 1 / 9.0f;
  y = y * z + 1 / 7.0f;
  y = y * z + 1 / 5.0f;
  y = y * z + 1 / 3.0f;
  y = y * z + 1.0f;
  return s * y * 2.0f;
}

// max(x, 0) + log(1 + exp(-|x|)).
SLEEPKERN_INLINE Vec softplus(Vec x) {
  const Vec e = exp_nonpositive(reinterpret_cast<Vec>(reinterpret_cast<BitVec>(x) | 0x80000000u));
  return (x > Vec{} ? x : Vec{}) + log_one_plus(e);
}

// How one head's log decay is made of x.
struct DecayGate {
  float rate, lower_bound, bias;  // exp(A_log); 0 for none; dt_bias of head decay

  DecayGate(const Problem& problem, int64_t head) : rate(1), lower_bound(problem.lower_bound), bias(0) {
    if (problem.A_log.data) rate = std::exp(load_scalar(problem.A_log.data, problem.A_log.type, head));
    if (problem.gate == Gate::head && problem.dt_bias.data)
      bias = load_scalar(problem.dt_bias.data, problem.dt_bias.type, head);
  }
};

SLEEPKERN_INLINE Vec log_decay(const DecayGate& gate, Vec x) {
  if (gate.lower_bound != 0) return sigmoid(x * gate.rate) * gate.lower_bound;
  // mutant: raw-decay-without-rate
  return softplus(x) * -gate.rate;
}

// The derivative of log_decay in x. 1 - sigmoid is the sigmoid of -x, which loses nothing where it is small.
SLEEPKERN_INLINE Vec slope(const DecayGate& gate, Vec x) {
  if (gate.lower_bound == 0) return sigmoid(x) * -gate.rate;
  return sigmoid(x * gate.rate) * sigmoid(x * -gate.rate) * (gate.lower_bound * gate.rate);
}

// The derivative of log_decay in A_log.
SLEEPKERN_INLINE Vec slope_of_rate(const DecayGate& gate, Vec x) {
  return gate.lower_bound != 0 ? slope(gate, x) * x : log_decay(gate, x);
}

// Loads dt_bias of a head's channels, zero where there is none.
SLEEPKERN_INLINE void load_channel_bias(const Problem& problem, int64_t head, float* bias) {
  for (int64_t d = 0; d < problem.K; d += LANES) store(bias + d, Vec{});
  if (!problem.dt_bias.data) return;
  const int64_t size = problem.dt_bias.type == Type::float32 ? 4 : 2;
  load_row(static_cast<const char*>(problem.dt_bias.data) + head * problem.K * size, problem.dt_bias.type, problem.K,
           bias);
}

// Makes the betas of a chunk of their raw values, zero beyond count.
SLEEPKERN_INLINE void make_betas(const Chunk& chunk, float* beta) {
  for (int64_t t = 0; t < CHUNK; t += LANES) store(beta + t, sigmoid(load(beta + t)) * chunk.problem.beta_scale);
  for (int64_t t = chunk.count; t < CHUNK; ++t) beta[t] = 0;
}

// Makes the log decays of a chunk's head of their raw values, zero beyond count.
SLEEPKERN_INLINE void make_head_decays(const Chunk& chunk, float* g) {
  const DecayGate gate(chunk.problem, chunk.head);
  for (int64_t t = 0; t < CHUNK; t += LANES) store(g + t, log_decay(gate, load(g + t) + gate.bias));
  for (int64_t t = chunk.count; t < CHUNK; ++t) g[t] = 0;
}

// Makes one token's K log decays of their raw values. What follows in the last vector has no meaning.
SLEEPKERN_INLINE void make_channel_decays(const DecayGate& gate, int64_t K, const float* bias, float* g) {
  for (int64_t d = 0; d < K; d += LANES) store(g + d, log_decay(gate, load(g + d) + load(bias + d)));
}

// Makes one token's gates of their raw values: g of head decay, or the K elements of `decays`, and beta.
SLEEPKERN_INLINE void make_token_gates(const Problem& problem, int64_t head, float& g, float* decays, float& beta) {
  if (problem.beta_scale != 0) beta = sigmoid(broadcast(beta))[0] * problem.beta_scale;
  if (!problem.raw_decay) return;
  const DecayGate gate(problem, head);
  if (problem.gate == Gate::head) g = log_decay(gate, broadcast(g + gate.bias))[0];
  if (problem.gate != Gate::channel) return;
  alignas(64) float bias[HEAD_LIMIT];
  load_channel_bias(problem, head, bias);
  make_channel_decays(gate, problem.K, bias, decays);
}

// Takes the gradients of a chunk's betas to those of their raw values.
SLEEPKERN_INLINE void beta_gradients_to_raw(const Chunk& chunk, float* dbeta) {
  const Problem& problem = chunk.problem;
  alignas(64) float raw[CHUNK] = {};
  for (int64_t t = 0; t < chunk.count; ++t)
    raw[t] = load_scalar(chunk.row(problem.beta, t, chunk.head), problem.beta.type, 0);
  for (int64_t t = 0; t < chunk.count; t += LANES) {
    const Vec z = load(raw + t);
    store(dbeta + t, load(dbeta + t) * sigmoid(z) * sigmoid(-z) * problem.beta_scale);
  }
}

// Takes the gradients dg of a chunk's log decays, zero beyond count, to those of their raw values, and adds those of
// A_log and dt_bias to sums [2].
SLEEPKERN_INLINE void head_gradients_to_raw(const Chunk& chunk, float* dg, double* sums) {
  const Problem& problem = chunk.problem;
  const DecayGate gate(problem, chunk.head);
  alignas(64) float raw[CHUNK] = {};
  for (int64_t t = 0; t < chunk.count; ++t)
    raw[t] = load_scalar(chunk.row(problem.g, t, chunk.head), problem.g.type, 0);
  Vec of_rate{}, of_bias{};
  for (int64_t t = 0; t < chunk.count; t += LANES) {
    const Vec x = load(raw + t) + gate.bias, d = load(dg + t);
    // mutant: raw-gate-gradient-as-it-is
    const Vec to_raw = d * slope(gate, x);
    of_rate += d * slope_of_rate(gate, x);
    of_bias += to_raw;
    store(dg + t, to_raw);
  }
  sums[0] += sum(of_rate);
  sums[1] += sum(of_bias);
}

// The same for channel decay, token by token: `row` is dg of one token, zero beyond K. `of_bias` [K] gains the token's
// gradient of dt_bias, and the gradient of A_log is returned.
SLEEPKERN_INLINE Vec channel_gradients_to_raw(const Chunk& chunk, const DecayGate& gate, const float* bias, int64_t t,
                                              float* row, float* of_bias) {
  const Problem& problem = chunk.problem;
  alignas(64) float raw[HEAD_LIMIT];
  load_row(chunk.row(problem.g, t, chunk.head * problem.K), problem.g.type, problem.K, raw);
  clear_beyond(raw, problem.K);
  Vec of_rate{};
  for (int64_t d = 0; d < problem.K; d += LANES) {
    const Vec x = load(raw + d) + load(bias + d), dg = load(row + d), to_raw = dg * slope(gate, x);
    of_rate += dg * slope_of_rate(gate, x);
    store(of_bias + d, load(of_bias + d) + to_raw);
    store(row + d, to_raw);
  }
  return of_rate;
}

}  // namespace
}  // namespace sleepkern::SLEEPKERN_ISA
