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
#include "cpu/recurrence/cuts.h"
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

// Chunks [begin, end) of a sequence.
struct Segment {
  int64_t begin, end;
};

// Adds the caller's gradient of the state before a token to grads.dstate, where that state is kept.
static void add_kept_gradient(const Problem& problem, const Workspace& work, const BackwardBuffers& grads,
                              const Cuts& cuts, int64_t token, int64_t head) {
  const int64_t kept = problem.kept && problem.kept->gradients ? cuts.kept_before(token) : -1;
  // mutant: kept-gradient-dropped
  if (kept >= 0) add_state(work, problem.kept->gradients, kept * problem.HV + head, grads.dstate);
}

// Computes the gradients of one segment. work.state is the state before it, grads.dstate the gradient of the state
// after it. `after` is the chunk that is computed after the segment's first one.
SLEEPKERN_STAGE void backward_segment(const Problem& problem, Workspace& work, BackwardBuffers& grads,
                                      const Gradients& out, int64_t head, const Cuts& cuts, Segment segment, bool add,
                                      const Next& after) {
  Problem without_outputs = problem;
  without_outputs.want_output = false;
  auto state = [&](int64_t n) { return grads.states + (n - segment.begin) * grads.state_size; };
  auto writes = [&](int64_t n) { return grads.writes + (n - segment.begin) * grads.values_size; };
  for (int64_t n = segment.begin; n < segment.end; ++n) {
    transpose_panels(work.state, work.K_rows, work.K_rows, grads.V_rows, state(n), grads.V_rows);
    // The factors of the last chunk are made for the backward at once, since its backward comes next.
    const bool last = n + 1 == segment.end;
    state_pass_keeping_writes(cuts.chunk(last ? problem : without_outputs, n, head), work, writes(n),
                              cuts.chunk(without_outputs, last ? -1 : n + 1, head));
  }
  for (int64_t n = segment.end - 1; n >= segment.begin; --n) {
    const Chunk chunk = cuts.chunk(problem, n, head);
    const Next next = n > segment.begin ? Next{cuts.chunk(problem, n - 1, head), -1} : after;
    if (n + 1 < segment.end) chunk_factors<float>(chunk, work);
    // mutant: kept-gradient-at-the-cut-before
    add_kept_gradient(problem, work, grads, cuts, chunk.first + chunk.count, head);
    chunk_backward(chunk, work, grads, out, state(n), writes(n), add, next);
  }
}

// Computes one value head of one sequence, bh = sequence * HV + head. `add`: dq and dk hold those of an earlier head.
SLEEPKERN_STAGE void backward_head(const Problem& problem, Workspace& work, BackwardBuffers& grads,
                                   const Gradients& out, int64_t bh, bool add, const Next& after) {
  const Cuts cuts(problem, bh / problem.HV);
  const int64_t head = bh % problem.HV, chunks = cuts.chunks(), length = grads.segment;
  const int64_t segments = max_of((chunks + length - 1) / length, 1);
  const int64_t bytes = work.state_size * sizeof(float);
  Problem without_outputs = problem;
  without_outputs.want_output = false;
  const int64_t channels = problem.gate == Gate::channel ? problem.K : 1;
  grads.gate_sums = out.gate_sums ? out.gate_sums + bh * (1 + channels) : nullptr;
  load_state(work, problem.state, bh, work.state);
  for (int64_t n = 0; n < (segments - 1) * length; ++n) {
    if (n % length == 0) std::memcpy(grads.segment_states + n / length * work.state_size, work.state, bytes);
    state_pass_keeping_writes(cuts.chunk(without_outputs, n, head), work, grads.writes,
                              cuts.chunk(without_outputs, n + 1, head));
  }
  load_state(work, out.dfinal, bh, grads.dstate);
  for (int64_t s = segments - 1; s >= 0; --s) {
    if (s + 1 < segments) std::memcpy(work.state, grads.segment_states + s * work.state_size, bytes);
    const Segment segment{s * length, min_of((s + 1) * length, chunks)};
    const Next earlier{cuts.chunk(problem, s > 0 ? segment.begin - length : -1, head), -1};
    backward_segment(problem, work, grads, out, head, cuts, segment, add, s > 0 ? earlier : after);
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
  return {Cuts(problem, bh / problem.HV).chunk(problem, 0, bh % problem.HV), bh};
}

// Computes key heads [begin, end) of sequences * H. The value heads of a key head follow each other, because they add
// up in its dq and dk.
void backward_heads(const Problem& problem, const Gradients& out, int64_t begin, int64_t end) {
  Workspace& work = thread_local_arrays<Workspace>(problem, true);
  BackwardBuffers& grads = thread_local_arrays<BackwardBuffers>(problem, work, most_chunks(problem));
  if (problem.gate == Gate::channel) fill_triangle(work);
  const int64_t group = problem.HV / problem.H;
  for (int64_t bh = begin * group; bh < end * group; ++bh) {
    backward_head(problem, work, grads, out, bh, bh % group > 0, first_chunk(problem, bh + 1, end * group));
  }
}

}  // namespace
}  // namespace sleepkern::SLEEPKERN_ISA
