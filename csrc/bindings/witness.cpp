#include "bindings/witness.h"

#include "bindings/arguments.h"

namespace py = pybind11;

namespace sleepkern {
namespace {

// The dictionaries of nn.Module that have to be empty: what is in them is called, or is read by nobody here.
constexpr const char* EMPTY[] = {"_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks",
                                 "_buffers"};

py::object borrowed(PyObject* object) { return py::reinterpret_borrow<py::object>(object); }

py::object weak(PyObject* object) {
  PyObject* made = PyWeakref_NewRef(object, nullptr);
  if (!made) throw py::error_already_set();
  return py::reinterpret_steal<py::object>(made);
}

// The object that a weak reference leads to, empty where it is gone.
py::object referent(const py::object& reference) {
#if PY_VERSION_HEX >= 0x030D0000
  PyObject* found = nullptr;
  if (PyWeakref_GetRef(reference.ptr(), &found) < 0) PyErr_Clear();
  return py::reinterpret_steal<py::object>(found);
#else
  PyObject* found = PyWeakref_GetObject(reference.ptr());
  return !found || found == Py_None ? py::object() : borrowed(found);
#endif
}

py::object attributes_of(PyObject* module) {
  PyObject* found = PyObject_GenericGetDict(module, nullptr);
  if (!found) PyErr_Clear();
  return py::reinterpret_steal<py::object>(found);
}

bool is_number_or_text(PyObject* x) {
  return x == Py_None || PyBool_Check(x) || PyLong_CheckExact(x) || PyFloat_CheckExact(x) || PyUnicode_CheckExact(x);
}

// Whether an object can never have another value.
bool is_constant(PyObject* x) {
  if (is_number_or_text(x)) return true;
  if (!PyTuple_CheckExact(x)) return false;
  for (Py_ssize_t i = 0; i < PyTuple_GET_SIZE(x); ++i) {
    if (!is_number_or_text(PyTuple_GET_ITEM(x, i))) return false;
  }
  return true;
}

bool is_named(PyObject* key, const char* name) { return PyUnicode_CompareWithASCIIString(key, name) == 0; }

// What a class means by a name, borrowed; nullptr for nothing.
PyObject* meaning(PyObject* type, PyObject* name) {
  return _PyType_Lookup(reinterpret_cast<PyTypeObject*>(type), name);
}

[[noreturn]] void refuse_to_record(const char* what) { throw py::value_error(std::string("no witness of ") + what); }

}  // namespace

ModuleWitness::ModuleWitness(const py::sequence& blocks, const py::sequence& modules, const py::sequence& weights,
                             const py::sequence& counters, const py::sequence& names) {
  if (weights.size() != counters.size()) refuse_to_record("weights without a counter each");
  for (const py::handle name : names) {
    if (!PyUnicode_CheckExact(name.ptr())) refuse_to_record("a name that is no string");
    names_.push_back(borrowed(name.ptr()));
  }
  for (size_t i = 0; i < weights.size(); ++i) {
    const py::object weight = weights[i];
    Weight one{weight.ptr(), {}, counters[i]};
    if (!read_plain(one.object, one.record)) refuse_to_record("a weight that is not plain");
    if (version_of(one.counter.ptr()) != one.record.version) refuse_to_record("a weight with another's counter");
    weights_.push_back(std::move(one));
  }
  for (const py::handle block : blocks) blocks_.push_back(weak(block.ptr()));
  for (const py::handle module : modules) {
    const py::object contents = attributes_of(module.ptr());
    if (!contents || !PyDict_CheckExact(contents.ptr())) refuse_to_record("an object without a dictionary");
    const size_t type = record_type(Py_TYPE(module.ptr()));
    modules_.push_back({weak(module.ptr()), type, record(contents.ptr(), Role::module)});
  }
}

size_t ModuleWitness::record_type(PyTypeObject* type) {
  PyObject* object = reinterpret_cast<PyObject*>(type);
  for (size_t i = 0; i < types_.size(); ++i) {
    if (types_[i].type.ptr() == object) return i;
  }
  if (Py_TYPE(object) != &PyType_Type) refuse_to_record("a class of another kind");
  Class one{borrowed(object), {}};
  for (const py::object& name : names_) one.meanings.push_back(borrowed(meaning(object, name.ptr())));
  types_.push_back(std::move(one));
  return types_.size() - 1;
}

size_t ModuleWitness::record(PyObject* dictionary, Role role) {
  Dictionary one{borrowed(reinterpret_cast<PyObject*>(Py_TYPE(dictionary))), {}};
  PyObject *key, *value;
  Py_ssize_t position = 0;
  std::vector<std::pair<py::object, py::object>> items;  // a copy, because to record allocates, which may run any code
  while (PyDict_Next(dictionary, &position, &key, &value)) items.emplace_back(borrowed(key), borrowed(value));
  for (const auto& [k, v] : items) one.entries.push_back(entry(k.ptr(), v.ptr(), role));
  dictionaries_.push_back(std::move(one));
  return dictionaries_.size() - 1;
}

ModuleWitness::Entry ModuleWitness::weight(const py::object& name, PyObject* value) const {
  for (size_t i = 0; i < weights_.size(); ++i) {
    if (weights_[i].object == value) return {name, Kind::weight, {}, i};
  }
  refuse_to_record("a parameter that is not among the weights");
}

ModuleWitness::Entry ModuleWitness::entry(PyObject* key, PyObject* value, Role role) {
  if (!PyUnicode_CheckExact(key)) refuse_to_record("a name that is no string");
  const py::object name = borrowed(key);
  if (is_constant(value)) return {name, Kind::same, borrowed(value), 0};
  if (role == Role::parameters) return weight(name, value);
  if (role == Role::parts) return {name, Kind::module, weak(value), 0};
  for (const char* empty : EMPTY) {
    if (!is_named(key, empty)) continue;
    if (!PyDict_Check(value) || PyDict_GET_SIZE(value) != 0) refuse_to_record("a module with hooks or buffers");
    return {name, Kind::empty, borrowed(reinterpret_cast<PyObject*>(Py_TYPE(value))), 0};
  }
  const bool parts = is_named(key, "_modules"), parameters = is_named(key, "_parameters");
  if (!parts && !parameters) return {name, Kind::any, {}, 0};
  if (!PyDict_Check(value)) refuse_to_record("parts that are in no dictionary");
  return {name, Kind::contents, {}, record(value, parts ? Role::parts : Role::parameters)};
}

bool ModuleWitness::matches(const Class& recorded) const {
  if (Py_TYPE(recorded.type.ptr()) != &PyType_Type) return false;
  for (size_t i = 0; i < names_.size(); ++i) {
    if (meaning(recorded.type.ptr(), names_[i].ptr()) != recorded.meanings[i].ptr()) return false;
  }
  return true;
}

// It runs no Python code, so no module changes while it compares. The caller checks the weights.
bool ModuleWitness::matches(const Dictionary& recorded, PyObject* dictionary, std::vector<py::object>& weights) const {
  if (reinterpret_cast<PyObject*>(Py_TYPE(dictionary)) != recorded.type.ptr()) return false;
  if (PyDict_GET_SIZE(dictionary) != static_cast<Py_ssize_t>(recorded.entries.size())) return false;
  PyObject *key, *value;
  Py_ssize_t position = 0;
  for (const Entry& entry : recorded.entries) {
    if (!PyDict_Next(dictionary, &position, &key, &value) || key != entry.key.ptr()) return false;
    switch (entry.kind) {
      case Kind::same:
        if (value != entry.object.ptr()) return false;
        break;
      case Kind::module:
        if (value != referent(entry.object).ptr()) return false;
        break;
      case Kind::weight:
        if (value != weights_[entry.index].object) return false;
        weights[entry.index] = borrowed(value);
        break;
      case Kind::contents:
        if (!matches(dictionaries_[entry.index], value, weights)) return false;
        break;
      case Kind::empty:
        if (reinterpret_cast<PyObject*>(Py_TYPE(value)) != entry.object.ptr() || PyDict_GET_SIZE(value) != 0)
          return false;
        break;
      case Kind::any:
        break;
    }
  }
  return true;
}

bool ModuleWitness::holds(py::handle blocks) const {
  if (!PyList_CheckExact(blocks.ptr()) && !PyTuple_CheckExact(blocks.ptr())) return false;
  if (PySequence_Fast_GET_SIZE(blocks.ptr()) != static_cast<Py_ssize_t>(blocks_.size())) return false;
  for (size_t i = 0; i < blocks_.size(); ++i) {
    if (PySequence_Fast_GET_ITEM(blocks.ptr(), static_cast<Py_ssize_t>(i)) != referent(blocks_[i]).ptr()) return false;
  }
  for (const Class& recorded : types_) {
    if (!matches(recorded)) return false;
  }
  std::vector<py::object> weights(weights_.size());
  for (const Module& recorded : modules_) {
    const py::object module = referent(recorded.reference);
    if (!module || reinterpret_cast<PyObject*>(Py_TYPE(module.ptr())) != types_[recorded.type].type.ptr()) return false;
    const py::object contents = attributes_of(module.ptr());
    if (!contents || !matches(dictionaries_[recorded.contents], contents.ptr(), weights)) return false;
  }
  for (size_t i = 0; i < weights_.size(); ++i) {
    TensorRecord current;
    if (!weights[i] || !read_plain(weights[i].ptr(), current) || !(current == weights_[i].record)) return false;
    if (version_of(weights_[i].counter.ptr()) != current.version) return false;
  }
  return true;
}

void bind_witness(py::module_& m) {
  m.def("use_tensor_attributes", &use_tensor_attributes, py::arg("tensor"), py::arg("parameter"), py::arg("storage"));
  py::class_<ModuleWitness>(m, "ModuleWitness", py::module_local())
      .def(py::init<const py::sequence&, const py::sequence&, const py::sequence&, const py::sequence&,
                    const py::sequence&>(),
           py::arg("blocks"), py::arg("modules"), py::arg("weights"), py::arg("counters"), py::arg("names"))
      .def("holds", &ModuleWitness::holds, py::arg("blocks"));
}

}  // namespace sleepkern
