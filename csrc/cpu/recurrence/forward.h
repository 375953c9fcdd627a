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

// Decodes one head token by token, on the state in the caller's layout; bh = sequence * HV + head.
SLEEPKERN_STAGE void decode_head(const Problem& p, Workspace& w, int64_t bh, int64_t begin, int64_t end) {
  float* state = p.final_state + bh * p.K * p.V;
  const size_t bytes = p.K * p.V * sizeof(float);
  if (!p.state) {
    std::memset(state, 0, bytes);
  } else if (p.state != p.final_state) {
    std::memcpy(state, p.state + bh * p.K * p.V, bytes);
  }
  const Chunk tokens(p, begin, end - begin, bh % p.HV);
  for (int64_t t = 0; t < end - begin; ++t) decode_token(tokens, w, t, state);
}

// The heads of one sequence that are interleaved, and the range of its tokens.
struct HeadGroup {
  int64_t bh, heads, begin, end;

  // Heads from `bh` on and before `last`, at most `most`; there are none if bh == last.
  HeadGroup(const Problem& p, int64_t bh, int64_t last, int64_t most) : bh(bh) {
    const int64_t sequence = bh / p.HV;
    heads = min_of(min_of(most, last - bh), (sequence + 1) * p.HV - bh);
    begin = heads > 0 ? p.first(sequence) : 0;
    end = heads > 0 ? p.first(sequence + 1) : 0;
  }

  bool chunked() const { return end - begin > DECODE_LIMIT; }
};

// The prefetch schedule for the chunk after that of head h at token `first`, in the interleaved order: the same tokens
// of the next head, the next tokens of the first head, or the first chunk of the group `next_group`.
static PrefetchSchedule plan_prefetch(const Problem& p, const Workspace& w, const HeadGroup& now,
                                      const HeadGroup& next_group, int64_t first, int64_t h) {
  PrefetchSchedule prefetch(state_tiles(w));
  const bool last_head = h + 1 == now.heads, last = last_head && first + CHUNK >= now.end;
  if (last && !next_group.chunked()) return prefetch;
  const HeadGroup& then = last ? next_group : now;
  const int64_t bh = last_head ? then.bh : then.bh + h + 1;
  const int64_t start = last ? then.begin : last_head ? first + CHUNK : first;
  const Chunk next(p, start, min_of(CHUNK, then.end - start), bh % p.HV);
  prefetch.add_inputs(next);
  prefetch.add(next, {p.o, p.HV * p.V, p.v.type}, next.head * p.V, p.V);
  if (start == then.begin) {
    if (p.state && p.state != p.final_state) prefetch.add_state(p, p.state, bh);
    prefetch.add_state(p, p.final_state, bh);
  }
  return prefetch;
}

// The state pass of a group of heads, interleaved. skipped [heads] has the bits of panels to skip; with bf16x2
// operands it gains those of panels whose rounding errors are too large.
template <class E>
SLEEPKERN_STAGE void state_pass_interleaved(const Problem& p, Workspace& w, const HeadGroup& now,
                                            const HeadGroup& next_group, uint32_t* skipped) {
  Rounding* const rounding = w.rounding;
  for (int64_t first = now.begin; first < now.end; first += CHUNK) {
    for (int64_t h = 0; h < now.heads; ++h) {
      const Chunk chunk(p, first, min_of(CHUNK, now.end - first), (now.bh + h) % p.HV);
      PrefetchSchedule prefetch = plan_prefetch(p, w, now, next_group, first, h);
      w.state = w.states + h * w.state_size;
      w.skipped = skipped[h];
      if (w.skipped == every_panel(w)) continue;
      if (IS_BF16X2<E>) {
        w.state_bf16 = w.states_bf16 + h * w.state_size / 2;
        w.rounding = rounding + h * w.V_panels;
      }
      if (first == now.begin) {
        load_state(w, p.state, now.bh + h, w.state);
        if constexpr (IS_BF16X2<E>) state_to_bf16x2(w);
      }
      chunk_factors<E>(chunk, w);
      state_pass<E>(chunk, w, prefetch);
      if (first + CHUNK >= now.end) {
        if (IS_BF16X2<E> && p.want_output) judge_outputs(w);
        store_state(w, w.state, now.bh + h, p.final_state);
      }
      skipped[h] = w.skipped;
    }
  }
  w.skipped = 0;
  w.rounding = rounding;
}

static void state_pass_heads(const Problem& p, Workspace& w, const HeadGroup& now, const HeadGroup& next_group) {
  uint32_t skipped[HEAD_GROUP] = {};
  if (!takes_bf16(p)) return state_pass_interleaved<float>(p, w, now, next_group, skipped);
  state_pass_interleaved<std::conditional_t<DOTS, Bf16x2, float>>(p, w, now, next_group, skipped);
  for (int64_t h = 0; h < now.heads; ++h) {
    const HeadGroup again(p, now.bh + h, now.bh + h + 1, 1);
    skipped[h] ^= every_panel(w);
    if (skipped[h] != every_panel(w)) state_pass_interleaved<float>(p, w, again, next_group, skipped + h);
  }
}

// Computes tasks [begin, end): whole heads, or v-tiles of them.
void forward_tasks(const Problem& p, int64_t v_tiles, int64_t begin, int64_t end) {
  Workspace& w = thread_local_arrays<Workspace>(p, false);
  const int64_t most = v_tiles > 1 ? 1 : HEAD_GROUP;
  for (int64_t task = begin; task < end;) {
    const int64_t bh = task / v_tiles, v_tile = task % v_tiles, last = (end + v_tiles - 1) / v_tiles;
    const HeadGroup now(p, bh, last, most), next_group(p, bh + now.heads, last, most);
    w.first_panel = w.V_panels * v_tile / v_tiles;
    w.end_panel = w.V_panels * (v_tile + 1) / v_tiles;
    if (now.chunked()) {
      if (w.first_panel < w.end_panel) state_pass_heads(p, w, now, next_group);
    } else if (v_tile == 0) {
      for (int64_t h = 0; h < now.heads; ++h) decode_head(p, w, bh + h, now.begin, now.end);
    }
    task += v_tiles > 1 ? 1 : now.heads;
  }
}

}  // namespace
}  // namespace sleepkern::SLEEPKERN_ISA
