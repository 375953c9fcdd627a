// Writes a chunk's gradients to the caller's tensors, in their types.
#pragma once

#include <cstdint>

#include "common/recurrence.h"
#include "cpu/gemm/microkernel.h"
#include "cpu/recurrence/backward_buffers.h"
#include "cpu/recurrence/buffers.h"
#include "cpu/recurrence/pack_tokens.h"
#include "cpu/simd/vec.h"

namespace sleepkern::SLEEPKERN_ISA {
namespace {

// Writes dv = b dR of one value panel, and adds dR.v to db.
SLEEPKERN_STAGE void write_dv(const Chunk& c, const Workspace& w, const BackwardBuffers& a, const Gradients& out,
                              int64_t panel) {
  const int64_t first = panel * PANEL, width = min_of(PANEL, w.V - first);
  const int64_t size = c.p.v.type == Type::float32 ? 4 : 2;
  for (int64_t t = 0; t < c.count; ++t) {
    alignas(64) float v[PANEL] = {};
    const float* dR = a.dvalues + (panel * CHUNK + t) * PANEL;
    if (out.dbeta) {
      load_row(c.row(c.p.v, t, c.head * w.V + first), c.p.v.type, width, v);
      float* lanes = a.beta_lanes + t * LANES;
      SLEEPKERN_EACH_VEC(n) store(lanes, load(lanes) + load(v + n * LANES) * load(dR + n * LANES));
    }
    SLEEPKERN_EACH_VEC(n) store(v + n * LANES, load(dR + n * LANES) * w.beta[t]);
    store_row(v, c.p.v.type, width,
              static_cast<char*>(out.dv) + (((c.first + t) * c.p.HV + c.head) * w.V + first) * size);
  }
}

// Writes one token's dq or dk, back through the normalisation x = norm * raw. With `add` it is added to the gradient
// that an earlier value head of the same key head wrote.
SLEEPKERN_INLINE void write_key_gradient(const Chunk& c, const Workspace& w, const BackwardBuffers& a,
                                         const float* transposed, const float* x, int64_t stride, float norm, int64_t t,
                                         const Gradients& out, void* to, bool add) {
  Vec along{};
  for (int64_t d = 0; d < w.K_rows; d += LANES) {
    const Vec dx = load(transposed + d / PANEL * CHUNK * PANEL + t * PANEL + d % PANEL);
    store(a.row + d, dx);
    if (c.p.normalize) along += dx * load(x + d / PANEL * stride + d % PANEL);
  }
  const float dot = c.p.normalize ? sum(along) : 0.0f;
  const int64_t size = out.key_type == Type::float32 ? 4 : 2;
  char* row = static_cast<char*>(to) + ((c.first + t) * c.p.H + c.key_head()) * w.K * size;
  for (int64_t d = 0; c.p.normalize && d < w.K_rows; d += LANES) {
    store(a.row + d, (load(a.row + d) - load(x + d / PANEL * stride + d % PANEL) * dot) * norm);
  }
  if (add) {  // float32, see Gradients::key_type
    for (int64_t d = 0; d < w.K; ++d) a.row[d] += reinterpret_cast<const float*>(row)[d];
  }
  store_row(a.row, out.key_type, w.K, row);
}

// The addresses of a chunk's k and q: rows of two tokens are `token` floats apart, panels of a token `panel` floats.
struct Tokens {
  const float *k, *q;
  int64_t token, panel;

  explicit Tokens(const Workspace& w)
      : k(w.decay_from_start_rows ? w.k_rows : w.keys_transposed),
        q(w.decay_from_start_rows ? w.q_rows : w.q_panels_transposed),
        token(w.decay_from_start_rows ? w.row_size : PANEL),
        panel(w.decay_from_start_rows ? PANEL : CHUNK * PANEL) {}
};

SLEEPKERN_STAGE void write_key_gradients(const Chunk& c, const Workspace& w, const BackwardBuffers& a,
                                         const Gradients& out, bool add) {
  const Tokens x(w);
  for (int64_t t = 0; t < c.count; ++t) {
    const int64_t at = t * x.token;
    write_key_gradient(c, w, a, a.dk_panels, x.k + at, x.panel, w.k_norm[t], t, out, out.dk, add);
    if (c.p.want_output) write_key_gradient(c, w, a, a.dq_panels, x.q + at, x.panel, w.q_norm[t], t, out, out.dq, add);
  }
}

static void store_scalar(float x, Type type, int64_t i, void* to) {
  alignas(64) float lanes[LANES] = {x};
  store_row(lanes, type, 1, static_cast<char*>(to) + i * (type == Type::float32 ? 4 : 2));
}

SLEEPKERN_STAGE void write_gate_gradients(const Chunk& c, const Workspace& w, const BackwardBuffers& a,
                                          const Gradients& out) {
  const Problem& p = c.p;
  for (int64_t t = 0; out.dbeta && t < c.count; ++t) {
    store_scalar(sum(load(a.beta_lanes + t * LANES)), p.beta.type, (c.first + t) * p.HV + c.head, out.dbeta);
  }
  if (p.gate == Gate::head) {
    double before = 0, after = 0, local[CHUNK];
    for (int64_t d = 0; d < w.K; ++d) before += a.dchunk_decay[d];
    for (int64_t t = 0; t < c.count; ++t) {
      // mutant: gate-gradient-with-cancellation
      local[t] = before + sum(load(a.pair_lanes + t * LANES));
      before += sum(load(a.write_lanes + t * LANES));
    }
    for (int64_t t = c.count - 1; t >= 0; --t) {
      after += sum(load(a.gate_lanes + t * LANES));
      store_scalar(static_cast<float>(local[t] + after), p.g.type, (c.first + t) * p.HV + c.head, out.dg);
    }
  }
  if (p.gate == Gate::channel) {
    const int64_t size = p.g.type == Type::float32 ? 4 : 2;
    for (int64_t t = 0; t < c.count; ++t) {
      for (int64_t d = 0; d < w.K_rows; d += LANES) {
        store(a.row + d, load(a.dgates + d / PANEL * CHUNK * PANEL + t * PANEL + d % PANEL));
      }
      char* row = static_cast<char*>(out.dg) + ((c.first + t) * p.HV + c.head) * p.K * size;
      store_row(a.row, p.g.type, p.K, row);
    }
  }
}

}  // namespace
}  // namespace sleepkern::SLEEPKERN_ISA
