// The memory of a backward beside the Workspace: gradients of one chunk, and the states before the chunks, in panels.
//
// A backward scans the chunks from last to first and needs the state before each. A head's sequence of n chunks is cut
// into segments of SEGMENT chunks, or of sqrt(n) if that is more. A first state pass keeps the states before the
// segments; a single segment, up to 2048 tokens, needs none. Then, from the last segment to the first, a second state
// pass keeps the state before each chunk of the segment and the values it writes. So a thread holds at most
// max(SEGMENT, sqrt(n)) chunks and n / SEGMENT or sqrt(n) states: at K = V = 128 these are 5 MB for T = 2048, 6 MB at
// 32768 and 26 MB at a million, for any batch.
#pragma once

#include <cmath>
#include <cstdint>

#include "common/recurrence.h"
#include "cpu/gemm/microkernel.h"
#include "cpu/recurrence/buffers.h"
#include "cpu/runtime/arena.h"
#include "cpu/simd/vec.h"

namespace sleepkern::SLEEPKERN_ISA {
namespace {

constexpr int64_t SEGMENT = 64;

struct BackwardBuffers {
  int64_t segment, segments;  // chunks of a segment, segments of the longest sequence
  int64_t V_rows, K_panels;   // V rounded up to whole panels; number of key panels
  int64_t values_size;        // floats of a chunk's values, [V_panels][CHUNK][PANEL]
  int64_t state_size;         // floats of a state in panels
  float* segment_states;      // [segments] states before the segments, in panels
  float* states;              // [segment] states before the chunks of a segment, transposed
  float* writes;              // [segment] Vn of its chunks, each [V_panels][CHUNK][PANEL]

  float* dstate;                        // [V_panels][K_rows][PANEL]  gradient of the state after the chunk
  float* dstate_transposed;             // [K_panels][V_rows][PANEL]
  float* dout;                          // [V_panels][CHUNK][PANEL]  dO
  float* dout_transposed;               // [CHUNK / PANEL][V_rows][PANEL]
  float* dvalues;                       // like dout: dR, of b (v - k E S)
  float* dvalues_transposed;            // like dout_transposed
  float* writes_transposed;             // like dout_transposed: Vn
  float *scaled_dout, *scaled_dvalues;  // [CHUNK][PANEL] one panel, rows times output_scale or prediction_scale
  float *gram_qk_transposed, *gram_kk_transposed;    // [CHUNK / PANEL][CHUNK][PANEL]  P, M: row i, column j
  float *dgram_qk, *dgram_kk;                        // like Workspace::gram_qk: row j, column i
  float *dgram_qk_transposed, *dgram_kk_transposed;  // row i, column j; dgram_kk times b_i
  float *dq_panels, *dz_panels, *dk_panels;          // [K_panels][CHUNK][PANEL]  dq; z; dk-, then dk
  float* dgates;                                     // same: dg, for channel decay
  float* dchunk_decay;                               // [K_rows] chunk decay <S, dS> of each row of the state
  float* gains;                                      // like dgram_qk: dP P + dM M, for head decay
  float* beta_lanes;                                 // [CHUNK][LANES] parts of sums over channels, as the next three
  float *gate_lanes, *write_lanes;  // head decay: terms of dg that are summed from a token on, and up to it
  float* pair_lanes;                // head decay: the term of dg from pairs of an earlier and a later token
  float* row;                       // one token's gradient
  double* gate_sums;                // of the current head: the gradients of A_log and dt_bias (Gradients::gate_sums)
};

static void lay_out(BackwardBuffers& grads, const Problem& problem, const Workspace& work, int64_t most_chunks,
                    ArenaCursor& take) {
  const int64_t chunks = max_of(most_chunks, 1);
  grads.segment =
      min_of(chunks, max_of(SEGMENT, static_cast<int64_t>(std::ceil(std::sqrt(static_cast<double>(chunks))))));
  grads.segments = (chunks + grads.segment - 1) / grads.segment;
  grads.V_rows = work.V_panels * PANEL;
  grads.K_panels = work.K_rows / PANEL;
  grads.values_size = grads.V_rows * CHUNK;
  grads.state_size = work.state_size;
  grads.segment_states = take(grads.segments > 1 ? grads.segments * work.state_size : 0);
  grads.states = take(grads.segment * work.state_size);
  grads.writes = take(grads.segment * grads.values_size);
  grads.dstate = take(work.state_size);
  grads.dstate_transposed = take(work.state_size);
  for (float** values :
       {&grads.dout, &grads.dout_transposed, &grads.dvalues, &grads.dvalues_transposed, &grads.writes_transposed}) {
    *values = take(grads.values_size);
  }
  grads.scaled_dout = take(CHUNK * PANEL);
  grads.scaled_dvalues = take(CHUNK * PANEL);
  for (float** gram : {&grads.gram_qk_transposed, &grads.gram_kk_transposed, &grads.dgram_qk, &grads.dgram_kk,
                       &grads.dgram_qk_transposed, &grads.dgram_kk_transposed}) {
    *gram = take(CHUNK * CHUNK);
  }
  for (float** keys : {&grads.dq_panels, &grads.dz_panels, &grads.dk_panels}) *keys = take(work.K_rows * CHUNK);
  grads.dgates = take(problem.gate == Gate::channel ? work.K_rows * CHUNK : 0);
  grads.dchunk_decay = take(work.K_rows);
  grads.gains = take(problem.gate == Gate::head ? CHUNK * CHUNK : 0);
  for (float** lanes : {&grads.beta_lanes, &grads.gate_lanes, &grads.write_lanes, &grads.pair_lanes})
    *lanes = take(CHUNK * LANES);
  grads.row = take(work.row_size);
}

}  // namespace
}  // namespace sleepkern::SLEEPKERN_ISA
