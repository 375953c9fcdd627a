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
SLEEPKERN_STAGE void state_pass_keeping_writes(const Chunk& c, Workspace& w, float* writes, const Chunk& next) {
  PrefetchSchedule prefetch(state_tiles(w));
  prefetch.add_inputs(next);
  float* const values = w.values;
  chunk_factors<float>(c, w);
  for (int64_t panel = 0; panel < w.V_panels; ++panel) {
    float* state = w.state + panel * w.K_rows * PANEL;
    w.values = writes + panel * CHUNK * PANEL;
    load_values(c, w, panel);
    const Operands<float> x = operands<float>(w, panel);
    if (c.p.delta) subtract_prediction(c, w, x);
    update_state(c, w, x, state, prefetch);
    for (int64_t x = c.padded * PANEL; x < CHUNK * PANEL; x += LANES) store(w.values + x, Vec{});
  }
  w.values = values;
}

struct Span {
  int64_t begin, end;
};

// Computes the gradients of one segment. w.state is the state before it, a.dstate the gradient of the state after it.
// `after` is the chunk that is computed after the segment's first one.
SLEEPKERN_STAGE void backward_segment(const Problem& p, Workspace& w, BackwardBuffers& a, const Gradients& out,
                                      int64_t head, Span tokens, bool add, const Next& after) {
  Problem without_outputs = p;
  without_outputs.want_output = false;
  const int64_t chunks = (tokens.end - tokens.begin + CHUNK - 1) / CHUNK;
  auto state = [&](int64_t n) { return a.states + n * a.state_size; };
  auto chunk = [&](const Problem& p, int64_t n) {
    const int64_t first = tokens.begin + n * CHUNK;
    return Chunk(p, first, min_of(CHUNK, tokens.end - first), head);
  };
  for (int64_t n = 0; n < chunks; ++n) {
    transpose_panels(w.state, w.K_rows, w.K_rows, a.V_rows, state(n), a.V_rows);
    const bool last = n + 1 == chunks;  // its factors for the backward are made at once, since its backward comes next
    state_pass_keeping_writes(chunk(last ? p : without_outputs, n), w, a.writes + n * a.values_size,
                              chunk(without_outputs, n + 1));
  }
  for (int64_t n = chunks - 1; n >= 0; --n) {
    const Chunk c = chunk(p, n);
    const Next next = n > 0 ? Next{Chunk(p, c.first - CHUNK, CHUNK, head), -1} : after;
    if (n + 1 < chunks) chunk_factors<float>(c, w);
    chunk_backward(c, w, a, out, state(n), a.writes + n * a.values_size, add, next);
  }
}

// Computes one value head of one sequence, bh = sequence * HV + head. `add`: dq and dk hold those of an earlier head.
SLEEPKERN_STAGE void backward_head(const Problem& p, Workspace& w, BackwardBuffers& a, const Gradients& out, int64_t bh,
                                   Span tokens, bool add, const Next& after) {
  const int64_t length = a.segment * CHUNK, segments = max_of((tokens.end - tokens.begin + length - 1) / length, 1);
  const int64_t bytes = w.state_size * sizeof(float);
  Problem without_outputs = p;
  without_outputs.want_output = false;
  load_state(w, p.state, bh, w.state);
  for (int64_t first = tokens.begin, s = 0; s + 1 < segments; first += CHUNK) {
    if ((first - tokens.begin) % length == 0) std::memcpy(a.segment_states + s * w.state_size, w.state, bytes);
    const Chunk c(without_outputs, first, CHUNK, bh % p.HV), next(without_outputs, first + CHUNK, CHUNK, c.head);
    state_pass_keeping_writes(c, w, a.writes, next);
    if ((first + CHUNK - tokens.begin) % length == 0) ++s;
  }
  load_state(w, out.dfinal, bh, a.dstate);
  for (int64_t s = segments - 1; s >= 0; --s) {
    if (s + 1 < segments) std::memcpy(w.state, a.segment_states + s * w.state_size, bytes);
    const int64_t first = tokens.begin + s * length;
    const Span segment{first, min_of(first + length, tokens.end)};
    const Next earlier{Chunk(p, first - length, s > 0 ? CHUNK : 0, bh % p.HV), -1};
    backward_segment(p, w, a, out, bh % p.HV, segment, add, s > 0 ? earlier : after);
  }
  if (out.dstate) store_state(w, a.dstate, bh, out.dstate);
}

// With channel decay the grams' gradients have no factor D, only its triangle.
static void fill_triangle(const Workspace& w) {
  for (int64_t j = 0; j < CHUNK; ++j) {
    for (int64_t i = 0; i < CHUNK; ++i) w.decays[column_at(i, CHUNK) + j * PANEL] = i >= j ? 1.0f : 0.0f;
  }
}

// The first chunk that is computed of head `bh`, if bh < end.
static Next first_chunk(const Problem& p, int64_t bh, int64_t end) {
  if (bh >= end) return {Chunk(p, 0, 0, 0), -1};
  const int64_t first = p.first(bh / p.HV);
  return {Chunk(p, first, min_of(CHUNK, p.first(bh / p.HV + 1) - first), bh % p.HV), bh};
}

// Computes key heads [begin, end) of sequences * H. The value heads of a key head follow each other, because they add
// up in its dq and dk.
void backward_heads(const Problem& p, const Gradients& out, int64_t begin, int64_t end) {
  Workspace& w = thread_local_arrays<Workspace>(p, true);
  BackwardBuffers& a = thread_local_arrays<BackwardBuffers>(p, w, p.longest());
  if (p.gate == Gate::channel) fill_triangle(w);
  const int64_t group = p.HV / p.H;
  for (int64_t bh = begin * group; bh < end * group; ++bh) {
    const int64_t sequence = bh / p.HV;
    const Span tokens{p.first(sequence), p.first(sequence + 1)};
    backward_head(p, w, a, out, bh, tokens, bh % group > 0, first_chunk(p, bh + 1, end * group));
  }
}

}  // namespace
}  // namespace sleepkern::SLEEPKERN_ISA
