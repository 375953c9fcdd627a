// A witness that a stack of modules is as it was: sleepkern/backends/native/witness.py says what follows from that.
#pragma once

#include <pybind11/pybind11.h>

#include <vector>

#include "bindings/tensor_attributes.h"

namespace sleepkern {

// It keeps no module and no weight alive. A module is known by a weak reference. A weight is known by its address as an
// object together with its TensorRecord, and by a counter: an alias without memory that shares the count of writes with
// the tensor of the recording. The caller keeps a weak reference to each storage. Numbers, strings, classes and what a
// name means in a class are kept alive, so that no other object gets their addresses.
class ModuleWitness {
 public:
  // blocks: the modules that `holds` is given; modules: all that are in them; weights: all their parameters, and
  // counters: the alias of each; names: what a class has to mean by each is recorded.
  // Throws py::value_error for modules that it cannot bear witness to.
  ModuleWitness(const pybind11::sequence& blocks, const pybind11::sequence& modules, const pybind11::sequence& weights,
                const pybind11::sequence& counters, const pybind11::sequence& names);

  // Whether these are the blocks of the recording, and nothing about them has changed that the recording has.
  bool holds(pybind11::handle blocks) const;

 private:
  enum class Kind {
    same,      // the value is this object
    module,    // the value is the referent of this weak reference
    weight,    // the value is the weight of this index
    contents,  // the value is a dictionary that is recorded too
    empty,     // the value is a dictionary without entries
    any,       // the value says nothing about what the module does
  };
  struct Entry {
    pybind11::object key;
    Kind kind;
    pybind11::object object;
    size_t index;
  };
  struct Dictionary {
    pybind11::object type;
    std::vector<Entry> entries;
  };
  struct Class {
    pybind11::object type;
    std::vector<pybind11::object> meanings;
  };
  struct Module {
    pybind11::object reference;
    size_t type, contents;
  };
  struct Weight {
    PyObject* object;
    TensorRecord record;
    pybind11::object counter;
  };

  size_t record_type(PyTypeObject* type);
  enum class Role { module, parts, parameters };  // whose dictionary it is
  size_t record(PyObject* dictionary, Role role);
  Entry entry(PyObject* key, PyObject* value, Role role);
  Entry weight(const pybind11::object& name, PyObject* value) const;
  bool matches(const Dictionary& recorded, PyObject* dictionary, std::vector<pybind11::object>& weights) const;
  bool matches(const Class& recorded) const;

  std::vector<pybind11::object> blocks_, names_;
  std::vector<Dictionary> dictionaries_;
  std::vector<Class> types_;
  std::vector<Module> modules_;
  std::vector<Weight> weights_;
};

}  // namespace sleepkern
