// A plain decode on a GPU (sleepkern/ops/fast_path.py): recognised from its tensors as on the CPU, then launched.
#include <cstdint>

#include "bindings/fast_path.h"
#include "bindings/named.h"
#include "cuda/recurrence/api.h"

namespace py = pybind11;

namespace sleepkern {
namespace {

// try_fast_decode(gate, delta, normalize, scale, q, k, v, g, beta, state, o, most, stream): launches the decode of at
// most so many tokens, which updates the state in place, and returns true if the call is plain. The tensors have to be
// on the current device.
PyObject* try_fast_decode(PyObject*, PyObject* const* given, Py_ssize_t count) {
  if (count != 13) return wrong_count("try_fast_decode", 13, count);
  return guarded([&]() -> PyObject* {
    const long gate = PyLong_AsLong(given[0]);
    const int delta = PyObject_IsTrue(given[1]), normalize = PyObject_IsTrue(given[2]);
    const double scale = PyFloat_AsDouble(given[3]);
    const int64_t most = PyLong_AsLongLong(given[11]);
    const auto stream = static_cast<uintptr_t>(PyLong_AsUnsignedLongLong(given[12]));
    if (PyErr_Occurred()) return nullptr;
    check_between("gate", gate, 0, 2);
    std::array<PyObject*, 8> tensors;
    for (size_t i = 0; i < 7; ++i) tensors[i] = given[4 + i];
    tensors[7] = given[9];  // the final state is the state itself
    TensorViews views;
    cuda::DecodeParams params{};
    if (!views.read(tensors.data(), tensors.size())) Py_RETURN_FALSE;
    const PlainCall call = views.call(static_cast<Gate>(gate), delta != 0, normalize != 0, scale, {});
    Problem& p = params.problem;
    if (!is_plain(call, FAST_DEVICE, p) || p.T > most || !p.state) Py_RETURN_FALSE;
    params.stride = p.HV * p.K * p.V;
    {
      py::gil_scoped_release unlocked;
      cuda::decode(params, reinterpret_cast<void*>(stream));
    }
    Py_RETURN_TRUE;
  });
}

PyMethodDef functions[] = {
    {"try_fast_decode", fast(try_fast_decode), METH_FASTCALL,
     "try_fast_decode(gate: int, delta: bool, normalize: bool, scale: float, q: object, k: object, v: object, "
     "g: object, beta: object, state: object, o: object, most: int, stream: int, /) -> bool"},
    {nullptr, nullptr, 0, nullptr},
};

}  // namespace

void bind_cuda_fast_decode(py::module_& m) {
  if (PyModule_AddFunctions(m.ptr(), functions) != 0) throw py::error_already_set();
}

}  // namespace sleepkern
