// All passes and layers of a group of sequences, whose rows stay in the caches.
//
//   per layer   x = norm h, packed -> into -> mixer -> packed -> h += out -> x = norm h, packed -> up, relu^2 -> h +=
//   down
//
// A group has at most GROUP_ROWS rows, see blocks.cpp.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#include "common/blocks.h"
#include "common/mixer_ops.h"
#include "common/recurrence.h"
#include "cpu/blocks/attention.h"
#include "cpu/gemm/gemm.h"
#include "cpu/gemm/microkernel.h"
#include "cpu/gemm/pack_lhs.h"
#include "cpu/gemm/winograd.h"
#include "cpu/mixer/convolution.h"
#include "cpu/mixer/gated_norm.h"
#include "cpu/recurrence/forward.h"
#include "cpu/runtime/arena.h"
#include "cpu/runtime/thread_pool.h"
#include "cpu/simd/bf16.h"
#include "cpu/simd/vec.h"

namespace sleepkern::SLEEPKERN_ISA {
namespace {

struct BlockArrays {
  float* h;         // [rows][d_padded]
  float* start;     // same: the input of the first pass
  float* x;         // micro-panels: normalised h, then the output of the mixer
  float* sums;      // [rows] pair sums of x, with Form::winograd
  float* wide;      // rows: x times `into`; then micro-panels: relu(x times `up`)^2
  float* mixed;     // [rows][mixed] output of the recurrence or attention
  float* normed;    // [rows][mixed] after the gated norm
  float* conv;      // [rows][channels]
  float *g, *beta;  // [rows][HV]
  float* after;     // states after the current layer
  double changes[2];
  int64_t rows, padded, d_padded;
};

static void lay_out(BlockArrays& a, const Blocks& b, int64_t sequences, ArenaCursor& take) {
  int64_t wide = 0, mixed = 0, channels = 0, heads = 0, state = 0, x = b.d;
  for (const Layer& l : b.layers) {
    wide = max_of(wide, max_of(round_up(l.into_width, PANEL), round_up(l.hidden, PANEL)));
    mixed = max_of(mixed, l.recurrent ? l.HV * l.V : b.d);
    x = max_of(x, mixed);
    if (!l.recurrent) continue;
    channels = max_of(channels, l.channels());
    heads = max_of(heads, l.HV);
    state = max_of(state, l.HV * l.K * l.V);
  }
  a.rows = sequences * b.L;
  a.padded = round_up(a.rows, ROWS);
  a.d_padded = round_up(b.d, PANEL);
  a.h = take(a.padded * a.d_padded);
  a.start = take(b.reinject ? a.padded * a.d_padded : 0);
  a.x = take(a.padded * x);
  a.sums = take(a.padded);
  a.wide = take(a.padded * wide);
  a.mixed = take((a.padded + LANES) * round_up(mixed, LANES));
  a.normed = take((a.padded + LANES) * round_up(mixed, LANES));
  a.conv = take(a.padded * channels + LANES);
  a.g = take(a.rows * heads);
  a.beta = take(a.rows * heads);
  a.after = take(sequences * state);
}

// Hands work to torch's threads if `shared`; else the calling thread does it all, because each thread has its own
// groups.
struct Team {
  bool shared;

  template <class Body>
  void each(int64_t n, int64_t grain, Body body) const {
    if (!shared) return body(0, n);
    parallel_for(
        n, grain, [](int64_t begin, int64_t end, void* self) { (*static_cast<Body*>(self))(begin, end); }, &body);
  }
};

// Sequences [first, first + sequences) of a call. E is the panels' element for the call's form.
template <class E>
struct SequenceGroup {
  const Blocks& b;
  BlockArrays& a;
  Team team;
  int64_t first, sequences;

  // One product; panel(product, n) computes panel n of the outputs.
  template <class Panel>
  void multiply(Panel panel, const float* x, const void* weight, int64_t width, int64_t depth, float* y,
                int64_t stride) const {
    const Product<E> p{reinterpret_cast<const E*>(x),
                       static_cast<const E*>(weight),
                       a.rows,
                       round_up(width, PANEL),
                       steps<E>(depth),
                       a.sums,
                       y,
                       stride};
    team.each(p.width / PANEL, 4, [&](int64_t begin, int64_t end) {
      for (int64_t n = begin; n < end; ++n) panel(p, n);
    });
  }

  // Packs rows times `balance` in micro-panels, with zeros beyond the last row. With eps each row is divided by its
  // root mean square.
  void pack(const float* rows, int64_t stride, int64_t n, float balance, const float* eps) const {
    E* x = reinterpret_cast<E*>(a.x);
    team.each(a.padded / ROWS, 4, [&](int64_t begin, int64_t end) {
      for (int64_t micro_panel = begin; micro_panel < end; ++micro_panel) {
        float factor[ROWS];
        for (int64_t r = 0; r < ROWS; ++r) {
          const int64_t row = micro_panel * ROWS + r;
          factor[r] = row >= a.rows ? 0.0f : eps ? balance * rms_factor(rows + row * stride, n, *eps) : balance;
        }
        pack_micro_panel(rows + micro_panel * ROWS * stride, stride, n, factor, x + micro_panel * ROWS * steps<E>(n));
      }
      if constexpr (IS_WINOGRAD<E>) sum_pairs(x + begin * ROWS * n, end - begin, n, a.sums + begin * ROWS);
    });
  }

  void run(double* changes) const;
  void run_pass(int64_t pass) const;
  void mix_recurrent(const Layer& l, int64_t pass) const;
  void convolve_inputs(const Layer& l, int64_t pass) const;
  void rates(const Layer& l) const;
  void run_recurrence(const Layer& l) const;
  void attend_window(const Layer& l, int64_t pass) const;
};

template <class E>
void SequenceGroup<E>::convolve_inputs(const Layer& l, int64_t pass) const {
  const int64_t kept = first * (l.W - 1) * l.channels();
  Convolution c{};
  c.sequences = sequences;
  c.T = b.L;
  c.D = l.channels();
  c.W = l.W;
  c.silu = true;
  c.x = {a.wide, round_up(l.into_width, PANEL), Type::float32};
  c.weight = l.taps;
  c.past = b.carry && pass > 0 ? l.last + kept : l.past + kept;
  c.y = a.conv;
  c.last = l.last + kept;
  team.each(a.rows, 16, [&](int64_t begin, int64_t end) { convolve(c, begin, end); });
  if (b.carry || pass + 1 == b.passes) keep_last(c);
}

// g = log sigmoid(decay + decay_bias), beta = strength sigmoid(.)
template <class E>
void SequenceGroup<E>::rates(const Layer& l) const {
  const int64_t stride = round_up(l.into_width, PANEL);
  const float* from = a.wide + l.channels() + l.HV * l.V;
  for (int64_t row = 0; row < a.rows; ++row) {
    for (int64_t h = 0; h < l.HV; ++h) {
      const float decay = from[row * stride + h] + l.decay_bias, strength = from[row * stride + l.HV + h];
      a.g[row * l.HV + h] = (decay < 0 ? decay : 0) - std::log1p(std::exp(-std::fabs(decay)));
      a.beta[row * l.HV + h] = l.strength / (1 + std::exp(-strength));
    }
  }
}

template <class E>
void SequenceGroup<E>::run_recurrence(const Layer& l) const {
  const int64_t size = l.HV * l.K * l.V, count = sequences * size;
  float* state = l.state + first * size;
  Problem p{};
  p.gate = Gate::head;
  p.delta = p.normalize = p.want_output = true;
  p.scale = 1 / std::sqrt(static_cast<float>(l.K));
  p.sequences = sequences;
  p.T = b.L;
  p.H = l.H;
  p.HV = l.HV;
  p.K = l.K;
  p.V = l.V;
  p.q = {a.conv, l.channels(), Type::float32};
  p.k = {a.conv + l.H * l.K, l.channels(), Type::float32};
  p.v = {a.conv + 2 * l.H * l.K, l.channels(), Type::float32};
  p.g = {a.g, l.HV, Type::float32};
  p.beta = {a.beta, l.HV, Type::float32};
  p.state = state;
  p.final_state = a.after;
  p.o = a.mixed;
  team.each(sequences * l.HV, 1, [&](int64_t begin, int64_t end) { forward_tasks(p, 1, begin, end); });
  double change = 0, after = 0;
  for (int64_t i = 0; i < count; i += 4096) {  // a long sum is a sum of short ones
    const int64_t end = min_of(i + 4096, count);
    Vec changes{}, sizes{};
    int64_t j = i;
    for (; j + LANES <= end; j += LANES) {
      const Vec now = load(a.after + j), step = now - load(state + j);
      changes += step * step;
      sizes += now * now;
      store(state + j, now);
    }
    change += sum(changes);
    after += sum(sizes);
    for (; j < end; ++j) {
      change += (a.after[j] - state[j]) * (a.after[j] - state[j]);
      after += a.after[j] * a.after[j];
      state[j] = a.after[j];
    }
  }
  a.changes[0] += change;
  a.changes[1] += after;
}

template <class E>
void SequenceGroup<E>::mix_recurrent(const Layer& l, int64_t pass) const {
  convolve_inputs(l, pass);
  rates(l);
  run_recurrence(l);
  GatedNorm norm{};
  norm.tokens = a.rows;
  norm.heads = l.HV;
  norm.V = l.V;
  norm.silu = true;
  norm.eps = l.gain_eps;
  norm.x = {a.mixed, l.HV * l.V, Type::float32};
  norm.gate = {a.wide + l.channels(), round_up(l.into_width, PANEL), Type::float32};
  norm.weight = l.gain;
  norm.y = a.normed;
  team.each(a.rows, 16, [&](int64_t begin, int64_t end) { gated_norm(norm, begin, end); });
  pack(a.normed, l.HV * l.V, l.HV * l.V, l.out.balance, nullptr);
}

template <class E>
void SequenceGroup<E>::attend_window(const Layer& l, int64_t pass) const {
  const int64_t D = b.d / l.H, S = l.kept + b.L;
  const bool last = pass + 1 == b.passes;
  team.each(sequences * l.H, 1, [&](int64_t begin, int64_t end) {
    for (int64_t task = begin; task < end; ++task) {
      const int64_t n = task / l.H, head = task % l.H, at = (first + n) * l.H + head;
      const int64_t stride = round_up(l.into_width, PANEL);
      const float* row = a.wide + n * b.L * stride + head * D;
      AttentionHead h{};
      h.q = row;
      h.k = row + b.d;
      h.v = row + 2 * b.d;
      h.stride = stride;
      h.L = b.L;
      h.D = D;
      h.kept = l.kept;
      h.keys = l.keys + at * l.kept * D;
      h.values = l.values + at * l.kept * D;
      h.all_keys = last ? l.all_keys + at * S * D : nullptr;
      h.all_values = last ? l.all_values + at * S * D : nullptr;
      h.q_gain = l.q_gain;
      h.k_gain = l.k_gain;
      h.q_eps = l.q_eps;
      h.k_eps = l.k_eps;
      h.o = a.mixed + n * b.L * b.d + head * D;
      h.o_stride = b.d;
      attend(h);
    }
  });
  pack(a.mixed, b.d, b.d, l.out.balance, nullptr);
}

template <class E>
void SequenceGroup<E>::run_pass(int64_t pass) const {
  a.changes[0] = a.changes[1] = 0;
  for (const Layer& l : b.layers) {
    pack(a.h, a.d_padded, b.d, l.into.balance, &l.mixer_eps);
    multiply(multiply_panel<Epilogue::store, E>, a.x, l.into.packed, l.into_width, b.d, a.wide,
             round_up(l.into_width, PANEL));
    l.recurrent ? mix_recurrent(l, pass) : attend_window(l, pass);
    multiply(multiply_panel<Epilogue::add_residual, E>, a.x, l.out.packed, b.d, l.recurrent ? l.HV * l.V : b.d, a.h,
             a.d_padded);
    pack(a.h, a.d_padded, b.d, l.up.balance, &l.mlp_eps);
    multiply(multiply_panel<Epilogue::relu_squared, E>, a.x, l.up.packed, l.hidden, b.d, a.wide, 0);
    if constexpr (IS_WINOGRAD<E>) {
      const E* hidden = reinterpret_cast<const E*>(a.wide);
      team.each(a.padded / ROWS, 4, [&](int64_t begin, int64_t end) {
        sum_pairs(hidden + begin * ROWS * l.hidden, end - begin, l.hidden, a.sums + begin * ROWS);
      });
    }
    multiply(multiply_panel<Epilogue::add_residual, E>, a.wide, l.down, b.d, l.hidden, a.h, a.d_padded);
  }
}

// Runs all passes. changes [passes][2] are sums of squares over the group's states: of a pass's change, and after it.
template <class E>
void SequenceGroup<E>::run(double* changes) const {
  float* h = b.h + first * b.L * b.d;
  const size_t row_bytes = b.d * sizeof(float);
  std::memset(a.h, 0, a.padded * a.d_padded * sizeof(float));
  for (int64_t row = 0; row < a.rows; ++row) std::memcpy(a.h + row * a.d_padded, h + row * b.d, row_bytes);
  if (b.reinject) std::memcpy(a.start, a.h, a.padded * a.d_padded * sizeof(float));
  for (int64_t pass = 0; pass < b.passes && !stops(b.interrupt); ++pass) {
    if (pass > 0 && b.reinject) {
      constexpr float EPS = 1.1920929e-07f;  // torch's for float32
      for (int64_t row = 0; row < a.rows; ++row) {
        float *to = a.h + row * a.d_padded, *start = a.start + row * a.d_padded;
        const float factor = rms_factor(to, b.d, EPS);
        for (int64_t d = 0; d < b.d; ++d) to[d] = to[d] * factor + start[d];
      }
    }
    run_pass(pass);
    changes[2 * pass] = a.changes[0];
    changes[2 * pass + 1] = a.changes[1];
  }
  for (int64_t row = 0; row < a.rows; ++row) std::memcpy(h + row * b.d, a.h + row * a.d_padded, row_bytes);
}

void run_group(const Blocks& b, int64_t first, int64_t sequences, bool shared, double* changes) {
  BlockArrays& arrays = thread_local_arrays<BlockArrays>(b, sequences);
  const Team team{shared};
  switch (b.form) {
    case Form::plain:
      return SequenceGroup<float>{b, arrays, team, first, sequences}.run(changes);
    case Form::winograd:
      return SequenceGroup<Winograd>{b, arrays, team, first, sequences}.run(changes);
    case Form::bfloat16:
      if constexpr (DOTS) SequenceGroup<Bf16x2>{b, arrays, team, first, sequences}.run(changes);
  }
}

}  // namespace
}  // namespace sleepkern::SLEEPKERN_ISA
