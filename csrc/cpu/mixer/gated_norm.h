// The gated RMS norm, one row of one head after the other, in float32 while the row is in L1.
//
//   norm first: n = r x, y = w n a;   gate first: n = r x a, y = w n;   a = act(gate), r = (mean (.)^2 + eps)^-1/2
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#include "common/mixer_ops.h"
#include "cpu/runtime/arena.h"
#include "cpu/simd/activation.h"
#include "cpu/simd/vec.h"

namespace sleepkern::SLEEPKERN_ISA {
namespace {

struct NormRows {
  float *x, *gate, *weight, *dy, *normed;  // [V up to whole vectors], zeros beyond V; weight has all heads
  float* sums;                             // [heads or 1] like weight: its gradient, summed over the tokens so far
  int64_t row;                             // floats between the weights of two heads, 0 if they share them
};

static void lay_out(NormRows& r, const GatedNorm& p, bool backward, ArenaCursor& take) {
  const int64_t V = round_up(p.V, LANES), heads = p.weight_heads ? p.heads : 1;
  r.x = take(V);
  r.gate = take(V);
  r.dy = take(backward ? V : 0);
  r.normed = take(V);
  r.weight = take(heads * V);
  r.sums = take(backward ? heads * V : 0);
  r.row = p.weight_heads ? V : 0;
}

// Loads n elements, then zeros up to a whole vector.
static void load_padded(const void* from, Type type, int64_t n, float* to) {
  if (n % LANES) store(to + n / LANES * LANES, Vec{});
  load_row(from, type, n, to);
}

static void load_weights(const GatedNorm& p, NormRows& r) {
  for (int64_t h = 0; h < (p.weight_heads ? p.heads : 1); ++h) {
    load_padded(at(p.weight, h * p.V), p.weight.type, p.V, r.weight + h * r.row);
  }
}

static const void* row_of(const GatedNorm& p, const Rows& x, int64_t token, int64_t head) {
  return static_cast<const char*>(x.data) + (token * x.stride + head * p.V) * bytes_of(x.type);
}

static void* dense_row(const GatedNorm& p, void* to, Type type, int64_t token, int64_t head) {
  return static_cast<char*>(to) + (token * p.heads + head) * p.V * bytes_of(type);
}

// A row as whole vectors of floats: the row itself if it is that, else a copy in `spare`.
static const float* as_floats(const GatedNorm& p, const Rows& x, int64_t token, int64_t head, float* spare) {
  const void* row = row_of(p, x, token, head);
  if (x.type == Type::float32 && p.V % LANES == 0) return static_cast<const float*>(row);
  load_padded(row, x.type, p.V, spare);
  return spare;
}

// Returns r. With gate_first it also stores u = x a, which is normalised, to `normed`.
SLEEPKERN_STAGE float root_of(const GatedNorm& p, const float* x, const float* gate, float* normed) {
  Vec squares{};
  for (int64_t i = 0; i < p.V; i += LANES) {
    Vec u = load(x + i);
    if (p.gate_first) u *= activate(load(gate + i), p.silu).value;
    if (p.gate_first) store(normed + i, u);
    squares += u * u;
  }
  return 1 / std::sqrt(sum(squares) / p.V + p.eps);
}

// Tokens [begin, end).
void gated_norm(const GatedNorm& p, int64_t begin, int64_t end) {
  NormRows& r = thread_local_arrays<NormRows>(p, false);
  load_weights(p, r);
  for (int64_t token = begin; token < end; ++token) {
    for (int64_t head = 0; head < p.heads; ++head) {
      const float *x = as_floats(p, p.x, token, head, r.x), *gate = as_floats(p, p.gate, token, head, r.gate);
      const float root = root_of(p, x, gate, r.normed);
      const float *u = p.gate_first ? r.normed : x, *w = r.weight + head * r.row;
      void* to = dense_row(p, p.y, p.x.type, token, head);
      float* y = x == r.x ? r.x : static_cast<float*>(to);  // a row that was copied in is also copied out
      for (int64_t i = 0; i < p.V; i += LANES) {
        const Vec n = load(u + i) * root * load(w + i);
        store(y + i, p.gate_first ? n : n * activate(load(gate + i), p.silu).value);
      }
      if (y == r.x) store_row(y, p.x.type, p.V, to);
    }
  }
}

// With dn the gradient of n, that of the normalised input is du = r (dn - n mean(dn n)). dx = du; with gate_first dx =
// a du and dgate = x act' du.
SLEEPKERN_STAGE void differentiate_norm(const GatedNorm& p, NormRows& r, int64_t head, float root) {
  const float* w = r.weight + head * r.row;
  float* sums = r.sums + head * r.row;
  Vec along{};
  for (int64_t i = 0; i < p.V; i += LANES) {
    const Vec n = load(r.normed + i), weight = load(w + i);
    Vec dy = load(r.dy + i);
    if (!p.gate_first) {
      const Activated a = activate(load(r.gate + i), p.silu);
      store(r.gate + i, dy * n * weight * a.slope);
      dy *= a.value;
    }
    store(sums + i, load(sums + i) + dy * n);
    store(r.dy + i, dy * weight);
    along += dy * weight * n;
  }
  const float mean = sum(along) / p.V;
  for (int64_t i = 0; i < p.V; i += LANES) {
    const Vec du = (load(r.dy + i) - load(r.normed + i) * mean) * root, x = load(r.x + i);
    if (p.gate_first) {
      const Activated a = activate(load(r.gate + i), p.silu);
      store(r.gate + i, du * x * a.slope);
      store(r.x + i, du * a.value);
    } else {
      store(r.x + i, du);
    }
  }
}

// Computes part number `part` of the tokens.
void gated_norm_backward(const GatedNorm& p, const GatedNormGradients& g, int64_t part) {
  NormRows& r = thread_local_arrays<NormRows>(p, true);
  load_weights(p, r);
  std::memset(r.sums, 0, (p.weight_heads ? p.heads : 1) * round_up(p.V, LANES) * sizeof(float));
  const int64_t end = p.tokens * (part + 1) / g.parts;
  for (int64_t token = p.tokens * part / g.parts; token < end; ++token) {
    for (int64_t head = 0; head < p.heads; ++head) {
      load_padded(row_of(p, p.x, token, head), p.x.type, p.V, r.x);
      load_padded(row_of(p, p.gate, token, head), p.gate.type, p.V, r.gate);
      load_padded(row_of(p, g.dy, token, head), g.dy.type, p.V, r.dy);
      const float root = root_of(p, r.x, r.gate, r.normed);
      const float* u = p.gate_first ? r.normed : r.x;
      for (int64_t i = 0; i < p.V; i += LANES) store(r.normed + i, load(u + i) * root);
      differentiate_norm(p, r, head, root);
      store_row(r.x, p.x.type, p.V, dense_row(p, g.dx, p.x.type, token, head));
      store_row(r.gate, p.gate.type, p.V, dense_row(p, g.dgate, p.gate.type, token, head));
    }
  }
  for (int64_t h = 0; h < (p.weight_heads ? p.heads : 1); ++h) {
    store_row(r.sums + h * r.row, Type::float32, p.V, g.dweight + part * p.weights() + h * p.V);
  }
}

}  // namespace
}  // namespace sleepkern::SLEEPKERN_ISA
