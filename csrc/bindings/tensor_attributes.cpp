#include "bindings/tensor_attributes.h"

#include <algorithm>

#include "bindings/fast_path.h"

namespace py = pybind11;

namespace sleepkern {
namespace {

struct Attributes {
  PyTypeObject *tensor = nullptr, *parameter = nullptr;
  PyGetSetDef *version = nullptr, *hooks = nullptr, *storage_number = nullptr;
  PyCFunction negative = nullptr, storage = nullptr;
};

Attributes known;

PyGetSetDef* getter(const py::type& type, const char* name) {
  const py::object found = py::getattr(type, name, py::none());
  if (Py_TYPE(found.ptr()) != &PyGetSetDescr_Type) return nullptr;
  found.inc_ref();  // for good
  PyGetSetDef* get = reinterpret_cast<PyGetSetDescrObject*>(found.ptr())->d_getset;
  return get->get ? get : nullptr;
}

PyCFunction method(const py::type& type, const char* name) {
  const py::object found = py::getattr(type, name, py::none());
  if (Py_TYPE(found.ptr()) != &PyMethodDescr_Type) return nullptr;
  found.inc_ref();
  const PyMethodDef* def = reinterpret_cast<PyMethodDescrObject*>(found.ptr())->d_method;
  return def->ml_flags == METH_NOARGS ? def->ml_meth : nullptr;
}

py::object got(PyGetSetDef* get, PyObject* from) {
  return py::reinterpret_steal<py::object>(get->get(from, get->closure));
}

// Whether a method's answer is False. An exception is another answer.
bool says_no(PyCFunction method, PyObject* of) {
  PyObject* answer = method(of, nullptr);
  if (!answer) PyErr_Clear();
  Py_XDECREF(answer);
  return answer == Py_False;
}

// The integer of an object, -1 for another object.
int64_t integer(const py::object& found) {
  if (!found || !PyLong_CheckExact(found.ptr())) {
    PyErr_Clear();
    return -1;
  }
  return PyLong_AsLongLong(found.ptr());
}

bool without_hooks(PyObject* tensor) {
  const py::object hooks = got(known.hooks, tensor);
  if (!hooks) PyErr_Clear();
  return hooks && (hooks.is_none() || (PyDict_Check(hooks.ptr()) && PyDict_Size(hooks.ptr()) == 0));
}

uintptr_t storage_of(PyObject* tensor) {
  const auto storage = py::reinterpret_steal<py::object>(known.storage(tensor, nullptr));
  if (!storage) {
    PyErr_Clear();
    return 0;
  }
  const py::object number = got(known.storage_number, storage.ptr());
  if (!number || !PyLong_CheckExact(number.ptr())) {
    PyErr_Clear();
    return 0;
  }
  return static_cast<uintptr_t>(PyLong_AsUnsignedLongLongMask(number.ptr()));
}

}  // namespace

bool use_tensor_attributes(const py::type& tensor, const py::type& parameter, const py::type& storage) {
  const Attributes found{reinterpret_cast<PyTypeObject*>(tensor.ptr()),
                         reinterpret_cast<PyTypeObject*>(parameter.ptr()),
                         getter(tensor, "_version"),
                         getter(tensor, "_backward_hooks"),
                         getter(storage, "_cdata"),
                         method(tensor, "is_neg"),
                         method(tensor, "untyped_storage")};
  if (!found.version || !found.hooks || !found.storage_number || !found.negative || !found.storage) return false;
  for (const py::type& type : {tensor, parameter, storage}) type.inc_ref();
  known = found;
  return true;
}

bool TensorRecord::operator==(const TensorRecord& other) const {
  return address == other.address && device.type == other.device.type && device.id == other.device.id &&
         type.code == other.type.code && type.bits == other.type.bits && type.lanes == other.type.lanes &&
         dimensions == other.dimensions && shape == other.shape && strides == other.strides &&
         version == other.version && storage == other.storage;
}

// A tensor made in inference mode has no count, and torch raises an error.
int64_t version_of(PyObject* tensor) {
  if (!known.tensor || (Py_TYPE(tensor) != known.tensor && Py_TYPE(tensor) != known.parameter)) return -1;
  return integer(got(known.version, tensor));
}

bool read_plain(PyObject* tensor, TensorRecord& out) {
  out.version = version_of(tensor);
  dlpack::Tensor view;
  if (out.version < 0 || !view_of(tensor, view)) return false;
  if (view.dimensions > static_cast<int32_t>(out.shape.size())) return false;
  if (!says_no(known.negative, tensor) || !without_hooks(tensor)) return false;
  out.address = static_cast<const char*>(view.data) + view.offset;
  out.device = view.device;
  out.type = view.type;
  out.dimensions = view.dimensions;
  out.shape.fill(0);
  out.strides.fill(0);
  std::copy_n(view.shape, view.dimensions, out.shape.begin());
  std::copy_n(view.strides, view.dimensions, out.strides.begin());
  out.storage = storage_of(tensor);
  return out.storage != 0;
}

}  // namespace sleepkern
