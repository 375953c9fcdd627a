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
static void plan_prefetch(const Problem& p, int64_t unit, Ahead& ahead) {
  const int64_t first = p.first(unit / p.HV), tokens = p.first(unit / p.HV + 1) - first;
  ahead.add_inputs(Chunk(p, first, min_of(tokens, REPLAY_BLOCK), unit % p.HV));
  if (p.state) ahead.add_state(p, p.state, unit);
  ahead.add_state(p, p.final_state, unit);
}

constexpr int64_t PASSES_AHEAD = 1024;  // the prefetch of the next head is spread over at most so many passes

// Computes heads [begin, end) of sequences * HV, one after the other.
void replay_heads(const Problem& p, const Replay& r, int64_t begin, int64_t end) {
  Workspace& w = thread_local_arrays<Workspace>(p, true);
  const Window& window = thread_local_arrays<Window>(w, p.longest());
  const Rank& rank = thread_local_arrays<Rank>(w);
  for (int64_t unit = begin; unit < end && !stops(r.interrupt); ++unit) {
    const int64_t first = p.first(unit / p.HV), tokens = p.first(unit / p.HV + 1) - first;
    load_state(w, p.state, unit, w.state);
    for (int64_t block = 0; block * REPLAY_BLOCK < tokens; ++block) {
      const int64_t at = block * REPLAY_BLOCK;
      make_block(p, w, window, first + at, min_of(REPLAY_BLOCK, tokens - at), unit % p.HV, block);
    }
    const bool in_rows = r.rank && tokens > 0;
    const int64_t blocks = (tokens + REPLAY_BLOCK - 1) / REPLAY_BLOCK;
    Ahead ahead(state_tiles(w) * (in_rows ? 1 : min_of(r.passes, PASSES_AHEAD) * blocks));
    if (unit + 1 < end) plan_prefetch(p, unit + 1, ahead);
    bool by_passes = !in_rows;
    if (in_rows) {
      const double before = p.state ? distance(w.state, nullptr, w.state_size) : 0;
      replay_in_rows(p, w, window, rank, r, tokens, ahead);
      by_passes = cancels(w, rank, before);
      if (by_passes) load_state(w, p.state, unit, w.state);
    }
    if (by_passes) replay_passes(w, window, r, unit, tokens, p.delta, ahead);
    store_state(w, w.state, unit, p.final_state);
  }
}

}  // namespace
}  // namespace sleepkern::SLEEPKERN_ISA
