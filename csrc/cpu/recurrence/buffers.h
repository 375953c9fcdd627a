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
constexpr int64_t GROUP = 8;

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
  double keeps;                                   // share of an error of the state that is left after the chunk
  double turns;                                   // share of the state that k^T S moves
  double reads;                                   // sum of |read_scale q|^2, divided by K
  float key_length[CHUNK], reader_length[CHUNK];  // |k|^2, |q|^2, after normalisation if any
  float written[CHUNK];                           // |Kt|^2 of each token
  float read_off[CHUNK];                          // sum of P^2 over the queries of a token
};

struct Workspace {
  int64_t K, V;                    // head sizes
  int64_t K_rows, V_panels;        // K rounded up to whole panels; number of value panels
  int64_t first_panel, end_panel;  // the panels that this thread computes
  uint32_t left_out;               // bits of those panels that are skipped
  int64_t state_size;              // floats of a state in panels

  float* states;    // [GROUP][V_panels][K_rows][PANEL]
  float* state;     // the state of the current head
  float* keys;      // [CHUNK / PANEL][K][PANEL]  k^T; times E per channel for channel decay
  float* q_panels;  // same, of q^T
  float* k_tails;   // [K_rows / PANEL][CHUNK][PANEL]  Kt = k exp(G_C - G)
  float* gram_kk;   // [CHUNK / PANEL][CHUNK][PANEL]  M^T, strictly upper: row j, column i > j
  float* scores;    // same, P^T, i >= j
  float* decays;    // same, exp(G_i - G_j), 1 for channel decay; 0 for i < j
  float* values;    // [CHUNK][PANEL]  b v, then Vn, of one value panel

  // Where products take bfloat16, each array of operands above has a counterpart in bf16x2, with half the rows. keys,
  // q_panels and k_tails are bf16x2 themselves then.
  Pair* state_pairs;   // that of `state`, within states_pairs
  Pair* states_pairs;  // [GROUP][V_panels][K_rows / 2][PANEL]
  Pair* score_pairs;   // [CHUNK / PANEL][CHUNK / 2][PANEL]
  Pair* value_pairs;   // [CHUNK / 2][PANEL]
  Pair* write_pairs;   // same, to_write times the values; `k_tails` is k then
  Rounding* rounding;  // [GROUP][V_panels]
  ChunkRounding chunk_rounding;

  float* rows;  // [LANES][row_size] tokens being packed
  int64_t row_size;

  // With channel decay only: the chunk as rows of row_size floats, and one level of the dyadic split.
  float* gates;           // [CHUNK] rows of a = exp(g)
  float* key_rows;        // [CHUNK] rows of k
  float* reader_rows;     // [CHUNK] rows of q
  float* factors;         // [CHUNK] rows of products of a
  float* level_keys;      // like keys, times the decay of the level
  float* level_q_panels;  // like q_panels

  // In a backward only, else nullptr: transposes, also in panels.
  float* keys_transposed;                     // [K_rows / PANEL][CHUNK][PANEL]
  float* q_panels_transposed;                 // same
  float* end_keys;                            // like keys: Kt^T; with channel decay only, as the next two
  float* since_rows;                          // like keys_transposed: E
  float* until_rows;                          // same: exp(G_C - G)
  float key_norm[CHUNK], reader_norm[CHUNK];  // 1 / |k| and 1 / |q|, or 1 without normalisation

  float beta[CHUNK];         // b
  float gram_scale[CHUNK];   // factor of the columns of k^T k: b
  float score_scale[CHUNK];  // factor of the columns of k^T q: scale
  float key_scale[CHUNK];    // factor of k^T S: b E, or b for channel decay
  float read_scale[CHUNK];   // factor of q^T S: scale E, or scale
  float since_start[CHUNK];  // E for head decay, else 1
  float to_end[CHUNK];       // exp(G_C - G) for head decay, else 1
  float to_write[CHUNK];     // the same times key_norm; with bfloat16 only
  double log_decay[CHUNK];   // G for head decay; in double, so that a difference of two large sums is exact
  float* keep;               // [K_rows] decay of each row of the state over the chunk
};

// Whether products take bfloat16, at least at first: panels whose rounding errors are too large are computed again in
// float32 (rounding.h). Without a gate too many panels would be. With channel decay the operands are products of
// decays, rescaled at every level, and stay in float32.
static bool takes_pairs(const Problem& p) { return DOTS && p.k.type == Type::bfloat16 && p.gate == Gate::head; }

static void lay_out(Workspace& w, const Problem& p, bool backward, ArenaCursor& take) {
  const bool channel = p.gate == Gate::channel;
  const int64_t token_panels = CHUNK * p.K;
  w.K = p.K;
  w.V = p.V;
  w.K_rows = round_up(p.K, PANEL);
  w.V_panels = round_up(p.V, PANEL) / PANEL;
  w.first_panel = 0;
  w.end_panel = w.V_panels;
  w.left_out = 0;
  w.row_size = round_up(max_of(p.K, p.V), PANEL);
  w.state_size = w.V_panels * w.K_rows * PANEL;
  w.states = take((backward ? 1 : GROUP) * w.state_size);
  w.state = w.states;
  w.keys = take(token_panels);
  w.q_panels = take(token_panels);
  w.k_tails = take(w.K_rows * CHUNK);
  w.gram_kk = take(CHUNK * CHUNK);
  w.scores = take(CHUNK * CHUNK);
  w.decays = take(CHUNK * CHUNK);
  w.values = take(CHUNK * PANEL);
  const bool pairs = !backward && takes_pairs(p);
  w.states_pairs = reinterpret_cast<Pair*>(take(pairs ? GROUP * w.state_size / 2 : 0));
  w.score_pairs = reinterpret_cast<Pair*>(take(pairs ? CHUNK * CHUNK / 2 : 0));
  w.value_pairs = reinterpret_cast<Pair*>(take(pairs ? CHUNK * PANEL / 2 : 0));
  w.write_pairs = reinterpret_cast<Pair*>(take(pairs ? CHUNK * PANEL / 2 : 0));
  const int64_t sums = GROUP * w.V_panels * static_cast<int64_t>(sizeof(Rounding) / sizeof(float));
  w.rounding = reinterpret_cast<Rounding*>(take(pairs ? sums : 0));
  w.state_pairs = w.states_pairs;
  w.rows = take(LANES * w.row_size);
  w.gates = take(channel ? CHUNK * w.row_size : 0);
  w.key_rows = take(channel ? CHUNK * w.row_size : 0);
  w.reader_rows = take(channel ? CHUNK * w.row_size : 0);
  w.factors = take(channel ? CHUNK * w.row_size : 0);
  w.level_keys = take(channel ? w.K_rows * CHUNK : 0);
  w.level_q_panels = take(channel ? w.K_rows * CHUNK : 0);
  w.keep = take(w.K_rows);
  const int64_t transposed = backward ? w.K_rows * CHUNK : 0;
  w.keys_transposed = take(transposed);
  w.q_panels_transposed = take(transposed);
  w.end_keys = take(backward && channel ? token_panels : 0);
  w.since_rows = take(channel ? transposed : 0);
  w.until_rows = take(channel ? transposed : 0);
}

// The operands of the products of one value panel; E is float or Pair.
template <class E>
struct Operands {
  const E *keys, *q_panels, *k_tails, *scores, *values, *writes;
  E* state;
};

template <class E>
SLEEPKERN_INLINE Operands<E> operands(const Workspace& w, int64_t panel) {
  if constexpr (IS_PAIR<E>) {
    auto pairs = [](const float* x) { return reinterpret_cast<const Pair*>(x); };
    return {pairs(w.keys),
            pairs(w.q_panels),
            pairs(w.k_tails),
            w.score_pairs,
            w.value_pairs,
            w.write_pairs,
            w.state_pairs + panel * w.K_rows / 2 * PANEL};
  } else {
    return {w.keys, w.q_panels, w.k_tails, w.scores, w.values, w.values, w.state + panel * w.K_rows * PANEL};
  }
}

}  // namespace
}  // namespace sleepkern::SLEEPKERN_ISA
