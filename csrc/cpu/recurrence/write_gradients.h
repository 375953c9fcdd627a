// Writes a chunk's gradients to the caller's tensors, in their types.
#pragma once

#include <cstdint>

#include "common/recurrence.h"
#include "cpu/gemm/microkernel.h"
#include "cpu/recurrence/backward_buffers.h"
#include "cpu/recurrence/buffers.h"
#include "cpu/recurrence/pack_tokens.h"
#include "cpu/recurrence/raw_gates.h"
#include "cpu/simd/vec.h"

namespace sleepkern::SLEEPKERN_ISA {
namespace {

// Writes dv = b dR of one value panel, and adds dR.v to db.
SLEEPKERN_STAGE void write_dv(const Chunk& chunk, const Workspace& work, const BackwardBuffers& grads,
                              const Gradients& out, int64_t panel) {
  const int64_t first = panel * PANEL, width = min_of(PANEL, work.V - first);
  const int64_t size = chunk.problem.v.type == Type::float32 ? 4 : 2;
  for (int64_t t = 0; t < chunk.count; ++t) {
    alignas(64) float v[PANEL] = {};
    const float* dR = grads.dvalues + (panel * CHUNK + t) * PANEL;
    if (out.dbeta) {
      load_row(chunk.row(chunk.problem.v, t, chunk.head * work.V + first), chunk.problem.v.type, width, v);
      float* lanes = grads.beta_lanes + t * LANES;
      SLEEPKERN_EACH_VEC(n) store(lanes, load(lanes) + load(v + n * LANES) * load(dR + n * LANES));
    }
    SLEEPKERN_EACH_VEC(n) store(v + n * LANES, load(dR + n * LANES) * work.beta[t]);
    store_row(
        v, chunk.problem.v.type, width,
        static_cast<char*>(out.dv) + (((chunk.first + t) * chunk.problem.HV + chunk.head) * work.V + first) * size);
  }
}

// Writes one token's dq or dk, back through the normalisation x = norm * raw. With `add` it is added to the gradient
// that an earlier value head of the same key head wrote.
SLEEPKERN_INLINE void write_key_gradient(const Chunk& chunk, const Workspace& work, const BackwardBuffers& grads,
                                         const float* transposed, const float* x, int64_t stride, float norm, int64_t t,
                                         const Gradients& out, void* to, bool add) {
  Vec along{};
  for (int64_t d = 0; d < work.K_rows; d += LANES) {
    const Vec dx = load(transposed + d / PANEL * CHUNK * PANEL + t * PANEL + d % PANEL);
    store(grads.row + d, dx);
    if (chunk.problem.normalize) along += dx * load(x + d / PANEL * stride + d % PANEL);
  }
  const float dot = chunk.problem.normalize ? sum(along) : 0.0f;
  const int64_t size = out.key_type == Type::float32 ? 4 : 2;
  char* row = static_cast<char*>(to) + ((chunk.first + t) * chunk.problem.H + chunk.key_head()) * work.K * size;
  for (int64_t d = 0; chunk.problem.normalize && d < work.K_rows; d += LANES) {
    store(grads.row + d, (load(grads.row + d) - load(x + d / PANEL * stride + d % PANEL) * dot) * norm);
  }
  if (add) {  // float32, see Gradients::key_type
    for (int64_t d = 0; d < work.K; ++d) grads.row[d] += reinterpret_cast<const float*>(row)[d];
  }
  store_row(grads.row, out.key_type, work.K, row);
}

// The addresses of a chunk's k and q: rows of two tokens are `token` floats apart, panels of a token `panel` floats.
struct Tokens {
  const float *k, *q;
  int64_t token, panel;

  explicit Tokens(const Workspace& work)
      : k(work.decay_from_start_rows ? work.k_rows : work.keys_transposed),
        q(work.decay_from_start_rows ? work.q_rows : work.q_panels_transposed),
        token(work.decay_from_start_rows ? work.row_size : PANEL),
        panel(work.decay_from_start_rows ? PANEL : CHUNK * PANEL) {}
};

SLEEPKERN_STAGE void write_key_gradients(const Chunk& chunk, const Workspace& work, const BackwardBuffers& grads,
                                         const Gradients& out, bool add) {
  const Tokens x(work);
  for (int64_t t = 0; t < chunk.count; ++t) {
    const int64_t at = t * x.token;
    write_key_gradient(chunk, work, grads, grads.dk_panels, x.k + at, x.panel, work.k_norm[t], t, out, out.dk, add);
    if (chunk.problem.want_output)
      write_key_gradient(chunk, work, grads, grads.dq_panels, x.q + at, x.panel, work.q_norm[t], t, out, out.dq, add);
  }
}

static void store_scalar(float x, Type type, int64_t i, void* to) {
  alignas(64) float lanes[LANES] = {x};
  store_row(lanes, type, 1, static_cast<char*>(to) + i * (type == Type::float32 ? 4 : 2));
}

// Stores one gradient a token of a chunk's head, [tokens, HV].
static void store_scalars(const Chunk& chunk, const float* x, Type type, void* to) {
  for (int64_t t = 0; t < chunk.count; ++t)
    store_scalar(x[t], type, (chunk.first + t) * chunk.problem.HV + chunk.head, to);
}

static void write_channel_gate_gradients(const Chunk& chunk, const Workspace& work, const BackwardBuffers& grads,
                                         const Gradients& out) {
  const Problem& problem = chunk.problem;
  const int64_t size = problem.g.type == Type::float32 ? 4 : 2;
  const DecayGate gate(problem, chunk.head);
  alignas(64) float bias[HEAD_LIMIT], of_bias[HEAD_LIMIT] = {};
  Vec of_rate{};
  if (problem.raw_decay) load_channel_bias(problem, chunk.head, bias);
  for (int64_t t = 0; t < chunk.count; ++t) {
    for (int64_t d = 0; d < work.K_rows; d += LANES) {
      store(grads.row + d, load(grads.dgates + d / PANEL * CHUNK * PANEL + t * PANEL + d % PANEL));
    }
    if (problem.raw_decay) of_rate += channel_gradients_to_raw(chunk, gate, bias, t, grads.row, of_bias);
    char* row = static_cast<char*>(out.dg) + ((chunk.first + t) * problem.HV + chunk.head) * problem.K * size;
    store_row(grads.row, problem.g.type, problem.K, row);
  }
  if (!problem.raw_decay) return;
  grads.gate_sums[0] += sum(of_rate);
  for (int64_t d = 0; d < problem.K; ++d) grads.gate_sums[1 + d] += of_bias[d];
}

SLEEPKERN_STAGE void write_gate_gradients(const Chunk& chunk, const Workspace& work, const BackwardBuffers& grads,
                                          const Gradients& out) {
  const Problem& problem = chunk.problem;
  alignas(64) float scalars[CHUNK] = {};
  if (out.dbeta) {
    for (int64_t t = 0; t < chunk.count; ++t) scalars[t] = sum(load(grads.beta_lanes + t * LANES));
    if (problem.beta_scale != 0) beta_gradients_to_raw(chunk, scalars);
    store_scalars(chunk, scalars, problem.beta.type, out.dbeta);
  }
  if (problem.gate == Gate::head) {
    double before = 0, after = 0, local[CHUNK];
    for (int64_t d = 0; d < work.K; ++d) before += grads.dchunk_decay[d];
    for (int64_t t = 0; t < chunk.count; ++t) {
      // mutant: gate-gradient-with-cancellation
      local[t] = before + sum(load(grads.pair_lanes + t * LANES));
      before += sum(load(grads.write_lanes + t * LANES));
    }
    for (int64_t t = chunk.count - 1; t >= 0; --t) {
      after += sum(load(grads.gate_lanes + t * LANES));
      scalars[t] = static_cast<float>(local[t] + after);
    }
    if (problem.raw_decay) head_gradients_to_raw(chunk, scalars, grads.gate_sums);
    store_scalars(chunk, scalars, problem.g.type, out.dg);
  }
  if (problem.gate == Gate::channel) write_channel_gate_gradients(chunk, work, grads, out);
}

}  // namespace
}  // namespace sleepkern::SLEEPKERN_ISA
