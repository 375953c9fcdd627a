// Arguments of the bindings: a tensor is (address, row stride, type code), an address is an integer.
#pragma once

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstdint>
#include <tuple>
#include <type_traits>

#include "bindings/checks.h"
#include "common/recurrence.h"

namespace sleepkern {

using View = std::tuple<uintptr_t, int64_t, int>;

// A dict of sizes and addresses; a missing name raises KeyError.
class Described {
 public:
  explicit Described(const pybind11::dict& values) : values_(values) {}

  template <class T>
  T get(const char* name) const {
    if constexpr (std::is_pointer_v<T>) {
      return reinterpret_cast<T>(get<uintptr_t>(name));
    } else {
      return values_[name].cast<T>();
    }
  }
  template <class T>
  void read(const char* name, T& field) const {
    field = get<T>(name);
  }

 private:
  const pybind11::dict& values_;
};

inline Rows rows(const char* name, const View& view) {
  const auto& [address, stride, type] = view;
  return {reinterpret_cast<const void*>(address), stride, check_type(name, type)};
}

inline Gate check_gate(int code) {
  check_between("gate", code, 0, 2);
  return static_cast<Gate>(code);
}

// Sizes and inputs of a call by position.
inline Problem describe(int gate, bool delta, bool normalize, float scale, int64_t sequences, int64_t T, int64_t H,
                        int64_t HV, int64_t K, int64_t V, uintptr_t offsets, const View& q, const View& k,
                        const View& v, const View& g, const View& beta, uintptr_t state) {
  Problem problem{};
  problem.gate = check_gate(gate);
  problem.delta = delta;
  problem.normalize = normalize;
  problem.scale = scale;
  problem.sequences = sequences;
  problem.T = T;
  problem.H = H;
  problem.HV = HV;
  problem.K = K;
  problem.V = V;
  problem.offsets = reinterpret_cast<const int64_t*>(offsets);
  problem.q = rows("q", q);
  problem.k = rows("k", k);
  problem.v = rows("v", v);
  problem.g = rows("g", g);
  problem.beta = rows("beta", beta);
  problem.state = reinterpret_cast<const float*>(state);
  problem.want_output = problem.q.data != nullptr;
  check(problem);
  return problem;
}

bool signalled();  // whether a handler of a signal raised an exception; the call then ends with it

void bind_fast_path(pybind11::module_& m);         // plain calls, without the checks in Python
void bind_recurrence(pybind11::module_& m);        // one pass, its gradients, and a replay
void bind_decode(pybind11::module_& m);            // a decode step on states that are anywhere
void bind_mixer(pybind11::module_& m);             // short convolution and gated norm
void bind_blocks(pybind11::module_& m);            // stacks of hybrid blocks
void bind_witness(pybind11::module_& m);           // stacks of modules that are as they were
void bind_cuda(pybind11::module_& m);              // the launches of csrc/cuda
void bind_cuda_blocks(pybind11::module_& m);       // the launch for stacks of blocks
void bind_cuda_fast_decode(pybind11::module_& m);  // plain decodes, without the checks in Python
void bind_cuda_fast_replay(pybind11::module_& m);  // plain replays, without them too

}  // namespace sleepkern
