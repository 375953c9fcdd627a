// Replay of whole heads: the factors of the window are made once, then one of the two methods runs the passes.
#pragma once

#include <cstdint>

#include "common/recurrence.h"
#include "cpu/recurrence/buffers.h"
#include "cpu/recurrence/pack_tokens.h"
#include "cpu/recurrence/prefetch.h"
#include "cpu/recurrence/state_pass.h"
#include "cpu/replay/factors.h"
#include "cpu/replay/token_space.h"
#include "cpu/replay/wy.h"
#include "cpu/runtime/arena.h"
#include "cpu/simd/vec.h"

namespace sleepkern::SLEEPKERN_ISA {
namespace {

// Plans the prefetch of a head's first block and of its states.
static void plan_prefetch(const Problem& problem, int64_t bh, PrefetchSchedule& prefetch) {
  const int64_t first = problem.first(bh / problem.HV), tokens = problem.first(bh / problem.HV + 1) - first;
  prefetch.add_inputs(Chunk(problem, first, min_of(tokens, REPLAY_BLOCK), bh % problem.HV));
  if (problem.state) prefetch.add_state(problem, problem.state, bh);
  prefetch.add_state(problem, problem.final_state, bh);
}

constexpr int64_t PASSES_AHEAD = 1024;  // the prefetch of the next head is spread over at most so many passes

// Computes heads [begin, end) of sequences * HV, one after the other.
void replay_heads(const Problem& problem, const Replay& r, int64_t begin, int64_t end) {
  Workspace& work = thread_local_arrays<Workspace>(problem, true);
  const WindowFactors& window = thread_local_arrays<WindowFactors>(work, problem.longest());
  const TokenSpace& space = thread_local_arrays<TokenSpace>(work);
  for (int64_t bh = begin; bh < end && !stops(r.interrupt); ++bh) {
    const int64_t first = problem.first(bh / problem.HV), tokens = problem.first(bh / problem.HV + 1) - first;
    load_state(work, problem.state, bh, work.state);
    for (int64_t block = 0; block * REPLAY_BLOCK < tokens; ++block) {
      const int64_t at = block * REPLAY_BLOCK;
      make_block(problem, work, window, first + at, min_of(REPLAY_BLOCK, tokens - at), bh % problem.HV, block);
    }
    const bool in_token_space = r.rank && tokens > 0;
    const int64_t blocks = (tokens + REPLAY_BLOCK - 1) / REPLAY_BLOCK;
    PrefetchSchedule prefetch(state_tiles(work) * (in_token_space ? 1 : min_of(r.passes, PASSES_AHEAD) * blocks));
    if (bh + 1 < end) plan_prefetch(problem, bh + 1, prefetch);
    bool by_passes = !in_token_space;
    if (in_token_space) {
      const double before = problem.state ? distance(work.state, nullptr, work.state_size) : 0;
      replay_in_token_space(problem, work, window, space, r, tokens, prefetch);
      by_passes = cancels(work, space, before);
      if (by_passes) load_state(work, problem.state, bh, work.state);
    }
    if (by_passes) replay_passes(work, window, r, bh, tokens, problem.delta, prefetch);
    store_state(work, work.state, bh, problem.final_state);
  }
}

}  // namespace
}  // namespace sleepkern::SLEEPKERN_ISA
