// Gradients of whole sequences, segment by segment from the last one (backward_buffers.h).
#pragma once

#include <cstdint>
#include <cstring>

#include "common/recurrence.h"
#include "cpu/gemm/microkernel.h"
#include "cpu/recurrence/backward_buffers.h"
#include "cpu/recurrence/buffers.h"
#include "cpu/recurrence/chunk_backward.h"
#include "cpu/recurrence/chunk_factors.h"
#include "cpu/recurrence/pack_tokens.h"
#include "cpu/recurrence/prefetch.h"
#include "cpu/recurrence/state_pass.h"
#include "cpu/runtime/arena.h"
#include "cpu/simd/vec.h"

namespace sleepkern::SLEEPKERN_ISA {
namespace {

// The state pass of one chunk without outputs. It keeps the values that the chunk writes, zero beyond count.
SLEEPKERN_STAGE void state_pass_keeping_writes(const Chunk& chunk, Workspace& work, float* writes, const Chunk& next) {
  PrefetchSchedule prefetch(state_tiles(work));
  prefetch.add_inputs(next);
  float* const values = work.values;
  chunk_factors<float>(chunk, work);
  for (int64_t panel = 0; panel < work.V_panels; ++panel) {
    float* state = work.state + panel * work.K_rows * PANEL;
    work.values = writes + panel * CHUNK * PANEL;
    load_values(chunk, work, panel);
    const Operands<float> x = operands<float>(work, panel);
    if (chunk.problem.delta) subtract_prediction(chunk, work, x);
    update_state(chunk, work, x, state, prefetch);
    for (int64_t x = chunk.padded * PANEL; x < CHUNK * PANEL; x += LANES) store(work.values + x, Vec{});
  }
  work.values = values;
}

struct Span {
  int64_t begin, end;
};

// Computes the gradients of one segment. work.state is the state before it, grads.dstate the gradient of the state
// after it. `after` is the chunk that is computed after the segment's first one.
SLEEPKERN_STAGE void backward_segment(const Problem& problem, Workspace& work, BackwardBuffers& grads,
                                      const Gradients& out, int64_t head, Span tokens, bool add, const Next& after) {
  Problem without_outputs = problem;
  without_outputs.want_output = false;
  const int64_t chunks = (tokens.end - tokens.begin + CHUNK - 1) / CHUNK;
  auto state = [&](int64_t n) { return grads.states + n * grads.state_size; };
  auto chunk_at = [&](const Problem& problem, int64_t n) {
    const int64_t first = tokens.begin + n * CHUNK;
    return Chunk(problem, first, min_of(CHUNK, tokens.end - first), head);
  };
  for (int64_t n = 0; n < chunks; ++n) {
    transpose_panels(work.state, work.K_rows, work.K_rows, grads.V_rows, state(n), grads.V_rows);
    const bool last = n + 1 == chunks;  // its factors for the backward are made at once, since its backward comes next
    state_pass_keeping_writes(chunk_at(last ? problem : without_outputs, n), work, grads.writes + n * grads.values_size,
                              chunk_at(without_outputs, n + 1));
  }
  for (int64_t n = chunks - 1; n >= 0; --n) {
    const Chunk chunk = chunk_at(problem, n);
    const Next next = n > 0 ? Next{Chunk(problem, chunk.first - CHUNK, CHUNK, head), -1} : after;
    if (n + 1 < chunks) chunk_factors<float>(chunk, work);
    chunk_backward(chunk, work, grads, out, state(n), grads.writes + n * grads.values_size, add, next);
  }
}

// Computes one value head of one sequence, bh = sequence * HV + head. `add`: dq and dk hold those of an earlier head.
SLEEPKERN_STAGE void backward_head(const Problem& problem, Workspace& work, BackwardBuffers& grads,
                                   const Gradients& out, int64_t bh, Span tokens, bool add, const Next& after) {
  const int64_t length = grads.segment * CHUNK, segments = max_of((tokens.end - tokens.begin + length - 1) / length, 1);
  const int64_t bytes = work.state_size * sizeof(float);
  Problem without_outputs = problem;
  without_outputs.want_output = false;
  const int64_t channels = problem.gate == Gate::channel ? problem.K : 1;
  grads.gate_sums = out.gate_sums ? out.gate_sums + bh * (1 + channels) : nullptr;
  load_state(work, problem.state, bh, work.state);
  for (int64_t first = tokens.begin, s = 0; s + 1 < segments; first += CHUNK) {
    if ((first - tokens.begin) % length == 0)
      std::memcpy(grads.segment_states + s * work.state_size, work.state, bytes);
    const Chunk chunk(without_outputs, first, CHUNK, bh % problem.HV),
        next(without_outputs, first + CHUNK, CHUNK, chunk.head);
    state_pass_keeping_writes(chunk, work, grads.writes, next);
    if ((first + CHUNK - tokens.begin) % length == 0) ++s;
  }
  load_state(work, out.dfinal, bh, grads.dstate);
  for (int64_t s = segments - 1; s >= 0; --s) {
    if (s + 1 < segments) std::memcpy(work.state, grads.segment_states + s * work.state_size, bytes);
    const int64_t first = tokens.begin + s * length;
    const Span segment{first, min_of(first + length, tokens.end)};
    const Next earlier{Chunk(problem, first - length, s > 0 ? CHUNK : 0, bh % problem.HV), -1};
    backward_segment(problem, work, grads, out, bh % problem.HV, segment, add, s > 0 ? earlier : after);
  }
  if (out.dstate) store_state(work, grads.dstate, bh, out.dstate);
}

// With channel decay the grams' gradients have no factor D, only its triangle.
static void fill_triangle(const Workspace& work) {
  for (int64_t j = 0; j < CHUNK; ++j) {
    for (int64_t i = 0; i < CHUNK; ++i) work.decays[column_at(i, CHUNK) + j * PANEL] = i >= j ? 1.0f : 0.0f;
  }
}

// The first chunk that is computed of head `bh`, if bh < end.
static Next first_chunk(const Problem& problem, int64_t bh, int64_t end) {
  if (bh >= end) return {Chunk(problem, 0, 0, 0), -1};
  const int64_t first = problem.first(bh / problem.HV);
  return {Chunk(problem, first, min_of(CHUNK, problem.first(bh / problem.HV + 1) - first), bh % problem.HV), bh};
}

// Computes key heads [begin, end) of sequences * H. The value heads of a key head follow each other, because they add
// up in its dq and dk.
void backward_heads(const Problem& problem, const Gradients& out, int64_t begin, int64_t end) {
  Workspace& work = thread_local_arrays<Workspace>(problem, true);
  BackwardBuffers& grads = thread_local_arrays<BackwardBuffers>(problem, work, problem.longest());
  if (problem.gate == Gate::channel) fill_triangle(work);
  const int64_t group = problem.HV / problem.H;
  for (int64_t bh = begin * group; bh < end * group; ++bh) {
    const int64_t sequence = bh / problem.HV;
    const Span tokens{problem.first(sequence), problem.first(sequence + 1)};
    backward_head(problem, work, grads, out, bh, tokens, bh % group > 0, first_chunk(problem, bh + 1, end * group));
  }
}

}  // namespace
}  // namespace sleepkern::SLEEPKERN_ISA
