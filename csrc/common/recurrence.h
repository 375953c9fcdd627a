// Sizes and pointers of one call of the recurrence. sleepkern/problems/recurrence.py describes and checks it.
#pragma once

#include <cstdint>

#include "common/types.h"

namespace sleepkern {

// How g and beta are made where the caller gives raw projections of them. backends/torch_gates.py has the formulas.
struct RawGates {
  bool raw_decay;     // whether g is raw
  float lower_bound;  // of the log decay, below 0; 0 for softplus, which has none
  float beta_scale;   // factor of the sigmoid of a raw beta; 0 where beta is not raw
  Array A_log;        // [HV], absent means 0
  Array dt_bias;      // [HV] or [HV, K], absent means 0
};

// The states that a call keeps on its way: of each sequence the state after every `every` tokens, and after its last.
// An empty sequence has none.
struct KeptStates {
  int64_t every;           // at least 1
  float* states;           // [states, HV, K, V], sequence after sequence; a forward writes them
  const int64_t* offsets;  // [sequences + 1] the number of states before each sequence when packed, else nullptr
  const float* gradients;  // like states, what a backward adds to the gradient of each; nullptr means 0

  // The states of a sequence of so many tokens, and those before sequence n, of all where n is the number of sequences.
  constexpr int64_t count(int64_t tokens) const { return tokens / every + (tokens % every != 0); }
  constexpr int64_t before(int64_t n, int64_t T) const { return offsets ? offsets[n] : n * count(T); }
};

struct Problem : RawGates {
  Gate gate;
  bool delta;
  bool normalize;
  bool want_output;  // whether o, or in a backward dq, is wanted
  float scale;
  int64_t sequences, T, H, HV, K, V;
  const int64_t* offsets;  // [sequences + 1] token offsets when packed, else nullptr: sequence n starts at n * T
  Rows q, k;               // [tokens, H, K]; q only with want_output
  Rows v;                  // [tokens, HV, V]
  Rows g;                  // [tokens, HV] or [tokens, HV, K] log decay, raw with raw_decay, absent without gate
  Rows beta;               // [tokens, HV], absent means 1
  const float* state;      // [sequences, HV, K, V], nullptr means 0; may be final_state itself
  void* o;                 // [tokens, HV, V] in v's type
  float* final_state;      // [sequences, HV, K, V]
  const KeptStates* kept;  // nullptr for none; on the CPU alone

  // The first token of a sequence in the flattened batch. first(sequences) is the number of tokens.
  constexpr int64_t first(int64_t sequence) const { return offsets ? offset_at(offsets, sequence) : sequence * T; }
  int64_t longest() const {
    int64_t most = offsets ? 0 : T;
    for (int64_t n = 0; offsets && n < sequences; ++n) {
      const int64_t tokens = first(n + 1) - first(n);
      most = most < tokens ? tokens : most;
    }
    return most;
  }
};

// Passes over one window that compute the state only, by the method wy, or by rank for at most RANK_LIMIT tokens.
struct Replay {
  bool rank;
  int64_t passes;
  double tol;            // if above 0, a head stops once its estimated residual is at most this; wy only
  float* before;         // [sequences, HV, K, V] state before the last pass of a head, nullptr when not wanted
  float* residual;       // [sequences, HV], with tol
  int32_t* passes_done;  // [sequences, HV] number of passes of each head, with tol
  Interrupt* interrupt;
};

// The gradients that a backward reads and writes; all that it writes are contiguous.
struct Gradients {
  Rows dout;            // [tokens, HV, V], only with want_output
  const float* dfinal;  // [sequences, HV, K, V] of the final state, nullptr means 0
  void *dq, *dk;        // [tokens, H, K] in key_type; dq only with want_output
  Type key_type;        // k's type; float32 where several value heads add up on a key head
  void* dv;             // [tokens, HV, V] in v's type
  void *dg, *dbeta;     // like g and beta, in their types; absent where those are
  float* dstate;        // [sequences, HV, K, V], nullptr when not wanted
  double* gate_sums;    // [sequences, HV, 1 + 1] or [sequences, HV, 1 + K]: the gradients of A_log and of dt_bias are
                        // added; only with raw_decay
};

}  // namespace sleepkern
