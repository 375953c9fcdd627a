// The whole forward, compiled once per ISA. The including file defines SLEEPKERN_ISA (namespace and name) and
// SLEEPKERN_LANES (floats per vector); everything below it has internal linkage in that namespace.

#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <ctime>
#include <new>
#include <utility>

#include "implementation.h"

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

// One head of one sequence: unit = sequence * HV + head.
void forward_head(const Problem& p, Workspace& w, int64_t unit) {
  const int64_t sequence = unit / p.HV, head = unit % p.HV;
  const int64_t begin = p.offsets ? p.offsets[sequence] : sequence * p.T;
  const int64_t end = p.offsets ? p.offsets[sequence + 1] : begin + p.T;
  if (end - begin <= STEP_LIMIT) {
    float* state = p.final_state + unit * p.K * p.V;
    const size_t bytes = p.K * p.V * sizeof(float);
    if (!p.state) {
      std::memset(state, 0, bytes);
    } else if (p.state != p.final_state) {
      std::memcpy(state, p.state + unit * p.K * p.V, bytes);
    }
    const Chunk tokens(p, begin, end - begin, head);
    for (int64_t t = 0; t < end - begin; ++t) step_token(tokens, w, t, state);
    return;
  }
  load_state(p, w, unit);
  for (int64_t first = begin; first < end; first += CHUNK) {
    const Chunk chunk(p, first, min_of(CHUNK, end - first), head);
    prepare(chunk, w);
    ingest(chunk, w);
  }
  store_state(p, w, unit);
}

void forward_heads(const Problem& p, int64_t begin, int64_t end) {
  Workspace& w = workspace_for(p);
  for (int64_t unit = begin; unit < end; ++unit) forward_head(p, w, unit);
}

double seconds_now() {
  timespec now;
  clock_gettime(CLOCK_MONOTONIC, &now);
  return now.tv_sec + 1e-9 * now.tv_nsec;
}

// Independent multiply-adds on a register tile, best of many short rounds.
double peak(double seconds) {
  const double start = seconds_now();
  const int64_t depth = 128;
  alignas(64) float left[depth * PANEL] = {}, right[depth * PANEL] = {};
  volatile float sink = 0;
  double best = 0;
  while (seconds_now() - start < seconds) {
    Tile t;
    clear(t);
    const double began = seconds_now();
    for (int round = 0; round < 200; ++round) multiply_add<1>(t, left, right, depth);
    const double took = seconds_now() - began;
    sink = sink + t.at[0][0][0];
    const double rate = 200.0 * 2 * depth * ROWS * PANEL / took;
    best = rate > best ? rate : best;
  }
  return best;
}

}  // namespace

bool supported() { return SLEEPKERN_SUPPORTED; }
extern const Implementation table;
const Implementation table = {SLEEPKERN_STRING(SLEEPKERN_ISA), supported, forward_heads, peak};

}  // namespace SLEEPKERN_ISA
}  // namespace sleepkern
