// Everything, compiled once per ISA. The including file defines SLEEPKERN_ISA (namespace and name) and
// SLEEPKERN_LANES (floats per vector); everything below it has internal linkage in that namespace.

#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <ctime>
#include <new>
#include <type_traits>
#include <utility>

#include "implementation.h"
#include "memory.h"

#define SLEEPKERN_STRING_(x) #x
#define SLEEPKERN_STRING(x) SLEEPKERN_STRING_(x)

namespace sleepkern {
namespace SLEEPKERN_ISA {
namespace {

#include "simd.h"
#include "tile.h"
#include "workspace.h"
#include "pack-inl.h"
#include "channel-inl.h"
#include "prepare-inl.h"
#include "ingest-inl.h"
#include "step-inl.h"
#include "adjoint-workspace.h"
#include "adjoint-channel-inl.h"
#include "adjoint-inl.h"
#include "backward-inl.h"
#include "replay-inl.h"
#include "rank-inl.h"
#include "activation-inl.h"
#include "convolution-inl.h"
#include "norm-inl.h"
#include "product-inl.h"
#include "attention-inl.h"

// Token by token, on the state as the caller keeps it; unit = sequence * HV + head.
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

// `heads` heads of one sequence from `unit` on, taking turns chunk by chunk.
SLEEPKERN_STAGE void ingest_group(const Problem& p, Workspace& w, int64_t unit, int64_t heads, int64_t begin,
                                  int64_t end) {
  auto state_of = [&](int64_t h) { return w.states + h * w.state_size; };
  for (int64_t h = 0; h < heads; ++h) {
    w.state = state_of(h);
    load_state(w, p.state, unit + h, w.state);
  }
  for (int64_t first = begin; first < end; first += CHUNK) {
    const int64_t after = min_of(first + CHUNK, end);
    for (int64_t h = 0; h < heads; ++h) {
      const bool last = h + 1 == heads;
      const int64_t next = last ? 0 : h + 1, next_first = last ? after : first;
      const int64_t next_count = min_of(CHUNK, end - next_first);
      const Chunk chunk(p, first, after - first, (unit + h) % p.HV);
      w.state = state_of(h);
      prepare(chunk, w);
      ingest(chunk, w, Chunk(p, next_first, next_count, (unit + next) % p.HV));
    }
  }
  for (int64_t h = 0; h < heads; ++h) {
    w.state = state_of(h);
    store_state(w, w.state, unit + h, p.final_state);
  }
}

void forward_units(const Problem& p, int64_t blocks, int64_t begin, int64_t end) {
  Workspace& w = thread_local_arrays<Workspace>(p, false);
  for (int64_t unit = begin; unit < end;) {
    const int64_t head = unit / blocks, block = unit % blocks, sequence = head / p.HV;
    const int64_t first = p.first(sequence), last = p.first(sequence + 1);
    const int64_t group = blocks > 1 ? 1 : min_of(GROUP, min_of(end, (sequence + 1) * p.HV) - unit);
    w.first_panel = w.V_panels * block / blocks;
    w.end_panel = w.V_panels * (block + 1) / blocks;
    if (last - first > STEP_LIMIT) {
      if (w.first_panel < w.end_panel) ingest_group(p, w, head, group, first, last);
    } else if (block == 0) {
      for (int64_t h = 0; h < group; ++h) step_head(p, w, head + h, first, last);
    }
    unit += group;
  }
}

#include "blocks-inl.h"

double seconds_now() {
  timespec now;
  clock_gettime(CLOCK_MONOTONIC, &now);
  return now.tv_sec + 1e-9 * now.tv_nsec;
}

// Independent multiply-adds on a register tile, best of many short rounds. The operands are shown to the compiler as
// unknown and every accumulator as used, or it would leave most of the work out.
double peak(double seconds) {
  const double start = seconds_now();
  const int rounds = 200;
  const int64_t depth = 128;
  alignas(64) float left[depth * PANEL] = {}, right[depth * PANEL] = {}, out[ROWS * PANEL];
  double best = 0;
  while (seconds_now() - start < seconds) {
    Tile t;
    clear(t);
    const double began = seconds_now();
    for (int round = 0; round < rounds; ++round) {
      asm volatile("" ::"r"(left), "r"(right) : "memory");
      multiply_add<1>(t, left, right, depth);
    }
    const double rate = 2.0 * rounds * depth * ROWS * PANEL / (seconds_now() - began);
    store(t, out);
    asm volatile("" ::"r"(out) : "memory");
    best = rate > best ? rate : best;
  }
  return best;
}

}  // namespace

bool supported() { return SLEEPKERN_SUPPORTED; }
extern const Implementation table;
const Implementation table = {
    SLEEPKERN_STRING(SLEEPKERN_ISA),
    supported,
    forward_units,
    backward_heads,
    replay_heads,
    convolve,
    convolve_backward,
    convolve_step,
    gated_norm,
    gated_norm_backward,
    run_group,
    pack_matrix,
    PANEL,
    peak,
};

}  // namespace SLEEPKERN_ISA
}  // namespace sleepkern
