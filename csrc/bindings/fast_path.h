// The fast path (sleepkern/ops/fast_path.py): it recognises a plain call from its tensors, without Python code.
#pragma once

#include <pybind11/pybind11.h>

#include <array>

#include "bindings/dlpack.h"
#include "common/recurrence.h"

namespace sleepkern {

// The type of device whose memory the kernels of csrc/cuda read, as DLPack numbers it; tests run them on the CPU.
#ifdef SLEEPKERN_CUDA_ON_CPU
constexpr int32_t FAST_DEVICE = dlpack::CPU;
#else
constexpr int32_t FAST_DEVICE = dlpack::CUDA;
#endif

// Gates that the kernel makes of raw g and beta (RawGates in common/recurrence.h); the tensors may be nullptr.
struct PlainGates {
  bool raw_decay;
  double lower_bound, beta_scale;
  const dlpack::Tensor *A_log, *dt_bias;
};

// The tensors of a call, nullptr where absent; results are written to o and final_state. A call without q has no o.
struct PlainCall {
  Gate gate;
  bool delta, normalize;
  double scale;  // NaN for K^-0.5
  const dlpack::Tensor *q, *k, *v, *g, *beta, *state, *o, *final_state;
  PlainGates raw;
};

// Whether every check of sleepkern/problems/recurrence.py would accept the call, all tensors are on one device of this
// type, and kernels can read them in place; `problem` is then filled. Values are looked at on the CPU only, as those
// checks do. It does not report a fault: the checks in Python do. With `state_type`, which then says the type of the
// states, a state that is updated in place may be bfloat16.
bool is_plain(const PlainCall& call, int32_t device_type, Problem& problem, Type* state_type = nullptr);

// Views of a call's tensors, in the order of PlainCall from q on; A_log and dt_bias last.
class TensorViews {
 public:
  // Reads `count` Python objects, of which None is absent; false for another object, or where k, v, final_state, and q
  // and o for outputs, have not four dimensions. Without outputs q and o have to be absent.
  bool read(PyObject* const* given, size_t count, bool outputs = true);
  PlainCall call(Gate gate, bool delta, bool normalize, double scale, PlainGates raw) const;

 private:
  std::array<dlpack::Tensor, 10> views_;
  std::array<const dlpack::Tensor*, 10> found_{};
};

// Reads the layout of a tensor, which the object has to be; false for a tensor without strides. The view is valid as
// long as the tensor is.
bool view_of(PyObject* tensor, dlpack::Tensor& out);

// Stores the table of a framework's tensor class; false for a table of another major version.
bool use_exchange_api(const pybind11::capsule& capsule);

using FastFunction = PyObject* (*)(PyObject*, PyObject* const*, Py_ssize_t);
PyCFunction fast(FastFunction function);  // for a PyMethodDef with METH_FASTCALL
PyObject* wrong_count(const char* name, Py_ssize_t expected, Py_ssize_t got);

}  // namespace sleepkern
