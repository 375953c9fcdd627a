// An estimate of the errors of rounding to bfloat16, made along with the products for each value panel. Rounded are the
// copy of the state that k and q are multiplied by, the values that a chunk writes, and P; k and q are bfloat16
// already. With r the mean square of a relative rounding, f = chunk decay^2 x the share of a state's error that k
// leaves, and |x| over a panel,
//
//   |dS'|^2 = f |dS|^2 + r (m |S|^2 + sum_t |Kt_t|^2 |Vn_t|^2)
//   |dO|^2 += sum_i |read_scale_i q_i|^2 / K (|dS|^2 + r (1 + m) |S|^2) + 2 r sum_t |P_t|^2 |Vn_t|^2
//
// This takes roundings as independent, and errors as having no direction but that of the keys. f and m need no solve: a
// token with key k leaves 1 - (2 b - b^2 |k|^2) |k|^2 x of an error, where x is the mean of (k_i.k_j)^2 in the chunk,
// that is how much the keys resemble each other; it moves b^2 |k|^4 / K of a state. At b |k|^2 = 2 all of an error
// stays.
//
// A panel whose estimate is above ROUNDING_LIMIT is dropped and computed again in float32. That happens where little
// decays and much is written: b near 2 without much decay, or values that cancel. An initial state is assumed to be as
// wrong as the limit allows, so that a text that is read piece by piece stays within the limit as well.
#pragma once

#include <cmath>
#include <cstdint>

#include "cpu/gemm/microkernel.h"
#include "cpu/recurrence/buffers.h"
#include "cpu/recurrence/pack_tokens.h"
#include "cpu/simd/bf16.h"
#include "cpu/simd/vec.h"

namespace sleepkern::SLEEPKERN_ISA {
namespace {

constexpr double MEAN_SQUARE_ROUNDING = 2.4e-6;
constexpr double ROUNDING_LIMIT =
    5e-3;  // relative; it leaves room below 1e-2 for chance and for the rounding of o itself

static bool rounds_too_much(double error, double size) { return error > ROUNDING_LIMIT * ROUNDING_LIMIT * size; }

// Estimates the share of an error of the state that the chunk keeps. `resemblance` is the sum of (k_i.k_j)^2 with its
// decay for i >= j; the diagonal is known.
SLEEPKERN_STAGE void expect_in_state(const Chunk& chunk, Workspace& work, double resemblance) {
  ChunkRounding& r = work.chunk_rounding;
  double diagonal = 0, left = 1, moved = 0;
  for (int64_t t = 0; t < chunk.count; ++t) diagonal += static_cast<double>(r.k_length[t]) * r.k_length[t];
  const double pairs = chunk.count * (chunk.count - 1) / 2;
  const double alike = pairs > 0 ? (resemblance > diagonal ? (resemblance - diagonal) / pairs : 0) : 0;
  for (int64_t t = 0; t < chunk.count; ++t) {
    const double length = r.k_length[t], write = static_cast<double>(work.beta[t]) * length;
    left *= 1 - (2 - write) * work.beta[t] * alike;
    moved += write * write / work.K;
    r.written[t] = static_cast<float>(length * work.decay_to_end[t] * work.decay_to_end[t]);
  }
  for (int64_t t = chunk.count; t < chunk.padded; ++t) r.written[t] = 0;
  const double kept = static_cast<double>(work.chunk_decay[0]) * work.chunk_decay[0];
  r.keeps = kept * (chunk.problem.delta ? left : 1);
  r.moves = chunk.problem.delta ? kept * (moved < 2 ? moved : 2) : 0;
}

SLEEPKERN_STAGE void expect_in_outputs(const Chunk& chunk, Workspace& work) {
  ChunkRounding& r = work.chunk_rounding;
  double output_gain = 0;
  for (int64_t t = 0; t < chunk.count; ++t) {
    const double scale = chunk.problem.scale * work.decay_from_start[t];
    output_gain += r.q_length[t] * scale * scale;
  }
  r.output_gain = output_gain / work.K;
  for (int64_t j = 0; j < chunk.padded; ++j) {
    Vec squares{};
    for (int64_t i = j / PANEL * PANEL; i < chunk.count; i += PANEL) {
      SLEEPKERN_EACH_VEC(n) {
        const Vec qk = load(work.gram_qk + i * CHUNK + j * PANEL + n * LANES);
        squares += qk * qk;
      }
    }
    r.output_squares[j] = sum(squares);
  }
}

struct Written {
  float by_state, by_outputs;  // sums of |Vn_t|^2 times `written` and `output_squares`
};

// Converts the values of a panel to bf16x2: unchanged for outputs, and times write_scale for the state.
SLEEPKERN_STAGE Written values_to_bf16x2(const Chunk& chunk, const Workspace& work) {
  const ChunkRounding& r = work.chunk_rounding;
  Vec by_state{}, by_outputs{};
  for (int64_t t = 0; t < chunk.padded; t += 2) {
    SLEEPKERN_EACH_VEC(n) {
      const Vec low = load(work.values + t * PANEL + n * LANES), high = load(work.values + (t + 1) * PANEL + n * LANES);
      const int64_t at = t / 2 * PANEL + n * LANES;
      store(work.writes_bf16 + at, interleave(low * work.write_scale[t], high * work.write_scale[t + 1]));
      const Vec low_square = low * low, high_square = high * high;
      by_state += low_square * r.written[t] + high_square * r.written[t + 1];
      if (!chunk.problem.want_output) continue;
      store(work.values_bf16 + at, interleave(low, high));
      by_outputs += low_square * r.output_squares[t] + high_square * r.output_squares[t + 1];
    }
  }
  return {sum(by_state), sum(by_outputs)};
}

static Rounding before_any(double state) { return {state, 0, ROUNDING_LIMIT * ROUNDING_LIMIT * state, 0, 0}; }

// Updates a panel's sums after a chunk. output and state are the sums of squares of its outputs and of its new state. A
// panel whose error is too large is dropped.
static void expect(Workspace& work, int64_t panel, const Written& written, double output, double state) {
  const ChunkRounding& r = work.chunk_rounding;
  Rounding& x = work.rounding[panel];
  const double rounded = r.moves * x.state, off = written.by_outputs;
  const double error =
      r.output_gain * (x.state_error + MEAN_SQUARE_ROUNDING * (x.state + rounded)) + 2 * MEAN_SQUARE_ROUNDING * off;
  if (std::isfinite(output + error)) {  // a token that is NaN says nothing about earlier tokens
    x.output += output;
    x.output_error += error;
  }
  const double added = MEAN_SQUARE_ROUNDING * (rounded + written.by_state);
  x.state_error = r.keeps * x.state_error + added;
  x.kept_error = r.keeps * x.kept_error + added;
  x.state = state;
  if (rounds_too_much(x.kept_error, x.state)) work.skipped |= uint32_t{1} << panel;
}

// Drops panels whose outputs are too wrong, at the end of a sequence.
static void judge_outputs(Workspace& work) {
  for (int64_t panel = work.first_panel; panel < work.end_panel; ++panel) {
    const Rounding& x = work.rounding[panel];
    if (rounds_too_much(x.output_error, x.output)) work.skipped |= uint32_t{1} << panel;
  }
}

}  // namespace
}  // namespace sleepkern::SLEEPKERN_ISA
