// The memory of one thread: the states of a group of heads and the operands of one chunk of one head, in panels
// (gemm/microkernel.h). At K = V = 128 a state has 64 KB and the operands 60 KB. One value panel uses 8 KB of state and
// 2 KB of values, and streams the rest from L2.
#pragma once

#include <cstdint>

#include "common/recurrence.h"
#include "cpu/gemm/microkernel.h"
#include "cpu/runtime/arena.h"
#include "cpu/simd/bf16.h"
#include "cpu/simd/vec.h"

namespace sleepkern::SLEEPKERN_ISA {
namespace {

// Heads of one sequence that are interleaved, chunk by chunk. A page of the caller's tensors holds rows of several
// heads, and is then visited once and not once for each head. One head after the other takes a quarter longer at H =
// 16, K = V = 128, T = 1024.
constexpr int64_t HEAD_GROUP = 8;

static_assert(HEAD_LIMIT / PANEL <= 32, "a bit for each panel");

// Sums of squares of one value panel of a head up to the current chunk, where products take bfloat16. Errors are the
// expected ones of the roundings so far (rounding.h).
struct Rounding {
  double state;
  double state_error;  // expected error of roundings in this call
  double kept_error;   // the same with the error that the initial state may have
  double output, output_error;
};

// What one chunk does to these sums.
struct ChunkRounding {
  double keeps;                            // share of an error of the state that is left after the chunk
  double moves;                            // share of the state that k^T S moves
  double output_gain;                      // sum of |output_scale q|^2, divided by K
  float k_length[CHUNK], q_length[CHUNK];  // |k|^2, |q|^2, after normalisation if any
  float written[CHUNK];                    // |Kt|^2 of each token
  float output_squares[CHUNK];             // sum of P^2 over the queries of a token
};

struct Workspace {
  int64_t K, V;                    // head sizes
  int64_t K_rows, V_panels;        // K rounded up to whole panels; number of value panels
  int64_t first_panel, end_panel;  // the panels that this thread computes
  uint32_t skipped;                // bits of those panels that are skipped
  int64_t state_size;              // floats of a state in panels

  float* states;    // [HEAD_GROUP][V_panels][K_rows][PANEL]
  float* state;     // the state of the current head
  float* keys;      // [CHUNK / PANEL][K][PANEL]  k^T; times E per channel for channel decay
  float* q_panels;  // same, of q^T
  float* k_tails;   // [K_rows / PANEL][CHUNK][PANEL]  Kt = k exp(G_C - G)
  float* gram_kk;   // [CHUNK / PANEL][CHUNK][PANEL]  M^T, strictly upper: row j, column i > j
  float* gram_qk;   // same, P^T, i >= j
  float* decays;    // same, exp(G_i - G_j), 1 for channel decay; 0 for i < j
  float* values;    // [CHUNK][PANEL]  b v, then Vn, of one value panel

  // Where products take bfloat16, each array of operands above has a counterpart in bf16x2, with half the rows. keys,
  // q_panels and k_tails are bf16x2 themselves then.
  Bf16x2* state_bf16;    // that of `state`, within states_bf16
  Bf16x2* states_bf16;   // [HEAD_GROUP][V_panels][K_rows / 2][PANEL]
  Bf16x2* gram_qk_bf16;  // [CHUNK / PANEL][CHUNK / 2][PANEL]
  Bf16x2* values_bf16;   // [CHUNK / 2][PANEL]
  Bf16x2* writes_bf16;   // same, write_scale times the values; `k_tails` is k then
  Rounding* rounding;    // [HEAD_GROUP][V_panels]
  ChunkRounding chunk_rounding;

  float* rows;  // [LANES][row_size] tokens being packed
  int64_t row_size;

  // With channel decay only: the chunk as rows of row_size floats, and one level of the dyadic split.
  float* gates;           // [CHUNK] rows of a = exp(g)
  float* k_rows;          // [CHUNK] rows of k
  float* q_rows;          // [CHUNK] rows of q
  float* factors;         // [CHUNK] rows of products of a
  float* level_keys;      // like keys, times the decay of the level
  float* level_q_panels;  // like q_panels

  // In a backward only, else nullptr: transposes, also in panels.
  float* keys_transposed;              // [K_rows / PANEL][CHUNK][PANEL]
  float* q_panels_transposed;          // same
  float* k_tail_columns;               // like keys: Kt^T; with channel decay only, as the next two
  float* decay_from_start_rows;        // like keys_transposed: E
  float* decay_to_end_rows;            // same: exp(G_C - G)
  float k_norm[CHUNK], q_norm[CHUNK];  // 1 / |k| and 1 / |q|, or 1 without normalisation

  float beta[CHUNK];              // b
  float gram_kk_scale[CHUNK];     // factor of the columns of k^T k: b
  float gram_qk_scale[CHUNK];     // factor of the columns of k^T q: scale
  float prediction_scale[CHUNK];  // factor of k^T S: b E, or b for channel decay
  float output_scale[CHUNK];      // factor of q^T S: scale E, or scale
  float decay_from_start[CHUNK];  // E for head decay, else 1
  float decay_to_end[CHUNK];      // exp(G_C - G) for head decay, else 1
  float write_scale[CHUNK];       // the same times k_norm; with bfloat16 only
  double log_decay[CHUNK];        // G for head decay; in double, so that a difference of two large sums is exact
  float* chunk_decay;             // [K_rows] decay of each row of the state over the chunk
};

// Whether products take bfloat16, at least at first: panels whose rounding errors are too large are computed again in
// float32 (rounding.h). Without a gate too many panels would be. With channel decay the operands are products of
// decays, rescaled at every level, and stay in float32.
static bool takes_bf16(const Problem& problem) {
  return DOTS && problem.k.type == Type::bfloat16 && problem.gate == Gate::head;
}

static void lay_out(Workspace& work, const Problem& problem, bool backward, ArenaCursor& take) {
  const bool channel = problem.gate == Gate::channel;
  const int64_t token_panels = CHUNK * problem.K;
  work.K = problem.K;
  work.V = problem.V;
  work.K_rows = round_up(problem.K, PANEL);
  work.V_panels = round_up(problem.V, PANEL) / PANEL;
  work.first_panel = 0;
  work.end_panel = work.V_panels;
  work.skipped = 0;
  work.row_size = round_up(max_of(problem.K, problem.V), PANEL);
  work.state_size = work.V_panels * work.K_rows * PANEL;
  work.states = take((backward ? 1 : HEAD_GROUP) * work.state_size);
  work.state = work.states;
  work.keys = take(token_panels);
  work.q_panels = take(token_panels);
  work.k_tails = take(work.K_rows * CHUNK);
  work.gram_kk = take(CHUNK * CHUNK);
  work.gram_qk = take(CHUNK * CHUNK);
  work.decays = take(CHUNK * CHUNK);
  work.values = take(CHUNK * PANEL);
  const bool bf16 = !backward && takes_bf16(problem);
  work.states_bf16 = reinterpret_cast<Bf16x2*>(take(bf16 ? HEAD_GROUP * work.state_size / 2 : 0));
  work.gram_qk_bf16 = reinterpret_cast<Bf16x2*>(take(bf16 ? CHUNK * CHUNK / 2 : 0));
  work.values_bf16 = reinterpret_cast<Bf16x2*>(take(bf16 ? CHUNK * PANEL / 2 : 0));
  work.writes_bf16 = reinterpret_cast<Bf16x2*>(take(bf16 ? CHUNK * PANEL / 2 : 0));
  const int64_t sums = HEAD_GROUP * work.V_panels * static_cast<int64_t>(sizeof(Rounding) / sizeof(float));
  work.rounding = reinterpret_cast<Rounding*>(take(bf16 ? sums : 0));
  work.state_bf16 = work.states_bf16;
  work.rows = take(LANES * work.row_size);
  work.gates = take(channel ? CHUNK * work.row_size : 0);
  work.k_rows = take(channel ? CHUNK * work.row_size : 0);
  work.q_rows = take(channel ? CHUNK * work.row_size : 0);
  work.factors = take(channel ? CHUNK * work.row_size : 0);
  work.level_keys = take(channel ? work.K_rows * CHUNK : 0);
  work.level_q_panels = take(channel ? work.K_rows * CHUNK : 0);
  work.chunk_decay = take(work.K_rows);
  const int64_t transposed = backward ? work.K_rows * CHUNK : 0;
  work.keys_transposed = take(transposed);
  work.q_panels_transposed = take(transposed);
  work.k_tail_columns = take(backward && channel ? token_panels : 0);
  work.decay_from_start_rows = take(channel ? transposed : 0);
  work.decay_to_end_rows = take(channel ? transposed : 0);
}

// The operands of the products of one value panel; E is float or Bf16x2.
template <class E>
struct Operands {
  const E *keys, *q_panels, *k_tails, *gram_qk, *values, *writes;
  E* state;
};

template <class E>
SLEEPKERN_INLINE Operands<E> operands(const Workspace& work, int64_t panel) {
  if constexpr (IS_BF16X2<E>) {
    auto as_bf16x2 = [](const float* x) { return reinterpret_cast<const Bf16x2*>(x); };
    return {as_bf16x2(work.keys),
            as_bf16x2(work.q_panels),
            as_bf16x2(work.k_tails),
            work.gram_qk_bf16,
            work.values_bf16,
            work.writes_bf16,
            work.state_bf16 + panel * work.K_rows / 2 * PANEL};
  } else {
    return {work.keys,
            work.q_panels,
            work.k_tails,
            work.gram_qk,
            work.values,
            work.values,
            work.state + panel * work.K_rows * PANEL};
  }
}

}  // namespace
}  // namespace sleepkern::SLEEPKERN_ISA
