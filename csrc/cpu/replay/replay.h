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
static void plan_prefetch(const Problem& p, int64_t bh, PrefetchSchedule& prefetch) {
  const int64_t first = p.first(bh / p.HV), tokens = p.first(bh / p.HV + 1) - first;
  prefetch.add_inputs(Chunk(p, first, min_of(tokens, REPLAY_BLOCK), bh % p.HV));
  if (p.state) prefetch.add_state(p, p.state, bh);
  prefetch.add_state(p, p.final_state, bh);
}

constexpr int64_t PASSES_AHEAD = 1024;  // the prefetch of the next head is spread over at most so many passes

// Computes heads [begin, end) of sequences * HV, one after the other.
void replay_heads(const Problem& p, const Replay& r, int64_t begin, int64_t end) {
  Workspace& w = thread_local_arrays<Workspace>(p, true);
  const WindowFactors& window = thread_local_arrays<WindowFactors>(w, p.longest());
  const TokenSpace& space = thread_local_arrays<TokenSpace>(w);
  for (int64_t bh = begin; bh < end && !stops(r.interrupt); ++bh) {
    const int64_t first = p.first(bh / p.HV), tokens = p.first(bh / p.HV + 1) - first;
    load_state(w, p.state, bh, w.state);
    for (int64_t block = 0; block * REPLAY_BLOCK < tokens; ++block) {
      const int64_t at = block * REPLAY_BLOCK;
      make_block(p, w, window, first + at, min_of(REPLAY_BLOCK, tokens - at), bh % p.HV, block);
    }
    const bool in_token_space = r.rank && tokens > 0;
    const int64_t blocks = (tokens + REPLAY_BLOCK - 1) / REPLAY_BLOCK;
    PrefetchSchedule prefetch(state_tiles(w) * (in_token_space ? 1 : min_of(r.passes, PASSES_AHEAD) * blocks));
    if (bh + 1 < end) plan_prefetch(p, bh + 1, prefetch);
    bool by_passes = !in_token_space;
    if (in_token_space) {
      const double before = p.state ? distance(w.state, nullptr, w.state_size) : 0;
      replay_in_token_space(p, w, window, space, r, tokens, prefetch);
      by_passes = cancels(w, space, before);
      if (by_passes) load_state(w, p.state, bh, w.state);
    }
    if (by_passes) replay_passes(w, window, r, bh, tokens, p.delta, prefetch);
    store_state(w, w.state, bh, p.final_state);
  }
}

}  // namespace
}  // namespace sleepkern::SLEEPKERN_ISA
