// Passes of the state over the factors of its window, one after the other: S <- chunk_decay S + Kt^T (U - W S).
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#include "common/recurrence.h"
#include "cpu/gemm/microkernel.h"
#include "cpu/recurrence/buffers.h"
#include "cpu/recurrence/prefetch.h"
#include "cpu/recurrence/state_pass.h"
#include "cpu/replay/factors.h"
#include "cpu/simd/vec.h"

namespace sleepkern::SLEEPKERN_ISA {
namespace {

// out = U - W S of one value panel.
SLEEPKERN_STAGE void write_values(const Workspace& work, const BlockFactors& factors, const float* U,
                                  const float* state, float* out) {
  for (int64_t i = 0; i < factors.rows; i += ROWS) {
    Tile t;
    load(t, U + i * PANEL);
    multiply_add<-1>(t, factors.W + column_at(i, work.K_rows), state, work.K);
    store(t, out + i * PANEL);
  }
}

// state <- chunk_decay state + Kt^T values of one value panel.
SLEEPKERN_STAGE void write_state(const Workspace& work, const BlockFactors& factors, const float* chunk_decay,
                                 const float* values, float* state, PrefetchSchedule& prefetch) {
  for (int64_t d = 0; d < work.K; d += ROWS) {
    Tile t;
    load(t, state + d * PANEL);
    scale_rows(t, chunk_decay + d);
    multiply_add<1>(t, factors.k_tails + column_at(d, REPLAY_BLOCK), values, factors.rows);
    prefetch.step();
    store(t, state + d * PANEL);
  }
}

static double distance(const float* a, const float* b, int64_t n) {
  double total = 0;
  for (int64_t i = 0; i < n;) {
    Vec part{};
    for (const int64_t end = min_of(i + 4096, n); i < end; i += LANES) {
      const Vec x = b ? load(a + i) - load(b + i) : load(a + i);
      part += x * x;
    }
    total += sum(part);
  }
  return std::sqrt(total);
}

// The convergence test of a head: the distance to its fixed point is estimated by the ratio of its last two steps, see
// backends/replay/methods.py.
struct ConvergenceTest {
  double previous = 0, residual = INFINITY;

  bool converged(double step, double size, double tol) {
    const double ratio = step / max_of_double(previous, 1e-30);
    const double left = step == 0 ? 0 : ratio < 1 ? step * ratio / max_of_double(1 - ratio, 1e-30) : INFINITY;
    residual = left / max_of_double(size, 1e-30);
    previous = step;
    return residual <= tol;
  }
  static double max_of_double(double a, double b) { return a < b ? b : a; }
};

// Runs r.passes passes, or fewer with tol.
SLEEPKERN_STAGE void replay_passes(Workspace& work, const WindowFactors& x, const Replay& r, int64_t bh, int64_t tokens,
                                   bool delta, PrefetchSchedule& prefetch) {
  ConvergenceTest test;
  int64_t passes_done = 0;
  for (bool done = false; passes_done < r.passes && !done && !stops(r.interrupt); ++passes_done) {
    if (r.tol > 0) std::memcpy(x.before, work.state, work.state_size * sizeof(float));
    for (int64_t block = 0; block * REPLAY_BLOCK < tokens; ++block) {
      const BlockFactors factors = factors_of(x, work, block, min_of(REPLAY_BLOCK, tokens - block * REPLAY_BLOCK));
      for (int64_t panel = 0; panel < work.V_panels; ++panel) {
        float* state = work.state + panel * work.K_rows * PANEL;
        const float* U = factors.U + panel * REPLAY_BLOCK * PANEL;
        if (delta) write_values(work, factors, U, state, x.values);
        write_state(work, factors, factors.chunk_decay, delta ? x.values : U, state, prefetch);
      }
    }
    if (r.tol <= 0) continue;
    const double step = distance(work.state, x.before, work.state_size);
    if (passes_done == 0) {
      test.previous = step;
    } else {
      done = test.converged(step, distance(work.state, nullptr, work.state_size), r.tol);
    }
  }
  if (r.residual) r.residual[bh] = static_cast<float>(test.residual);
  if (r.passes_done) r.passes_done[bh] = static_cast<int32_t>(passes_done);
  if (r.before) store_state(work, x.before, bh, r.before);
}

}  // namespace
}  // namespace sleepkern::SLEEPKERN_ISA
