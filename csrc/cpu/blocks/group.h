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

static void lay_out(BlockArrays& arrays, const Blocks& call, int64_t sequences, ArenaCursor& take) {
  int64_t wide = 0, mixed = 0, channels = 0, heads = 0, state = 0, x = call.d;
  for (const Layer& layer : call.layers) {
    wide = max_of(wide, max_of(round_up(layer.into_width, PANEL), round_up(layer.hidden, PANEL)));
    mixed = max_of(mixed, layer.recurrent ? layer.HV * layer.V : call.d);
    x = max_of(x, mixed);
    if (!layer.recurrent) continue;
    channels = max_of(channels, layer.channels());
    heads = max_of(heads, layer.HV);
    state = max_of(state, layer.HV * layer.K * layer.V);
  }
  arrays.rows = sequences * call.L;
  arrays.padded = round_up(arrays.rows, ROWS);
  arrays.d_padded = round_up(call.d, PANEL);
  arrays.h = take(arrays.padded * arrays.d_padded);
  arrays.start = take(call.reinject ? arrays.padded * arrays.d_padded : 0);
  arrays.x = take(arrays.padded * x);
  arrays.sums = take(arrays.padded);
  arrays.wide = take(arrays.padded * wide);
  arrays.mixed = take((arrays.padded + LANES) * round_up(mixed, LANES));
  arrays.normed = take((arrays.padded + LANES) * round_up(mixed, LANES));
  arrays.conv = take(arrays.padded * channels + LANES);
  arrays.g = take(arrays.rows * heads);
  arrays.beta = take(arrays.rows * heads);
  arrays.after = take(sequences * state);
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
  const Blocks& call;
  BlockArrays& arrays;
  Team team;
  int64_t first, sequences;

  // One product; panel(product, n) computes panel n of the outputs.
  template <class Panel>
  void multiply(Panel panel, const float* x, const void* weight, int64_t width, int64_t depth, float* y,
                int64_t stride) const {
    const Product<E> p{reinterpret_cast<const E*>(x),
                       static_cast<const E*>(weight),
                       arrays.rows,
                       round_up(width, PANEL),
                       steps<E>(depth),
                       arrays.sums,
                       y,
                       stride};
    team.each(p.width / PANEL, 4, [&](int64_t begin, int64_t end) {
      for (int64_t n = begin; n < end; ++n) panel(p, n);
    });
  }

  // Packs rows times `balance` in micro-panels, with zeros beyond the last row. With eps each row is divided by its
  // root mean square.
  void pack(const float* rows, int64_t stride, int64_t n, float balance, const float* eps) const {
    E* x = reinterpret_cast<E*>(arrays.x);
    team.each(arrays.padded / ROWS, 4, [&](int64_t begin, int64_t end) {
      for (int64_t micro_panel = begin; micro_panel < end; ++micro_panel) {
        float factor[ROWS];
        for (int64_t r = 0; r < ROWS; ++r) {
          const int64_t row = micro_panel * ROWS + r;
          factor[r] = row >= arrays.rows ? 0.0f : eps ? balance * rms_factor(rows + row * stride, n, *eps) : balance;
        }
        pack_micro_panel(rows + micro_panel * ROWS * stride, stride, n, factor, x + micro_panel * ROWS * steps<E>(n));
      }
      if constexpr (IS_WINOGRAD<E>) sum_pairs(x + begin * ROWS * n, end - begin, n, arrays.sums + begin * ROWS);
    });
  }

  void run(double* changes) const;
  void run_pass(int64_t pass) const;
  void mix_recurrent(const Layer& layer, int64_t pass) const;
  void convolve_inputs(const Layer& layer, int64_t pass) const;
  void rates(const Layer& layer) const;
  void run_recurrence(const Layer& layer) const;
  void attend_window(const Layer& layer, int64_t pass) const;
};

template <class E>
void SequenceGroup<E>::convolve_inputs(const Layer& layer, int64_t pass) const {
  const int64_t kept = first * (layer.W - 1) * layer.channels();
  Convolution c{};
  c.sequences = sequences;
  c.T = call.L;
  c.D = layer.channels();
  c.W = layer.W;
  c.silu = true;
  c.x = {arrays.wide, round_up(layer.into_width, PANEL), Type::float32};
  c.weight = layer.taps;
  c.past = call.carry && pass > 0 ? layer.last + kept : layer.past + kept;
  c.y = arrays.conv;
  c.last = layer.last + kept;
  team.each(arrays.rows, 16, [&](int64_t begin, int64_t end) { convolve(c, begin, end); });
  if (call.carry || pass + 1 == call.passes) keep_last(c);
}

// g = log sigmoid(decay + decay_bias), beta = strength sigmoid(.)
template <class E>
void SequenceGroup<E>::rates(const Layer& layer) const {
  const int64_t stride = round_up(layer.into_width, PANEL);
  const float* from = arrays.wide + layer.channels() + layer.HV * layer.V;
  for (int64_t row = 0; row < arrays.rows; ++row) {
    for (int64_t h = 0; h < layer.HV; ++h) {
      const float decay = from[row * stride + h] + layer.decay_bias, strength = from[row * stride + layer.HV + h];
      arrays.g[row * layer.HV + h] = (decay < 0 ? decay : 0) - std::log1p(std::exp(-std::fabs(decay)));
      arrays.beta[row * layer.HV + h] = layer.strength / (1 + std::exp(-strength));
    }
  }
}

template <class E>
void SequenceGroup<E>::run_recurrence(const Layer& layer) const {
  const int64_t size = layer.HV * layer.K * layer.V, count = sequences * size;
  float* state = layer.state + first * size;
  Problem p{};
  p.gate = Gate::head;
  p.delta = p.normalize = p.want_output = true;
  p.scale = 1 / std::sqrt(static_cast<float>(layer.K));
  p.sequences = sequences;
  p.T = call.L;
  p.H = layer.H;
  p.HV = layer.HV;
  p.K = layer.K;
  p.V = layer.V;
  p.q = {arrays.conv, layer.channels(), Type::float32};
  p.k = {arrays.conv + layer.H * layer.K, layer.channels(), Type::float32};
  p.v = {arrays.conv + 2 * layer.H * layer.K, layer.channels(), Type::float32};
  p.g = {arrays.g, layer.HV, Type::float32};
  p.beta = {arrays.beta, layer.HV, Type::float32};
  p.state = state;
  p.final_state = arrays.after;
  p.o = arrays.mixed;
  team.each(sequences * layer.HV, 1, [&](int64_t begin, int64_t end) { forward_tasks(p, 1, begin, end); });
  double change = 0, after = 0;
  for (int64_t i = 0; i < count; i += 4096) {  // a long sum is a sum of short ones
    const int64_t end = min_of(i + 4096, count);
    Vec changes{}, sizes{};
    int64_t j = i;
    for (; j + LANES <= end; j += LANES) {
      const Vec now = load(arrays.after + j), step = now - load(state + j);
      changes += step * step;
      sizes += now * now;
      store(state + j, now);
    }
    change += sum(changes);
    after += sum(sizes);
    for (; j < end; ++j) {
      change += (arrays.after[j] - state[j]) * (arrays.after[j] - state[j]);
      after += arrays.after[j] * arrays.after[j];
      state[j] = arrays.after[j];
    }
  }
  arrays.changes[0] += change;
  arrays.changes[1] += after;
}

template <class E>
void SequenceGroup<E>::mix_recurrent(const Layer& layer, int64_t pass) const {
  convolve_inputs(layer, pass);
  rates(layer);
  run_recurrence(layer);
  GatedNorm norm{};
  norm.tokens = arrays.rows;
  norm.heads = layer.HV;
  norm.V = layer.V;
  norm.silu = true;
  norm.eps = layer.gain_eps;
  norm.x = {arrays.mixed, layer.HV * layer.V, Type::float32};
  norm.gate = {arrays.wide + layer.channels(), round_up(layer.into_width, PANEL), Type::float32};
  norm.weight = layer.gain;
  norm.y = arrays.normed;
  team.each(arrays.rows, 16, [&](int64_t begin, int64_t end) { gated_norm(norm, begin, end); });
  pack(arrays.normed, layer.HV * layer.V, layer.HV * layer.V, layer.out.balance, nullptr);
}

template <class E>
void SequenceGroup<E>::attend_window(const Layer& layer, int64_t pass) const {
  const int64_t D = call.d / layer.H, S = layer.kept + call.L;
  const bool last = pass + 1 == call.passes;
  team.each(sequences * layer.H, 1, [&](int64_t begin, int64_t end) {
    for (int64_t task = begin; task < end; ++task) {
      const int64_t n = task / layer.H, head = task % layer.H, at = (first + n) * layer.H + head;
      const int64_t stride = round_up(layer.into_width, PANEL);
      const float* row = arrays.wide + n * call.L * stride + head * D;
      AttentionHead h{};
      h.q = row;
      h.k = row + call.d;
      h.v = row + 2 * call.d;
      h.stride = stride;
      h.L = call.L;
      h.D = D;
      h.kept = layer.kept;
      h.keys = layer.keys + at * layer.kept * D;
      h.values = layer.values + at * layer.kept * D;
      h.all_keys = last ? layer.all_keys + at * S * D : nullptr;
      h.all_values = last ? layer.all_values + at * S * D : nullptr;
      h.q_gain = layer.q_gain;
      h.k_gain = layer.k_gain;
      h.q_eps = layer.q_eps;
      h.k_eps = layer.k_eps;
      h.o = arrays.mixed + n * call.L * call.d + head * D;
      h.o_stride = call.d;
      attend(h);
    }
  });
  pack(arrays.mixed, call.d, call.d, layer.out.balance, nullptr);
}

template <class E>
void SequenceGroup<E>::run_pass(int64_t pass) const {
  arrays.changes[0] = arrays.changes[1] = 0;
  for (const Layer& layer : call.layers) {
    pack(arrays.h, arrays.d_padded, call.d, layer.into.balance, &layer.mixer_eps);
    multiply(multiply_panel<Epilogue::store, E>, arrays.x, layer.into.packed, layer.into_width, call.d, arrays.wide,
             round_up(layer.into_width, PANEL));
    layer.recurrent ? mix_recurrent(layer, pass) : attend_window(layer, pass);
    multiply(multiply_panel<Epilogue::add_residual, E>, arrays.x, layer.out.packed, call.d,
             layer.recurrent ? layer.HV * layer.V : call.d, arrays.h, arrays.d_padded);
    pack(arrays.h, arrays.d_padded, call.d, layer.up.balance, &layer.mlp_eps);
    multiply(multiply_panel<Epilogue::relu_squared, E>, arrays.x, layer.up.packed, layer.hidden, call.d, arrays.wide,
             0);
    if constexpr (IS_WINOGRAD<E>) {
      const E* hidden = reinterpret_cast<const E*>(arrays.wide);
      team.each(arrays.padded / ROWS, 4, [&](int64_t begin, int64_t end) {
        sum_pairs(hidden + begin * ROWS * layer.hidden, end - begin, layer.hidden, arrays.sums + begin * ROWS);
      });
    }
    multiply(multiply_panel<Epilogue::add_residual, E>, arrays.wide, layer.down, call.d, layer.hidden, arrays.h,
             arrays.d_padded);
  }
}

// Runs all passes. changes [passes][2] are sums of squares over the group's states: of a pass's change, and after it.
template <class E>
void SequenceGroup<E>::run(double* changes) const {
  float* h = call.h + first * call.L * call.d;
  const size_t row_bytes = call.d * sizeof(float);
  std::memset(arrays.h, 0, arrays.padded * arrays.d_padded * sizeof(float));
  for (int64_t row = 0; row < arrays.rows; ++row)
    std::memcpy(arrays.h + row * arrays.d_padded, h + row * call.d, row_bytes);
  if (call.reinject) std::memcpy(arrays.start, arrays.h, arrays.padded * arrays.d_padded * sizeof(float));
  for (int64_t pass = 0; pass < call.passes && !stops(call.interrupt); ++pass) {
    if (pass > 0 && call.reinject) {
      constexpr float EPS = 1.1920929e-07f;  // torch's for float32
      for (int64_t row = 0; row < arrays.rows; ++row) {
        float *to = arrays.h + row * arrays.d_padded, *start = arrays.start + row * arrays.d_padded;
        const float factor = rms_factor(to, call.d, EPS);
        for (int64_t d = 0; d < call.d; ++d) to[d] = to[d] * factor + start[d];
      }
    }
    run_pass(pass);
    changes[2 * pass] = arrays.changes[0];
    changes[2 * pass + 1] = arrays.changes[1];
  }
  for (int64_t row = 0; row < arrays.rows; ++row)
    std::memcpy(h + row * call.d, arrays.h + row * arrays.d_padded, row_bytes);
}

void run_group(const Blocks& call, int64_t first, int64_t sequences, bool shared, double* changes) {
  BlockArrays& arrays = thread_local_arrays<BlockArrays>(call, sequences);
  const Team team{shared};
  switch (call.form) {
    case Form::plain:
      return SequenceGroup<float>{call, arrays, team, first, sequences}.run(changes);
    case Form::winograd:
      return SequenceGroup<Winograd>{call, arrays, team, first, sequences}.run(changes);
    case Form::bfloat16:
      if constexpr (DOTS) SequenceGroup<Bf16x2>{call, arrays, team, first, sequences}.run(changes);
  }
}

}  // namespace
}  // namespace sleepkern::SLEEPKERN_ISA
