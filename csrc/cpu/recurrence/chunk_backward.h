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
SLEEPKERN_STAGE void load_dout(const Chunk& c, const Workspace& w, const BackwardBuffers& a, const Rows& dout) {
  for (int64_t panel = 0; panel < w.V_panels; ++panel) {
    const int64_t first = panel * PANEL, width = min_of(PANEL, w.V - first);
    for (int64_t t = 0; t < round_up(c.count, PANEL); ++t) {
      float* to = a.dout + (panel * CHUNK + t) * PANEL;
      SLEEPKERN_EACH_VEC(n) store(to + n * LANES, Vec{});
      if (t < c.count) load_row(c.row(dout, t, c.head * w.V + first), dout.type, width, to);
    }
  }
}

// Computes dR of one value panel, last tokens first.
SLEEPKERN_STAGE void backward_values(const Chunk& c, const Workspace& w, const BackwardBuffers& a, int64_t panel) {
  const float *dstate = a.dstate + panel * w.K_rows * PANEL, *dout = a.dout + panel * CHUNK * PANEL;
  const float* k_tail_columns = w.k_tail_columns ? w.k_tail_columns : w.keys;
  float* dvalues = a.dvalues + panel * CHUNK * PANEL;
  for (int64_t j = c.padded - ROWS; j >= 0; j -= ROWS) {
    Tile t;
    clear(t);
    multiply_add<1>(t, k_tail_columns + column_at(j, w.K), dstate, w.K);
    scale_rows(t, w.decay_to_end + j);
    if (c.p.want_output) {
      multiply_add<1>(t, a.gram_qk_transposed + column_at(j, CHUNK) + j * PANEL, dout + j * PANEL, c.count - j);
    }
    if (c.p.delta) {
      const float* M = a.gram_kk_transposed + column_at(j, CHUNK);
      const int64_t after = j + ROWS;
      multiply_add<-1>(t, M + after * PANEL, dvalues + after * PANEL, c.count - after);
      substitute_back(t, M + j * PANEL);
    }
    store(t, dvalues + j * PANEL);
  }
  for (int64_t x = c.padded * PANEL; x < round_up(c.count, PANEL) * PANEL; x += LANES) store(dvalues + x, Vec{});
}

// Computes scale dP D and dM D, and the transposes of both, the latter times b_i. With head decay it also computes the
// pairs' terms of dg.
SLEEPKERN_STAGE void backward_grams(const Chunk& c, const Workspace& w, const BackwardBuffers& a) {
  const int64_t end = round_up(c.count, PANEL);
  auto finish = [&](const float* gram, float factor, bool add) {
    float* gains = c.p.gate == Gate::head ? a.gains : nullptr;
    return [&w, gains, gram, factor, add](Vec x, int64_t at, int64_t) {
      if (gains) store(gains + at, (add ? load(gains + at) : Vec{}) + x * load(gram + at));
      return x * load(w.decays + at) * factor;
    };
  };
  if (c.p.want_output) {
    upper_gram<1>(a.writes_transposed, a.dout_transposed, a.V_rows, c.count, CHUNK, a.dgram_qk,
                  finish(w.gram_qk, c.p.scale, false));
  }
  if (c.p.delta) {
    upper_gram<-1>(a.writes_transposed, a.dvalues_transposed, a.V_rows, c.count, CHUNK, a.dgram_kk,
                   finish(w.gram_kk, 1, c.p.want_output));
    for (int64_t i = 0; i < c.count; ++i) a.dgram_kk[column_at(i, CHUNK) + i * PANEL] = 0;
  }
  if (c.p.want_output) transpose_panels(a.dgram_qk, CHUNK, end, end, a.dgram_qk_transposed, CHUNK);
  if (!c.p.delta) return;
  transpose_panels(a.dgram_kk, CHUNK, end, end, a.dgram_kk_transposed, CHUNK);
  for (int64_t j = 0; j < end; j += PANEL) {
    for (int64_t i = 0; i < end; ++i) {
      float* row = a.dgram_kk_transposed + j * CHUNK + i * PANEL;
      SLEEPKERN_EACH_VEC(n) store(row + n * LANES, load(row + n * LANES) * w.beta[i]);
    }
  }
}

// Multiplies a tile by rows of factors, one for each channel.
SLEEPKERN_INLINE void scale_by_rows(Tile& t, const float* rows) {
  SLEEPKERN_EACH_ROW(r)
    SLEEPKERN_EACH_VEC(n) t.at[r][n] *= load(rows + r * PANEL + n * LANES);
}

// Sums the pairs' terms of dg with head decay: `reach` of token i is the sum of its pairs with j < t.
SLEEPKERN_STAGE void gather_pairs(const Chunk& c, const BackwardBuffers& a) {
  alignas(64) float reach[CHUNK] = {};
  for (int64_t t = 1; t < c.count; ++t) {
    const int64_t j = t - 1;
    for (int64_t i = j / LANES * LANES; i < c.count; i += LANES) {
      store(reach + i, load(reach + i) + load(a.gains + column_at(i, CHUNK) + j * PANEL));
    }
    reach[j] = 0;  // from here on j is before t
    Vec total{};
    for (int64_t i = j / LANES * LANES; i < c.count; i += LANES) total += load(reach + i);
    store(a.pair_lanes + t * LANES, total);
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
SLEEPKERN_STAGE void backward_queries(const Chunk& c, const Workspace& w, const BackwardBuffers& a,
                                      const float* state) {
  const bool head_decay = c.p.gate == Gate::head;
  for (int64_t panel = 0; panel < a.K_panels; ++panel) {
    const int64_t at = panel * CHUNK * PANEL;
    const float *S = state + panel * a.V_rows * PANEL, *k = w.keys_transposed + at;
    for (int64_t i = 0; i < c.padded; i += ROWS) {
      Tile t;
      clear(t);
      multiply_add<1>(t, a.dout_transposed + column_at(i, a.V_rows), S, w.V);
      scale_rows(t, w.output_scale + i);
      if (w.decay_from_start_rows) {
        scale_by_rows(t, w.decay_from_start_rows + at + i * PANEL);
      } else {
        if (head_decay) gather_rows(t, w.q_panels_transposed + at + i * PANEL, nullptr, a.gate_lanes + i * LANES);
        multiply_add<1>(t, a.dgram_qk + column_at(i, CHUNK), k, min_of(i + ROWS, c.count));
      }
      store(t, a.dq_panels + at + i * PANEL);
    }
  }
}

SLEEPKERN_STAGE void backward_prediction(const Chunk& c, const Workspace& w, const BackwardBuffers& a,
                                         const float* state) {
  const bool head_decay = c.p.gate == Gate::head;
  for (int64_t panel = 0; panel < a.K_panels; ++panel) {
    const int64_t at = panel * CHUNK * PANEL;
    const float *S = state + panel * a.V_rows * PANEL, *k = w.keys_transposed + at;
    for (int64_t i = 0; i < c.padded; i += ROWS) {
      Tile t;
      clear(t);
      multiply_add<-1>(t, a.dvalues_transposed + column_at(i, a.V_rows), S, w.V);
      scale_rows(t, w.decay_from_start + i);
      if (w.decay_from_start_rows) {
        scale_by_rows(t, w.decay_from_start_rows + at + i * PANEL);
      } else {
        if (head_decay) gather_rows(t, k + i * PANEL, w.beta + i, a.gate_lanes + i * LANES);
        multiply_add<1>(t, a.dgram_kk + column_at(i, CHUNK), k, min_of(i + ROWS, c.count));
      }
      store(t, a.dz_panels + at + i * PANEL);
    }
  }
}

SLEEPKERN_STAGE void backward_keys(const Chunk& c, const Workspace& w, const BackwardBuffers& a) {
  const bool head_decay = c.p.gate == Gate::head;
  for (int64_t panel = 0; panel < a.K_panels; ++panel) {
    const int64_t at = panel * CHUNK * PANEL;
    const float *dS = a.dstate_transposed + panel * a.V_rows * PANEL, *k = w.keys_transposed + at,
                *q = w.q_panels_transposed + at;
    for (int64_t i = 0; i < c.padded; i += ROWS) {
      const int64_t gram = column_at(i, CHUNK) + i * PANEL;
      Tile t;
      clear(t);
      multiply_add<1>(t, a.writes_transposed + column_at(i, a.V_rows), dS, w.V);
      scale_rows(t, w.decay_to_end + i);
      if (w.decay_to_end_rows) {
        scale_by_rows(t, w.decay_to_end_rows + at + i * PANEL);
      } else {
        if (head_decay) gather_rows(t, k + i * PANEL, nullptr, a.write_lanes + i * LANES);
        if (c.p.want_output) multiply_add<1>(t, a.dgram_qk_transposed + gram, q + i * PANEL, c.count - i);
        if (c.p.delta) multiply_add<1>(t, a.dgram_kk_transposed + gram, k + i * PANEL, c.count - i);
      }
      store(t, a.dk_panels + at + i * PANEL);
    }
  }
}

// Adds k.z to db and completes dk, of one key panel. The tokens' k are `stride` floats apart.
SLEEPKERN_STAGE void gather_key_gradients(const Chunk& c, const Workspace& w, const BackwardBuffers& a, const float* k,
                                          int64_t stride, int64_t panel) {
  for (int64_t t = 0; t < c.count; ++t) {
    const int64_t at = (panel * CHUNK + t) * PANEL;
    SLEEPKERN_EACH_VEC(n) {
      const int64_t x = at + n * LANES;
      const Vec z = load(a.dz_panels + x);
      store(a.beta_lanes + t * LANES, load(a.beta_lanes + t * LANES) + load(k + t * stride + n * LANES) * z);
      store(a.dk_panels + x, load(a.dk_panels + x) + z * w.beta[t]);
    }
  }
}

// chunk decay <S, dS> of each row of the state.
SLEEPKERN_STAGE void backward_chunk_decay(const Workspace& w, const BackwardBuffers& a, const float* state) {
  for (int64_t panel = 0; panel < a.K_panels; ++panel) {
    const int64_t at = panel * a.V_rows * PANEL;
    Vec total[VECS] = {};
    for (int64_t x = at; x < at + w.V * PANEL; x += PANEL) {
      SLEEPKERN_EACH_VEC(n) total[n] += load(state + x + n * LANES) * load(a.dstate_transposed + x + n * LANES);
    }
    SLEEPKERN_EACH_VEC(n) {
      const int64_t d = panel * PANEL + n * LANES;
      // mutant: gate-gradient-without-final-state
      store(a.dchunk_decay + d, total[n] * load(w.chunk_decay + d));
    }
  }
}

// Takes dS of one value panel from after the chunk to before it.
SLEEPKERN_STAGE void backward_state(const Chunk& c, const Workspace& w, const BackwardBuffers& a, int64_t panel,
                                    PrefetchSchedule& prefetch) {
  float* dstate = a.dstate + panel * w.K_rows * PANEL;
  const int64_t at = panel * CHUNK * PANEL;
  if (c.p.want_output) scale_tokens(c, a.dout + at, w.output_scale, a.scaled_dout);
  if (c.p.delta) scale_tokens(c, a.dvalues + at, w.prediction_scale, a.scaled_dvalues);
  for (int64_t d = 0; d < w.K; d += ROWS) {
    const int64_t left = column_at(d, CHUNK);
    Tile t;
    load(t, dstate + d * PANEL);
    scale_rows(t, w.chunk_decay + d);
    if (c.p.want_output) multiply_add<1>(t, w.q_panels_transposed + left, a.scaled_dout, c.count);
    if (c.p.delta) multiply_add<-1>(t, w.keys_transposed + left, a.scaled_dvalues, c.count);
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
static void plan_prefetch(const Next& next, const Workspace& w, const Gradients& out, PrefetchSchedule& prefetch) {
  const Chunk& c = next.chunk;
  const Problem& p = c.p;
  if (c.count <= 0) return;
  prefetch.add_inputs(c);
  prefetch.add(c, {out.dk, p.H * w.K, out.key_type}, c.key_head() * w.K, w.K);
  prefetch.add(c, {out.dv, p.HV * w.V, p.v.type}, c.head * w.V, w.V);
  if (p.gate == Gate::channel) prefetch.add(c, {out.dg, p.HV * w.K, p.g.type}, c.head * w.K, w.K);
  if (p.want_output) prefetch.add(c, out.dout, c.head * w.V, w.V);
  if (p.want_output) prefetch.add(c, {out.dq, p.H * w.K, out.key_type}, c.key_head() * w.K, w.K);
  for (const float* states : {p.state, out.dfinal, static_cast<const float*>(out.dstate)}) {
    if (next.bh >= 0 && states) prefetch.add_state(p, states, next.bh);
  }
}

// Computes all gradients of one chunk. `state`, transposed, is the state before it and `writes` its Vn. `next` is
// computed after it: the chunk before it in time, or one of another head.
SLEEPKERN_STAGE void chunk_backward(const Chunk& c, Workspace& w, BackwardBuffers& a, const Gradients& out,
                                    const float* state, const float* writes, bool add, const Next& next) {
  const int64_t end = round_up(c.count, PANEL);
  transpose_panels(a.dstate, w.K_rows, w.K_rows, a.V_rows, a.dstate_transposed, a.V_rows);
  std::memset(a.beta_lanes, 0, CHUNK * LANES * sizeof(float));
  for (float* lanes : {a.gate_lanes, a.write_lanes, a.pair_lanes}) {
    std::memset(lanes, 0, CHUNK * LANES * sizeof(float));
  }
  if (c.p.want_output) {
    load_dout(c, w, a, out.dout);
    transpose_panels(a.dout, CHUNK, end, a.V_rows, a.dout_transposed, a.V_rows);
    transpose_panels(w.gram_qk, CHUNK, end, end, a.gram_qk_transposed, CHUNK);
  }
  if (c.p.delta) transpose_panels(w.gram_kk, CHUNK, end, end, a.gram_kk_transposed, CHUNK);
  for (int64_t panel = 0; panel < w.V_panels; ++panel) {
    backward_values(c, w, a, panel);
    write_dv(c, w, a, out, panel);
  }
  if (c.p.delta) transpose_panels(a.dvalues, CHUNK, end, a.V_rows, a.dvalues_transposed, a.V_rows);
  transpose_panels(writes, CHUNK, end, a.V_rows, a.writes_transposed, a.V_rows);
  backward_grams(c, w, a);
  if (c.p.want_output) backward_queries(c, w, a, state);
  if (c.p.delta) backward_prediction(c, w, a, state);
  backward_keys(c, w, a);
  if (c.p.gate != Gate::none) backward_chunk_decay(w, a, state);
  if (c.p.gate == Gate::head && (c.p.want_output || c.p.delta)) gather_pairs(c, a);
  if (c.p.gate == Gate::channel) {
    gather_gates(c, w, a);
    backward_channel_grams(c, w, a);
  }
  const Tokens x(w);
  for (int64_t panel = 0; c.p.delta && panel < a.K_panels; ++panel) {
    gather_key_gradients(c, w, a, x.k + panel * x.panel, x.token, panel);
  }
  write_key_gradients(c, w, a, out, add);
  write_gate_gradients(c, w, a, out);
  PrefetchSchedule prefetch(state_tiles(w));
  plan_prefetch(next, w, out, prefetch);
  for (int64_t panel = 0; panel < w.V_panels; ++panel) backward_state(c, w, a, panel, prefetch);
}

}  // namespace
}  // namespace sleepkern::SLEEPKERN_ISA
