// Views of torch's tensors by its DLPack exchange table, which costs no call into Python.
#include <cstring>

#include "bindings/fast_path.h"

namespace py = pybind11;

namespace sleepkern {
namespace {

const dlpack::ExchangeApi* exchange_api = nullptr;

}  // namespace

bool use_exchange_api(const py::capsule& capsule) {
  if (!capsule.name() || std::strcmp(capsule.name(), "dlpack_exchange_api") != 0) return false;
  const auto* api = static_cast<const dlpack::ExchangeApi*>(PyCapsule_GetPointer(capsule.ptr(), capsule.name()));
  if (!api || api->major != dlpack::MAJOR || !api->view) return false;
  exchange_api = api;
  return true;
}

bool view_of(PyObject* tensor, dlpack::Tensor& out) {
  if (exchange_api && exchange_api->view(tensor, &out) == 0) return true;
  PyErr_Clear();
  return false;
}

bool TensorViews::read(PyObject* const* given, size_t count, bool outputs) {
  if (!exchange_api) return false;
  for (size_t i = 0; i < count; ++i) {
    if (given[i] == Py_None) continue;
    if (!view_of(given[i], views_[i])) return false;
    found_[i] = &views_[i];
  }
  for (size_t needed : {1, 2, 7}) {  // k, v, final_state
    if (!found_[needed] || found_[needed]->dimensions != 4) return false;
  }
  for (size_t output : {0, 6}) {  // q, o
    if ((found_[output] != nullptr) != outputs || (outputs && found_[output]->dimensions != 4)) return false;
  }
  return true;
}

PlainCall TensorViews::call(Gate gate, bool delta, bool normalize, double scale, PlainGates raw) const {
  raw.A_log = found_[8];
  raw.dt_bias = found_[9];
  return {gate,      delta,     normalize, scale,     found_[0], found_[1], found_[2],
          found_[3], found_[4], found_[5], found_[6], found_[7], raw};
}

PyCFunction fast(FastFunction function) {
  return reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(function));
}

PyObject* wrong_count(const char* name, Py_ssize_t expected, Py_ssize_t got) {
  PyErr_Format(PyExc_TypeError, "%s: got %zd arguments; expected %zd", name, got, expected);
  return nullptr;
}

}  // namespace sleepkern
