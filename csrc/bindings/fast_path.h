// The fast path (sleepkern/ops/fast_path.py): a plain call recognised from its tensors, without a line of Python.
#pragma once

#include "bindings/dlpack.h"
#include "common/recurrence.h"

namespace sleepkern {

// Tensors of a call, nullptr where absent; o and final_state are where the results go.
struct PlainCall {
  Gate gate;
  bool delta, normalize;
  double scale;  // NaN for K^-0.5
  const dlpack::Tensor *q, *k, *v, *g, *beta, *state, *o, *final_state;
};

// Whether the call is one that every check of sleepkern/problems/recurrence.py would pass and whose tensors the CPU
// kernels read in place; `problem` is then filled. It never says what is wrong: the checks in Python do.
bool is_plain(const PlainCall& call, Problem& problem);

}  // namespace sleepkern
