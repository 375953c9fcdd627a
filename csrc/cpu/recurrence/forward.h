// The forward: heads are interleaved chunk by chunk, and some panels are computed again in float32.
#pragma once

#include <cstdint>
#include <cstring>
#include <type_traits>

#include "common/recurrence.h"
#include "cpu/gemm/microkernel.h"
#include "cpu/recurrence/buffers.h"
#include "cpu/recurrence/chunk_factors.h"
#include "cpu/recurrence/decode.h"
#include "cpu/recurrence/pack_tokens.h"
#include "cpu/recurrence/prefetch.h"
#include "cpu/recurrence/rounding.h"
#include "cpu/recurrence/state_pass.h"
#include "cpu/runtime/arena.h"
#include "cpu/runtime/implementation.h"
#include "cpu/simd/bf16.h"
#include "cpu/simd/vec.h"

namespace sleepkern::SLEEPKERN_ISA {
namespace {

// Decodes one head token by token, on the state in the caller's layout; unit = sequence * HV + head.
SLEEPKERN_STAGE void step_head(const Problem& p, Workspace& w, int64_t unit, int64_t begin, int64_t end) {
  float* state = p.final_state + unit * p.K * p.V;
  const size_t bytes = p.K * p.V * sizeof(float);
  if (!p.state) {
    std::memset(state, 0, bytes);
  } else if (p.state != p.final_state) {
    std::memcpy(state, p.state + unit * p.K * p.V, bytes);
  }
  const Chunk tokens(p, begin, end - begin, unit % p.HV);
  for (int64_t t = 0; t < end - begin; ++t) step_token(tokens, w, t, state);
}

// The heads of one sequence that are interleaved, and the range of its tokens.
struct Turns {
  int64_t unit, heads, begin, end;

  // Heads from `unit` on and before `last`, at most `most`; there are none if unit == last.
  Turns(const Problem& p, int64_t unit, int64_t last, int64_t most) : unit(unit) {
    const int64_t sequence = unit / p.HV;
    heads = min_of(min_of(most, last - unit), (sequence + 1) * p.HV - unit);
    begin = heads > 0 ? p.first(sequence) : 0;
    end = heads > 0 ? p.first(sequence + 1) : 0;
  }

  bool chunked() const { return end - begin > DECODE_LIMIT; }
};

// The prefetch schedule for the chunk after that of head h at token `first`, in the interleaved order: the same tokens
// of the next head, the next tokens of the first head, or the first chunk of the group `following`.
static Ahead plan_prefetch(const Problem& p, const Workspace& w, const Turns& now, const Turns& following,
                           int64_t first, int64_t h) {
  Ahead ahead(state_tiles(w));
  const bool last_head = h + 1 == now.heads, last = last_head && first + CHUNK >= now.end;
  if (last && !following.chunked()) return ahead;
  const Turns& then = last ? following : now;
  const int64_t unit = last_head ? then.unit : then.unit + h + 1;
  const int64_t start = last ? then.begin : last_head ? first + CHUNK : first;
  const Chunk next(p, start, min_of(CHUNK, then.end - start), unit % p.HV);
  ahead.add_inputs(next);
  ahead.add(next, {p.o, p.HV * p.V, p.v.type}, next.head * p.V, p.V);
  if (start == then.begin) {
    if (p.state && p.state != p.final_state) ahead.add_state(p, p.state, unit);
    ahead.add_state(p, p.final_state, unit);
  }
  return ahead;
}

// The state pass of a group of heads, interleaved. left_out [heads] has the bits of panels to skip; with bf16x2
// operands it gains those of panels whose rounding errors are too large.
template <class E>
SLEEPKERN_STAGE void ingest_in_turns(const Problem& p, Workspace& w, const Turns& now, const Turns& following,
                                     uint32_t* left_out) {
  Rounding* const rounding = w.rounding;
  for (int64_t first = now.begin; first < now.end; first += CHUNK) {
    for (int64_t h = 0; h < now.heads; ++h) {
      const Chunk chunk(p, first, min_of(CHUNK, now.end - first), (now.unit + h) % p.HV);
      Ahead ahead = plan_prefetch(p, w, now, following, first, h);
      w.state = w.states + h * w.state_size;
      w.left_out = left_out[h];
      if (w.left_out == every_panel(w)) continue;
      if (IS_PAIR<E>) {
        w.state_pairs = w.states_pairs + h * w.state_size / 2;
        w.rounding = rounding + h * w.V_panels;
      }
      if (first == now.begin) {
        load_state(w, p.state, now.unit + h, w.state);
        if constexpr (IS_PAIR<E>) pair_state(w);
      }
      prepare<E>(chunk, w);
      ingest<E>(chunk, w, ahead);
      if (first + CHUNK >= now.end) {
        if (IS_PAIR<E> && p.reads) judge_outputs(w);
        store_state(w, w.state, now.unit + h, p.final_state);
      }
      left_out[h] = w.left_out;
    }
  }
  w.left_out = 0;
  w.rounding = rounding;
}

static void ingest_heads(const Problem& p, Workspace& w, const Turns& now, const Turns& following) {
  uint32_t left_out[GROUP] = {};
  if (!takes_pairs(p)) return ingest_in_turns<float>(p, w, now, following, left_out);
  ingest_in_turns<std::conditional_t<DOTS, Pair, float>>(p, w, now, following, left_out);
  for (int64_t h = 0; h < now.heads; ++h) {
    const Turns again(p, now.unit + h, now.unit + h + 1, 1);
    left_out[h] ^= every_panel(w);
    if (left_out[h] != every_panel(w)) ingest_in_turns<float>(p, w, again, following, left_out + h);
  }
}

// Computes tasks [begin, end): whole heads, or v-tiles of them.
void forward_units(const Problem& p, int64_t blocks, int64_t begin, int64_t end) {
  Workspace& w = thread_local_arrays<Workspace>(p, false);
  const int64_t most = blocks > 1 ? 1 : GROUP;
  for (int64_t unit = begin; unit < end;) {
    const int64_t head = unit / blocks, block = unit % blocks, last = (end + blocks - 1) / blocks;
    const Turns now(p, head, last, most), following(p, head + now.heads, last, most);
    w.first_panel = w.V_panels * block / blocks;
    w.end_panel = w.V_panels * (block + 1) / blocks;
    if (now.chunked()) {
      if (w.first_panel < w.end_panel) ingest_heads(p, w, now, following);
    } else if (block == 0) {
      for (int64_t h = 0; h < now.heads; ++h) step_head(p, w, head + h, now.begin, now.end);
    }
    unit += blocks > 1 ? 1 : now.heads;
  }
}

}  // namespace
}  // namespace sleepkern::SLEEPKERN_ISA
