// The fast path (sleepkern/ops/fast_path.py): it recognises a plain call from its tensors, without Python code.
#pragma once

#include "bindings/dlpack.h"
#include "common/recurrence.h"

namespace sleepkern {

// Gates that the kernel makes of raw g and beta (RawGates in common/recurrence.h); the tensors may be nullptr.
struct PlainGates {
  bool raw_decay;
  double lower_bound, beta_scale;
  const dlpack::Tensor *A_log, *dt_bias;
};

// The tensors of a call, nullptr where absent; results are written to o and final_state.
struct PlainCall {
  Gate gate;
  bool delta, normalize;
  double scale;  // NaN for K^-0.5
  const dlpack::Tensor *q, *k, *v, *g, *beta, *state, *o, *final_state;
  PlainGates raw;
};

// Whether every check of sleepkern/problems/recurrence.py would accept the call, and the CPU kernels can read its
// tensors in place; `problem` is then filled. It does not report a fault: the checks in Python do.
bool is_plain(const PlainCall& call, Problem& problem);

}  // namespace sleepkern
