// The entry points of the fast path. They take their arguments from CPython directly, because pybind11 would spend more
// time on the arguments than all checks take.
#include <array>
#include <cmath>
#include <cstring>

#include "bindings/fast_path.h"
#include "bindings/named.h"
#include "cpu/runtime/implementation.h"

namespace py = pybind11;

namespace sleepkern {
namespace {

const dlpack::ExchangeApi* exchange_api = nullptr;

// Stores the table of a framework's tensor class; false for a table of another major version.
bool use_exchange_api(const py::capsule& capsule) {
  if (!capsule.name() || std::strcmp(capsule.name(), "dlpack_exchange_api") != 0) return false;
  const auto* api = static_cast<const dlpack::ExchangeApi*>(PyCapsule_GetPointer(capsule.ptr(), capsule.name()));
  if (!api || api->major != dlpack::MAJOR || !api->view) return false;
  exchange_api = api;
  return true;
}

// The class of plain tensors, and the C functions of two of its attributes.
struct TensorClass {
  PyTypeObject* type = nullptr;
  PyGetSetDef* requires_grad = nullptr;
  PyCFunction is_neg = nullptr;

  // The values of the attributes for a tensor of exactly this class. An exception counts as true.
  bool needs_grad(PyObject* t) const { return !is_false(requires_grad->get(t, requires_grad->closure)); }
  bool negative(PyObject* t) const { return !is_false(is_neg(t, nullptr)); }

 private:
  static bool is_false(PyObject* answer) {
    if (!answer) PyErr_Clear();
    Py_XDECREF(answer);
    return answer == Py_False;
  }
};

TensorClass tensors;

// Stores the class of plain tensors; false if its attributes do not have the kinds of torch's.
bool use_tensor_class(const py::type& type) {
  const py::object grad = py::getattr(type, "requires_grad", py::none());
  const py::object neg = py::getattr(type, "is_neg", py::none());
  if (Py_TYPE(grad.ptr()) != &PyGetSetDescr_Type || Py_TYPE(neg.ptr()) != &PyMethodDescr_Type) return false;
  PyGetSetDef* get = reinterpret_cast<PyGetSetDescrObject*>(grad.ptr())->d_getset;
  const PyMethodDef* method = reinterpret_cast<PyMethodDescrObject*>(neg.ptr())->d_method;
  if (!get->get || method->ml_flags != METH_NOARGS) return false;
  for (const py::object& t : {grad, neg, py::object(type)}) t.inc_ref();  // for good
  tensors = {reinterpret_cast<PyTypeObject*>(type.ptr()), get, method->ml_meth};
  return true;
}

PyObject* wrong_count(const char* name, Py_ssize_t expected, Py_ssize_t got) {
  PyErr_Format(PyExc_TypeError, "%s: got %zd arguments; expected %zd", name, got, expected);
  return nullptr;
}

// ordinary(grad, q, k, v, g, beta, state): whether these are plain tensors whose memory does not hold the negatives of
// their values, and of which none needs a gradient if `grad`. All but q, k and v may be None.
PyObject* ordinary(PyObject*, PyObject* const* given, Py_ssize_t count) {
  if (count != 7) return wrong_count("ordinary", 7, count);
  if (!tensors.type) Py_RETURN_FALSE;
  for (Py_ssize_t i = 1; i < count; ++i) {
    if (given[i] == Py_None && i > 3) continue;
    if (Py_TYPE(given[i]) != tensors.type) Py_RETURN_FALSE;
  }
  for (Py_ssize_t i = 1; i < count; ++i) {
    if (given[i] == Py_None) continue;
    if (given[0] != Py_False && tensors.needs_grad(given[i])) Py_RETURN_FALSE;
    if (tensors.negative(given[i])) Py_RETURN_FALSE;
  }
  Py_RETURN_TRUE;
}

// Runs the call and returns true if it is plain.
bool run(Gate gate, bool delta, bool normalize, double scale, PyObject* const* given) {
  if (!exchange_api) return false;
  std::array<dlpack::Tensor, 8> views;
  std::array<const dlpack::Tensor*, 8> found{};
  for (size_t i = 0; i < views.size(); ++i) {
    if (given[i] == Py_None) continue;
    if (exchange_api->view(given[i], &views[i]) != 0) {
      PyErr_Clear();
      return false;
    }
    found[i] = &views[i];
  }
  for (size_t needed : {0, 1, 2, 6, 7}) {  // q, k, v, o, final_state
    if (!found[needed] || found[needed]->dimensions != 4) return false;
  }
  Problem problem{};
  const PlainCall call{gate,     delta,    normalize, scale,    found[0], found[1],
                       found[2], found[3], found[4],  found[5], found[6], found[7]};
  if (!is_plain(call, problem)) return false;
  py::gil_scoped_release unlocked;
  forward(problem);
  return true;
}

// try_fast_path(gate, delta, normalize, scale, q, k, v, g, beta, state, o, final_state): runs the call and returns true
// if it is plain.
PyObject* try_fast_path(PyObject*, PyObject* const* given, Py_ssize_t count) {
  if (count != 12) return wrong_count("try_fast_path", 12, count);
  return guarded([&]() -> PyObject* {
    const long gate = PyLong_AsLong(given[0]);
    const int delta = PyObject_IsTrue(given[1]), normalize = PyObject_IsTrue(given[2]);
    const double scale = PyFloat_AsDouble(given[3]);
    if (PyErr_Occurred()) return nullptr;
    check_between("gate", gate, 0, 2);
    return PyBool_FromLong(run(static_cast<Gate>(gate), delta != 0, normalize != 0, scale, given + 4));
  });
}

PyCFunction fast(PyObject* (*function)(PyObject*, PyObject* const*, Py_ssize_t)) {
  return reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(function));
}

constexpr const char* ORDINARY =
    "ordinary(grad: bool, q: object, k: object, v: object, g: object, beta: object, state: object, /) -> bool";
constexpr const char* TRY_FAST_PATH =
    "try_fast_path(gate: int, delta: bool, normalize: bool, scale: float, q: object, k: object, v: object, g: object, "
    "beta: object, state: object, o: object, final_state: object, /) -> bool";

PyMethodDef functions[] = {
    {"ordinary", fast(ordinary), METH_FASTCALL, ORDINARY},
    {"try_fast_path", fast(try_fast_path), METH_FASTCALL, TRY_FAST_PATH},
    {nullptr, nullptr, 0, nullptr},
};

}  // namespace

void bind_fast_path(py::module_& m) {
  m.def("use_exchange_api", &use_exchange_api, py::arg("capsule"));
  m.def("use_tensor_class", &use_tensor_class, py::arg("type"));
  if (PyModule_AddFunctions(m.ptr(), functions) != 0) throw py::error_already_set();
}

}  // namespace sleepkern
