// The forward: heads are interleaved chunk by chunk, and some panels are computed again in float32.
#pragma once

#include <cstdint>
#include <cstring>
#include <type_traits>

#include "common/recurrence.h"
#include "cpu/gemm/microkernel.h"
#include "cpu/recurrence/buffers.h"
#include "cpu/recurrence/chunk_factors.h"
#include "cpu/recurrence/cuts.h"
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
SLEEPKERN_STAGE void decode_head(const Problem& problem, Workspace& work, const Cuts& cuts, int64_t bh) {
  float* state = problem.final_state + bh * problem.K * problem.V;
  const size_t bytes = problem.K * problem.V * sizeof(float);
  if (!problem.state) {
    std::memset(state, 0, bytes);
  } else if (problem.state != problem.final_state) {
    std::memcpy(state, problem.state + bh * problem.K * problem.V, bytes);
  }
  const int64_t head = bh % problem.HV;
  const Chunk tokens(problem, cuts.begin, cuts.end - cuts.begin, head);
  for (int64_t t = 0; t < tokens.count; ++t) {
    decode_token(tokens, work, t, state, problem.K * problem.V);
    const int64_t kept = cuts.kept_before(cuts.begin + t + 1);
    if (kept >= 0) std::memcpy(problem.kept->states + (kept * problem.HV + head) * problem.K * problem.V, state, bytes);
  }
}

// The heads of one sequence that are interleaved, and the chunks of the sequence.
struct HeadGroup {
  int64_t bh, heads;
  Cuts cuts;

  // Heads from `bh` on and before `last`, at most `most`; there are none if bh == last.
  HeadGroup(const Problem& problem, int64_t bh, int64_t last, int64_t most)
      : bh(bh),
        heads(min_of(min_of(most, last - bh), (bh / problem.HV + 1) * problem.HV - bh)),
        cuts(problem, heads > 0 ? bh / problem.HV : 0) {}

  bool chunked() const { return heads > 0 && cuts.end - cuts.begin > DECODE_LIMIT; }
};

// The prefetch schedule for the chunk after chunk n of head h, in the interleaved order: the same tokens of the next
// head, the next tokens of the first head, or the first chunk of the group `next_group`.
static PrefetchSchedule plan_prefetch(const Problem& problem, const Workspace& work, const HeadGroup& now,
                                      const HeadGroup& next_group, int64_t n, int64_t h) {
  PrefetchSchedule prefetch(state_tiles(work));
  const bool last_head = h + 1 == now.heads, last = last_head && now.cuts.first(n + 1) >= now.cuts.end;
  if (last && !next_group.chunked()) return prefetch;
  const HeadGroup& then = last ? next_group : now;
  const int64_t bh = last_head ? then.bh : then.bh + h + 1;
  const Chunk next = then.cuts.chunk(problem, last ? 0 : last_head ? n + 1 : n, bh % problem.HV);
  prefetch.add_inputs(next);
  prefetch.add(next, {problem.o, problem.HV * problem.V, problem.v.type}, next.head * problem.V, problem.V);
  if (next.first == then.cuts.begin) {
    if (problem.state && problem.state != problem.final_state) prefetch.add_state(problem, problem.state, bh);
    prefetch.add_state(problem, problem.final_state, bh);
  }
  return prefetch;
}

// The state pass of a group of heads, interleaved. skipped [heads] has the bits of panels to skip; with bf16x2
// operands it gains those of panels whose rounding errors are too large.
template <class E>
SLEEPKERN_STAGE void state_pass_interleaved(const Problem& problem, Workspace& work, const HeadGroup& now,
                                            const HeadGroup& next_group, uint32_t* skipped) {
  Rounding* const rounding = work.rounding;
  const int64_t chunks = now.cuts.chunks();
  for (int64_t n = 0; n < chunks; ++n) {
    const int64_t kept = now.cuts.kept_before(now.cuts.first(n + 1));
    for (int64_t h = 0; h < now.heads; ++h) {
      const Chunk chunk = now.cuts.chunk(problem, n, (now.bh + h) % problem.HV);
      PrefetchSchedule prefetch = plan_prefetch(problem, work, now, next_group, n, h);
      work.state = work.states + h * work.state_size;
      work.skipped = skipped[h];
      if (work.skipped == every_panel(work)) continue;
      if (IS_BF16X2<E>) {
        work.state_bf16 = work.states_bf16 + h * work.state_size / 2;
        work.rounding = rounding + h * work.V_panels;
      }
      if (n == 0) {
        load_state(work, problem.state, now.bh + h, work.state);
        if constexpr (IS_BF16X2<E>) state_to_bf16x2(work);
      }
      chunk_factors<E>(chunk, work);
      state_pass<E>(chunk, work, prefetch);
      if (kept >= 0) stream_state(work, work.state, kept * problem.HV + chunk.head, problem.kept->states);
      if (n + 1 == chunks) {
        if (IS_BF16X2<E> && problem.want_output) judge_outputs(work);
        store_state(work, work.state, now.bh + h, problem.final_state);
      }
      skipped[h] = work.skipped;
    }
  }
  work.skipped = 0;
  work.rounding = rounding;
}

static void state_pass_heads(const Problem& problem, Workspace& work, const HeadGroup& now,
                             const HeadGroup& next_group) {
  uint32_t skipped[HEAD_GROUP] = {};
  if (!takes_bf16(problem)) return state_pass_interleaved<float>(problem, work, now, next_group, skipped);
  state_pass_interleaved<std::conditional_t<DOTS, Bf16x2, float>>(problem, work, now, next_group, skipped);
  for (int64_t h = 0; h < now.heads; ++h) {
    const HeadGroup again(problem, now.bh + h, now.bh + h + 1, 1);
    skipped[h] ^= every_panel(work);
    if (skipped[h] != every_panel(work)) state_pass_interleaved<float>(problem, work, again, next_group, skipped + h);
  }
}

// Computes tasks [begin, end): whole heads, or v-tiles of them.
void forward_tasks(const Problem& problem, int64_t v_tiles, int64_t begin, int64_t end) {
  Workspace& work = thread_local_arrays<Workspace>(problem, false);
  const int64_t most = v_tiles > 1 ? 1 : HEAD_GROUP;
  for (int64_t task = begin; task < end;) {
    const int64_t bh = task / v_tiles, v_tile = task % v_tiles, last = (end + v_tiles - 1) / v_tiles;
    const HeadGroup now(problem, bh, last, most), next_group(problem, bh + now.heads, last, most);
    work.first_panel = work.V_panels * v_tile / v_tiles;
    work.end_panel = work.V_panels * (v_tile + 1) / v_tiles;
    if (now.chunked()) {
      if (work.first_panel < work.end_panel) state_pass_heads(problem, work, now, next_group);
    } else if (v_tile == 0) {
      for (int64_t h = 0; h < now.heads; ++h) decode_head(problem, work, now.cuts, bh + h);
    }
    task += v_tiles > 1 ? 1 : now.heads;
  }
}

}  // namespace
}  // namespace sleepkern::SLEEPKERN_ISA
