// The entry points of the fast path. They take their arguments from CPython directly, because pybind11 would spend more
// time on the arguments than all checks take.
#include "bindings/fast_path.h"
#include "bindings/named.h"
#include "cpu/runtime/implementation.h"

namespace py = pybind11;

namespace sleepkern {
namespace {

// The class of plain tensors, that of parameters, and the C functions of two attributes of both.
struct TensorClass {
  PyTypeObject* type = nullptr;
  PyTypeObject* parameter = nullptr;
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

// Stores the classes of plain tensors and of parameters; false if their attributes do not have the kinds of torch's.
bool use_tensor_class(const py::type& type, const py::type& parameter) {
  const py::object grad = py::getattr(type, "requires_grad", py::none());
  const py::object neg = py::getattr(type, "is_neg", py::none());
  if (Py_TYPE(grad.ptr()) != &PyGetSetDescr_Type || Py_TYPE(neg.ptr()) != &PyMethodDescr_Type) return false;
  PyGetSetDef* get = reinterpret_cast<PyGetSetDescrObject*>(grad.ptr())->d_getset;
  const PyMethodDef* method = reinterpret_cast<PyMethodDescrObject*>(neg.ptr())->d_method;
  if (!get->get || method->ml_flags != METH_NOARGS) return false;
  for (const py::object& t : {grad, neg, py::object(type), py::object(parameter)}) t.inc_ref();  // for good
  tensors = {reinterpret_cast<PyTypeObject*>(type.ptr()), reinterpret_cast<PyTypeObject*>(parameter.ptr()), get,
             method->ml_meth};
  return true;
}

// ordinary(grad, q, k, v, g, beta, state, A_log, dt_bias): whether these are plain tensors whose memory does not hold
// the negatives of their values, and of which none needs a gradient if `grad`. All but q, k and v may be None, and the
// last two may be parameters or left out.
PyObject* ordinary(PyObject*, PyObject* const* given, Py_ssize_t count) {
  if (count != 7 && count != 9) return wrong_count("ordinary", 9, count);
  if (!tensors.type) Py_RETURN_FALSE;
  for (Py_ssize_t i = 1; i < count; ++i) {
    if (given[i] == Py_None && i > 3) continue;
    if (Py_TYPE(given[i]) == tensors.type) continue;
    if (i < 7 || Py_TYPE(given[i]) != tensors.parameter) Py_RETURN_FALSE;
  }
  for (Py_ssize_t i = 1; i < count; ++i) {
    if (given[i] == Py_None) continue;
    if (given[0] != Py_False && tensors.needs_grad(given[i])) Py_RETURN_FALSE;
    if (tensors.negative(given[i])) Py_RETURN_FALSE;
  }
  Py_RETURN_TRUE;
}

// Runs the call and returns true if it is plain.
bool run(Gate gate, bool delta, bool normalize, double scale, PyObject* const* given, size_t count, PlainGates raw) {
  TensorViews views;
  Problem problem{};
  if (!views.read(given, count)) return false;
  Type type = Type::float32;
  if (!is_plain(views.call(gate, delta, normalize, scale, raw), dlpack::CPU, problem, &type)) return false;
  if (type == Type::bfloat16 && problem.T > DECODE_LIMIT) return false;
  py::gil_scoped_release unlocked;
  if (type == Type::bfloat16) {
    const int64_t size = problem.K * problem.V;
    const StateRows rows{problem.final_state, problem.HV * size, size, problem.sequences, nullptr};
    decode(problem, {rows, rows, type, false});
  } else {
    forward(problem);
  }
  return true;
}

// try_fast_path(gate, delta, normalize, scale, q, k, v, g, beta, state, o, final_state, A_log, dt_bias, raw_decay,
// lower_bound, beta_scale): runs the call and returns true if it is plain. The last five say which gates are raw, and
// may be left out.
PyObject* try_fast_path(PyObject*, PyObject* const* given, Py_ssize_t count) {
  if (count != 12 && count != 17) return wrong_count("try_fast_path", 17, count);
  return guarded([&]() -> PyObject* {
    const long gate = PyLong_AsLong(given[0]);
    const int delta = PyObject_IsTrue(given[1]), normalize = PyObject_IsTrue(given[2]);
    const double scale = PyFloat_AsDouble(given[3]);
    PlainGates raw{};
    if (count == 17) {
      raw.raw_decay = PyObject_IsTrue(given[14]) != 0;
      raw.lower_bound = PyFloat_AsDouble(given[15]);
      raw.beta_scale = PyFloat_AsDouble(given[16]);
    }
    if (PyErr_Occurred()) return nullptr;
    check_between("gate", gate, 0, 2);
    const size_t views = count == 17 ? 10 : 8;
    return PyBool_FromLong(run(static_cast<Gate>(gate), delta != 0, normalize != 0, scale, given + 4, views, raw));
  });
}

constexpr const char* ORDINARY =
    "ordinary(grad: bool, q: object, k: object, v: object, g: object, beta: object, state: object, "
    "A_log: object, dt_bias: object, /) -> bool";
constexpr const char* TRY_FAST_PATH =
    "try_fast_path(gate: int, delta: bool, normalize: bool, scale: float, q: object, k: object, v: object, g: object, "
    "beta: object, state: object, o: object, final_state: object, A_log: object, dt_bias: object, raw_decay: bool, "
    "lower_bound: float, beta_scale: float, /) -> bool";

PyMethodDef functions[] = {
    {"ordinary", fast(ordinary), METH_FASTCALL, ORDINARY},
    {"try_fast_path", fast(try_fast_path), METH_FASTCALL, TRY_FAST_PATH},
    {nullptr, nullptr, 0, nullptr},
};

}  // namespace

void bind_fast_path(py::module_& m) {
  m.def("use_exchange_api", &use_exchange_api, py::arg("capsule"));
  m.def("use_tensor_class", &use_tensor_class, py::arg("type"), py::arg("parameter"));
  if (PyModule_AddFunctions(m.ptr(), functions) != 0) throw py::error_already_set();
}

}  // namespace sleepkern
