// A problem and a replay as sleepkern/backends/cuda/recurrence.py describes them, once for a problem.
#pragma once

#include "bindings/arguments.h"
#include "cuda/recurrence/api.h"

namespace sleepkern {

using Address = uintptr_t;
using Inputs = std::tuple<View, View, View, View, View>;  // q, k, v, g, beta

template <class T>
T* at(Address address) {
  return reinterpret_cast<T*>(address);
}

// The sizes and switches of a problem; the addresses of its tensors come with a launch.
struct CudaProblem {
  int gate;
  bool delta, normalize;
  float scale;
  int64_t sequences, T, H, HV, K, V;

  Problem with(const Inputs& inputs, Address offsets, Address state, Address o, Address final_state) const {
    const auto& [q, k, v, g, beta] = inputs;
    Problem p = describe(gate, delta, normalize, scale, sequences, T, H, HV, K, V, offsets, q, k, v, g, beta, state);
    p.o = at<void>(o);
    p.final_state = at<float>(final_state);
    check_given("final_state", p.final_state, p.sequences > 0);
    return p;
  }
};

// A problem and its plan.
struct CudaReplay {
  CudaProblem problem;
  int mode, passes;
  float tol;
  bool affine, token_space, single_chunk;
  int block, slots;

  // Launches a call whose problem and addresses are filled, on a stream.
  void launch(cuda::ReplayParams& call, Address stream) const {
    call.mode = mode;
    call.passes = passes;
    call.tol = tol;
    call.affine = affine;
    call.token_space = token_space;
    check_at_least("block", block, 1);
    call.v_tile = block;
    call.v_tiles = static_cast<int>((call.problem.V + block - 1) / block);
    call.slots = slots;
    pybind11::gil_scoped_release unlocked;
    if (single_chunk) {
      cuda::single_chunk(call, at<void>(stream));
    } else {
      cuda::chunk_factors(call, at<void>(stream));
      cuda::multi_chunk(call, at<void>(stream));
    }
  }
};

}  // namespace sleepkern
