// The backward of one chunk: gradients from dO and dS, the gradient of the state after the chunk; S is the state before
// it.
//
//   dVn = P^T dO + Kt dS                        dR = (I + M)^-T dVn by backward substitution; dVn without delta
//   dP  = dO Vn^T, i >= j                       dM = -dR Vn^T, i > j
//   dq  = scale E (dO S^T) + (scale dP D) k     D = exp(G_i - G_j)
//   z   = -E (dR S^T) + (dM D) k                gradient of k in (I + M)^-1 b (v - k E S), without the factor b
//   dk  = b z + dk-                             dk- = exp(G_C - G) (Vn dS^T) + (scale dP D)^T q + (b dM D)^T k
//   dv  = b dR                                  db = dR.v + k.z
//   dS <- exp(G_C) dS + (scale E q)^T dO - (b E k)^T dR
//
// dg of token t sums the terms of all paths that decay at t: from the state before the chunk to tokens from t on, from
// tokens before t to the state after the chunk, from tokens before t to tokens from t on, and from state to state,
//
//   dg_t = sum_(i >= t) (q_i (scale E_i S dO_i) - b_i k_i (E_i S dR_i)) + sum_(j < t) k_j (exp(G_C - G_j) dS Vn_j)
//        + sum_(i >= t > j) (dP_ij P_ij + dM_ij M_ij) + exp(G_C) <S, dS>
//
// Sums of dq, z and dk- from t on give the same as a difference, but both terms of the difference hold paths that do
// not decay at t, such as the pair of a token with itself: where decay is strong, only their rounding would be left.
// With channel decay dg, E and D have a value for each channel, and sums over pairs are those of the dyadic split
// (chunk_backward_channel.h).
#pragma once

#include <cstdint>
#include <cstring>

#include "common/recurrence.h"
#include "cpu/gemm/microkernel.h"
#include "cpu/recurrence/backward_buffers.h"
#include "cpu/recurrence/buffers.h"
#include "cpu/recurrence/chunk_backward_channel.h"
#include "cpu/recurrence/pack_tokens.h"
#include "cpu/recurrence/prefetch.h"
#include "cpu/recurrence/state_pass.h"
#include "cpu/recurrence/write_gradients.h"
#include "cpu/simd/vec.h"

namespace sleepkern::SLEEPKERN_ISA {
namespace {

// Loads dO of the chunk, zero beyond count up to whole panels of tokens.
SLEEPKERN_STAGE void load_dout(const Chunk& chunk, const Workspace& work, const BackwardBuffers& grads,
                               const Rows& dout) {
  for (int64_t panel = 0; panel < work.V_panels; ++panel) {
    const int64_t first = panel * PANEL, width = min_of(PANEL, work.V - first);
    for (int64_t t = 0; t < round_up(chunk.count, PANEL); ++t) {
      float* to = grads.dout + (panel * CHUNK + t) * PANEL;
      SLEEPKERN_EACH_VEC(n) store(to + n * LANES, Vec{});
      if (t < chunk.count) load_row(chunk.row(dout, t, chunk.head * work.V + first), dout.type, width, to);
    }
  }
}

// Computes dR of one value panel, last tokens first.
SLEEPKERN_STAGE void backward_values(const Chunk& chunk, const Workspace& work, const BackwardBuffers& grads,
                                     int64_t panel) {
  const float *dstate = grads.dstate + panel * work.K_rows * PANEL, *dout = grads.dout + panel * CHUNK * PANEL;
  const float* k_tail_columns = work.k_tail_columns ? work.k_tail_columns : work.keys;
  float* dvalues = grads.dvalues + panel * CHUNK * PANEL;
  for (int64_t j = chunk.padded - ROWS; j >= 0; j -= ROWS) {
    Tile t;
    clear(t);
    multiply_add<1>(t, k_tail_columns + column_at(j, work.K), dstate, work.K);
    scale_rows(t, work.decay_to_end + j);
    if (chunk.problem.want_output) {
      multiply_add<1>(t, grads.gram_qk_transposed + column_at(j, CHUNK) + j * PANEL, dout + j * PANEL, chunk.count - j);
    }
    if (chunk.problem.delta) {
      const float* M = grads.gram_kk_transposed + column_at(j, CHUNK);
      const int64_t after = j + ROWS;
      multiply_add<-1>(t, M + after * PANEL, dvalues + after * PANEL, chunk.count - after);
      substitute_back(t, M + j * PANEL);
    }
    store(t, dvalues + j * PANEL);
  }
  for (int64_t x = chunk.padded * PANEL; x < round_up(chunk.count, PANEL) * PANEL; x += LANES)
    store(dvalues + x, Vec{});
}

// Computes scale dP D and dM D, and the transposes of both, the latter times b_i. With head decay it also computes the
// pairs' terms of dg.
SLEEPKERN_STAGE void backward_grams(const Chunk& chunk, const Workspace& work, const BackwardBuffers& grads) {
  const int64_t end = round_up(chunk.count, PANEL);
  auto finish = [&](const float* gram, float factor, bool add) {
    float* gains = chunk.problem.gate == Gate::head ? grads.gains : nullptr;
    return [&work, gains, gram, factor, add](Vec x, int64_t at, int64_t) {
      if (gains) store(gains + at, (add ? load(gains + at) : Vec{}) + x * load(gram + at));
      return x * load(work.decays + at) * factor;
    };
  };
  if (chunk.problem.want_output) {
    upper_gram<1>(grads.writes_transposed, grads.dout_transposed, grads.V_rows, chunk.count, CHUNK, grads.dgram_qk,
                  finish(work.gram_qk, chunk.problem.scale, false));
  }
  if (chunk.problem.delta) {
    upper_gram<-1>(grads.writes_transposed, grads.dvalues_transposed, grads.V_rows, chunk.count, CHUNK, grads.dgram_kk,
                   finish(work.gram_kk, 1, chunk.problem.want_output));
    for (int64_t i = 0; i < chunk.count; ++i) grads.dgram_kk[column_at(i, CHUNK) + i * PANEL] = 0;
  }
  if (chunk.problem.want_output) transpose_panels(grads.dgram_qk, CHUNK, end, end, grads.dgram_qk_transposed, CHUNK);
  if (!chunk.problem.delta) return;
  transpose_panels(grads.dgram_kk, CHUNK, end, end, grads.dgram_kk_transposed, CHUNK);
  for (int64_t j = 0; j < end; j += PANEL) {
    for (int64_t i = 0; i < end; ++i) {
      float* row = grads.dgram_kk_transposed + j * CHUNK + i * PANEL;
      SLEEPKERN_EACH_VEC(n) store(row + n * LANES, load(row + n * LANES) * work.beta[i]);
    }
  }
}

// Multiplies a tile by rows of factors, one for each channel.
SLEEPKERN_INLINE void scale_by_rows(Tile& t, const float* rows) {
  SLEEPKERN_EACH_ROW(r)
    SLEEPKERN_EACH_VEC(n) t.at[r][n] *= load(rows + r * PANEL + n * LANES);
}

// Sums the pairs' terms of dg with head decay: `reach` of token i is the sum of its pairs with j < t.
SLEEPKERN_STAGE void gather_pairs(const Chunk& chunk, const BackwardBuffers& grads) {
  alignas(64) float reach[CHUNK] = {};
  for (int64_t t = 1; t < chunk.count; ++t) {
    const int64_t j = t - 1;
    for (int64_t i = j / LANES * LANES; i < chunk.count; i += LANES) {
      store(reach + i, load(reach + i) + load(grads.gains + column_at(i, CHUNK) + j * PANEL));
    }
    reach[j] = 0;  // from here on j is before t
    Vec total{};
    for (int64_t i = j / LANES * LANES; i < chunk.count; i += LANES) total += load(reach + i);
    store(grads.pair_lanes + t * LANES, total);
  }
}

// Adds the products of the tile's rows with the tokens' rows x of a key panel, times by[r] if given, to each token's
// `lanes`.
SLEEPKERN_INLINE void gather_rows(const Tile& t, const float* x, const float* by, float* lanes) {
  SLEEPKERN_EACH_ROW(r) {
    Vec total{};
    SLEEPKERN_EACH_VEC(n) total += t.at[r][n] * load(x + r * PANEL + n * LANES);
    store(lanes + r * LANES, load(lanes + r * LANES) + (by ? total * by[r] : total));
  }
}

// dq, z and dk- each take all key panels before the next one begins: the tokens' operands then stay in L1.
SLEEPKERN_STAGE void backward_queries(const Chunk& chunk, const Workspace& work, const BackwardBuffers& grads,
                                      const float* state) {
  const bool head_decay = chunk.problem.gate == Gate::head;
  for (int64_t panel = 0; panel < grads.K_panels; ++panel) {
    const int64_t at = panel * CHUNK * PANEL;
    const float *S = state + panel * grads.V_rows * PANEL, *k = work.keys_transposed + at;
    for (int64_t i = 0; i < chunk.padded; i += ROWS) {
      Tile t;
      clear(t);
      multiply_add<1>(t, grads.dout_transposed + column_at(i, grads.V_rows), S, work.V);
      scale_rows(t, work.output_scale + i);
      if (work.decay_from_start_rows) {
        scale_by_rows(t, work.decay_from_start_rows + at + i * PANEL);
      } else {
        if (head_decay)
          gather_rows(t, work.q_panels_transposed + at + i * PANEL, nullptr, grads.gate_lanes + i * LANES);
        multiply_add<1>(t, grads.dgram_qk + column_at(i, CHUNK), k, min_of(i + ROWS, chunk.count));
      }
      store(t, grads.dq_panels + at + i * PANEL);
    }
  }
}

SLEEPKERN_STAGE void backward_prediction(const Chunk& chunk, const Workspace& work, const BackwardBuffers& grads,
                                         const float* state) {
  const bool head_decay = chunk.problem.gate == Gate::head;
  for (int64_t panel = 0; panel < grads.K_panels; ++panel) {
    const int64_t at = panel * CHUNK * PANEL;
    const float *S = state + panel * grads.V_rows * PANEL, *k = work.keys_transposed + at;
    for (int64_t i = 0; i < chunk.padded; i += ROWS) {
      Tile t;
      clear(t);
      multiply_add<-1>(t, grads.dvalues_transposed + column_at(i, grads.V_rows), S, work.V);
      scale_rows(t, work.decay_from_start + i);
      if (work.decay_from_start_rows) {
        scale_by_rows(t, work.decay_from_start_rows + at + i * PANEL);
      } else {
        if (head_decay) gather_rows(t, k + i * PANEL, work.beta + i, grads.gate_lanes + i * LANES);
        multiply_add<1>(t, grads.dgram_kk + column_at(i, CHUNK), k, min_of(i + ROWS, chunk.count));
      }
      store(t, grads.dz_panels + at + i * PANEL);
    }
  }
}

SLEEPKERN_STAGE void backward_keys(const Chunk& chunk, const Workspace& work, const BackwardBuffers& grads) {
  const bool head_decay = chunk.problem.gate == Gate::head;
  for (int64_t panel = 0; panel < grads.K_panels; ++panel) {
    const int64_t at = panel * CHUNK * PANEL;
    const float *dS = grads.dstate_transposed + panel * grads.V_rows * PANEL, *k = work.keys_transposed + at,
                *q = work.q_panels_transposed + at;
    for (int64_t i = 0; i < chunk.padded; i += ROWS) {
      const int64_t gram = column_at(i, CHUNK) + i * PANEL;
      Tile t;
      clear(t);
      multiply_add<1>(t, grads.writes_transposed + column_at(i, grads.V_rows), dS, work.V);
      scale_rows(t, work.decay_to_end + i);
      if (work.decay_to_end_rows) {
        scale_by_rows(t, work.decay_to_end_rows + at + i * PANEL);
      } else {
        if (head_decay) gather_rows(t, k + i * PANEL, nullptr, grads.write_lanes + i * LANES);
        if (chunk.problem.want_output)
          multiply_add<1>(t, grads.dgram_qk_transposed + gram, q + i * PANEL, chunk.count - i);
        if (chunk.problem.delta) multiply_add<1>(t, grads.dgram_kk_transposed + gram, k + i * PANEL, chunk.count - i);
      }
      store(t, grads.dk_panels + at + i * PANEL);
    }
  }
}

// Adds k.z to db and completes dk, of one key panel. The tokens' k are `stride` floats apart.
SLEEPKERN_STAGE void gather_key_gradients(const Chunk& chunk, const Workspace& work, const BackwardBuffers& grads,
                                          const float* k, int64_t stride, int64_t panel) {
  for (int64_t t = 0; t < chunk.count; ++t) {
    const int64_t at = (panel * CHUNK + t) * PANEL;
    SLEEPKERN_EACH_VEC(n) {
      const int64_t x = at + n * LANES;
      const Vec z = load(grads.dz_panels + x);
      store(grads.beta_lanes + t * LANES, load(grads.beta_lanes + t * LANES) + load(k + t * stride + n * LANES) * z);
      store(grads.dk_panels + x, load(grads.dk_panels + x) + z * work.beta[t]);
    }
  }
}

// chunk decay <S, dS> of each row of the state.
SLEEPKERN_STAGE void backward_chunk_decay(const Workspace& work, const BackwardBuffers& grads, const float* state) {
  for (int64_t panel = 0; panel < grads.K_panels; ++panel) {
    const int64_t at = panel * grads.V_rows * PANEL;
    Vec total[VECS] = {};
    for (int64_t x = at; x < at + work.V * PANEL; x += PANEL) {
      SLEEPKERN_EACH_VEC(n) total[n] += load(state + x + n * LANES) * load(grads.dstate_transposed + x + n * LANES);
    }
    SLEEPKERN_EACH_VEC(n) {
      const int64_t d = panel * PANEL + n * LANES;
      // mutant: gate-gradient-without-final-state
      store(grads.dchunk_decay + d, total[n] * load(work.chunk_decay + d));
    }
  }
}

// Takes dS of one value panel from after the chunk to before it.
SLEEPKERN_STAGE void backward_state(const Chunk& chunk, const Workspace& work, const BackwardBuffers& grads,
                                    int64_t panel, PrefetchSchedule& prefetch) {
  float* dstate = grads.dstate + panel * work.K_rows * PANEL;
  const int64_t at = panel * CHUNK * PANEL;
  if (chunk.problem.want_output) scale_tokens(chunk, grads.dout + at, work.output_scale, grads.scaled_dout);
  if (chunk.problem.delta) scale_tokens(chunk, grads.dvalues + at, work.prediction_scale, grads.scaled_dvalues);
  for (int64_t d = 0; d < work.K; d += ROWS) {
    const int64_t left = column_at(d, CHUNK);
    Tile t;
    load(t, dstate + d * PANEL);
    scale_rows(t, work.chunk_decay + d);
    if (chunk.problem.want_output) multiply_add<1>(t, work.q_panels_transposed + left, grads.scaled_dout, chunk.count);
    if (chunk.problem.delta) multiply_add<-1>(t, work.keys_transposed + left, grads.scaled_dvalues, chunk.count);
    store(t, dstate + d * PANEL);
    prefetch.step();
  }
}

// The chunk that is computed next, for prefetching. `bh` is its head's if it is the first of the head, else -1.
struct Next {
  Chunk chunk;
  int64_t bh;
};

// Plans the prefetch of all rows that the next chunk reads and writes.
static void plan_prefetch(const Next& next, const Workspace& work, const Gradients& out, PrefetchSchedule& prefetch) {
  const Chunk& chunk = next.chunk;
  const Problem& problem = chunk.problem;
  if (chunk.count <= 0) return;
  prefetch.add_inputs(chunk);
  prefetch.add(chunk, {out.dk, problem.H * work.K, out.key_type}, chunk.key_head() * work.K, work.K);
  prefetch.add(chunk, {out.dv, problem.HV * work.V, problem.v.type}, chunk.head * work.V, work.V);
  if (problem.gate == Gate::channel)
    prefetch.add(chunk, {out.dg, problem.HV * work.K, problem.g.type}, chunk.head * work.K, work.K);
  if (problem.want_output) prefetch.add(chunk, out.dout, chunk.head * work.V, work.V);
  if (problem.want_output)
    prefetch.add(chunk, {out.dq, problem.H * work.K, out.key_type}, chunk.key_head() * work.K, work.K);
  for (const float* states : {problem.state, out.dfinal, static_cast<const float*>(out.dstate)}) {
    if (next.bh >= 0 && states) prefetch.add_state(problem, states, next.bh);
  }
}

// Computes all gradients of one chunk. `state`, transposed, is the state before it and `writes` its Vn. `next` is
// computed after it: the chunk before it in time, or one of another head.
SLEEPKERN_STAGE void chunk_backward(const Chunk& chunk, Workspace& work, BackwardBuffers& grads, const Gradients& out,
                                    const float* state, const float* writes, bool add, const Next& next) {
  const int64_t end = round_up(chunk.count, PANEL);
  transpose_panels(grads.dstate, work.K_rows, work.K_rows, grads.V_rows, grads.dstate_transposed, grads.V_rows);
  std::memset(grads.beta_lanes, 0, CHUNK * LANES * sizeof(float));
  for (float* lanes : {grads.gate_lanes, grads.write_lanes, grads.pair_lanes}) {
    std::memset(lanes, 0, CHUNK * LANES * sizeof(float));
  }
  if (chunk.problem.want_output) {
    load_dout(chunk, work, grads, out.dout);
    transpose_panels(grads.dout, CHUNK, end, grads.V_rows, grads.dout_transposed, grads.V_rows);
    transpose_panels(work.gram_qk, CHUNK, end, end, grads.gram_qk_transposed, CHUNK);
  }
  if (chunk.problem.delta) transpose_panels(work.gram_kk, CHUNK, end, end, grads.gram_kk_transposed, CHUNK);
  for (int64_t panel = 0; panel < work.V_panels; ++panel) {
    backward_values(chunk, work, grads, panel);
    write_dv(chunk, work, grads, out, panel);
  }
  if (chunk.problem.delta)
    transpose_panels(grads.dvalues, CHUNK, end, grads.V_rows, grads.dvalues_transposed, grads.V_rows);
  transpose_panels(writes, CHUNK, end, grads.V_rows, grads.writes_transposed, grads.V_rows);
  backward_grams(chunk, work, grads);
  if (chunk.problem.want_output) backward_queries(chunk, work, grads, state);
  if (chunk.problem.delta) backward_prediction(chunk, work, grads, state);
  backward_keys(chunk, work, grads);
  if (chunk.problem.gate != Gate::none) backward_chunk_decay(work, grads, state);
  if (chunk.problem.gate == Gate::head && (chunk.problem.want_output || chunk.problem.delta))
    gather_pairs(chunk, grads);
  if (chunk.problem.gate == Gate::channel) {
    gather_gates(chunk, work, grads);
    backward_channel_grams(chunk, work, grads);
  }
  const Tokens x(work);
  for (int64_t panel = 0; chunk.problem.delta && panel < grads.K_panels; ++panel) {
    gather_key_gradients(chunk, work, grads, x.k + panel * x.panel, x.token, panel);
  }
  write_key_gradients(chunk, work, grads, out, add);
  write_gate_gradients(chunk, work, grads, out);
  PrefetchSchedule prefetch(state_tiles(work));
  plan_prefetch(next, work, out, prefetch);
  for (int64_t panel = 0; panel < work.V_panels; ++panel) backward_state(chunk, work, grads, panel, prefetch);
}

}  // namespace
}  // namespace sleepkern::SLEEPKERN_ISA
