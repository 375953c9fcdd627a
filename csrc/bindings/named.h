// Functions that take keywords only, each a field of one struct. So no two addresses can be swapped by mistake.
//
// CPython passes names and values as two arrays. pybind11 would copy them into a dict and make a string of each name,
// which takes some microseconds for the 19 arguments of `forward`. Positional arguments would be 0.2 us faster.
#pragma once

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstdint>
#include <exception>
#include <new>
#include <string>
#include <tuple>
#include <type_traits>
#include <vector>

#include "bindings/arguments.h"
#include "bindings/checks.h"
#include "common/decode.h"

namespace sleepkern {

using TypedAddress = std::tuple<uintptr_t, int>;
using StatesView = std::tuple<uintptr_t, int64_t, int64_t, int64_t, uintptr_t>;

// One value of a call. Reading it as a wrong type raises an error with its name.
class Argument {
 public:
  Argument(const char* name, PyObject* value) : name_(name), value_(value) {}

  template <class T>
  void read(T& field) const {
    if constexpr (std::is_pointer_v<T>) {
      field = reinterpret_cast<T>(as<uintptr_t>());
    } else {
      field = as<T>();
    }
  }
  void read(Rows& field) const { field = rows(name_, as<View>()); }
  void read(Array& field) const {
    const auto& [address, type] = as<TypedAddress>();
    field = {reinterpret_cast<const void*>(address), check_type(name_, type)};
  }
  void read(StateRows& field) const {
    const auto& [address, stride, head_stride, rows, indices] = as<StatesView>();
    field = {reinterpret_cast<void*>(address), stride, head_stride, rows, reinterpret_cast<const int64_t*>(indices)};
  }
  void read(Type& field) const { field = check_type(name_, as<int>()); }
  void read(Gate& field) const { field = check_gate(as<int>()); }

 private:
  template <class T>
  T as() const {
    pybind11::detail::make_caster<T> caster;
    if (!caster.load(value_, true)) {
      throw pybind11::type_error(std::string(name_) + ": got " + Py_TYPE(value_)->tp_name + "; expected " +
                                 type_name<T>());
    }
    return pybind11::detail::cast_op<T>(std::move(caster));
  }

 public:
  // The type of a field as a Python annotation.
  template <class T>
  static std::string type_name() {
    if constexpr (std::is_same_v<T, bool>) return "bool";
    if constexpr (std::is_floating_point_v<T>) return "float";
    if constexpr (std::is_same_v<T, Rows> || std::is_same_v<T, View>) return "tuple[int, int, int]";
    if constexpr (std::is_same_v<T, StateRows> || std::is_same_v<T, StatesView>)
      return "tuple[int, int, int, int, int]";
    if constexpr (std::is_same_v<T, Array> || std::is_same_v<T, TypedAddress>) return "tuple[int, int]";
    constexpr bool is_code = std::is_same_v<T, Gate> || std::is_same_v<T, Type>;
    if constexpr (std::is_integral_v<T> || std::is_pointer_v<T> || is_code) return "int";
    return "object";
  }

 private:
  const char* name_;
  PyObject* value_;
};

template <class Call>
struct Field {
  const char* name;
  void (*set)(Call&, const Argument&);
  std::string type;
  PyObject* key;  // the name as Python's interned string
};

template <class Call, auto member>
Field<Call> field(const char* name) {
  using T = std::decay_t<decltype(std::declval<Call&>().*member)>;
  PyObject* key = PyUnicode_InternFromString(name);
  if (!key) throw pybind11::error_already_set();
  return {name, [](Call& call, const Argument& value) { value.read(call.*member); }, Argument::type_name<T>(), key};
}

// The result of `body`, or nullptr with a Python exception set for the C++ exception that it throws.
template <class Body>
PyObject* guarded(const Body& body) {
  try {
    return body();
  } catch (pybind11::error_already_set& error) {
    error.restore();
  } catch (const pybind11::builtin_exception& error) {
    error.set_error();
  } catch (const std::bad_alloc&) {
    PyErr_NoMemory();
  } catch (const std::exception& error) {
    PyErr_SetString(PyExc_RuntimeError, error.what());
  }
  return nullptr;
}

// A Python function that fills a Call from its keywords and runs it.
template <class Call, void (*run)(Call&)>
class NamedFunction {
 public:
  static void bind(pybind11::module_& m, const char* name, std::vector<Field<Call>> fields) {
    name_ = name;
    fields_ = std::move(fields);
    signature_ = std::string(name) + "(";
    for (const Field<Call>& one : fields_) {
      signature_ += (&one == fields_.data() ? "*, " : ", ") + std::string(one.name) + ": " + one.type;
    }
    signature_ += ") -> None";
    static PyMethodDef functions[2] = {};
    const auto function = reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(&call));
    functions[0] = {name, function, METH_FASTCALL | METH_KEYWORDS, signature_.c_str()};
    if (PyModule_AddFunctions(m.ptr(), functions) != 0) throw pybind11::error_already_set();
  }

 private:
  static PyObject* call(PyObject*, PyObject* const* values, Py_ssize_t positional, PyObject* names) {
    return guarded([&] {
      const size_t count = names ? static_cast<size_t>(PyTuple_GET_SIZE(names)) : 0;
      if (positional) throw pybind11::type_error(std::string(name_) + ": takes keywords only");
      Call filled{};
      for (size_t i = 0; i < count; ++i) {
        const Field<Call>& one = find(PyTuple_GET_ITEM(names, static_cast<Py_ssize_t>(i)), i);
        one.set(filled, Argument(one.name, values[i]));
      }
      if (count != fields_.size()) throw pybind11::type_error(std::string(name_) + ": no argument " + missing(names));
      run(filled);
      Py_RETURN_NONE;
    });
  }

  // Most calls name the fields in their order.
  static const Field<Call>& find(PyObject* key, size_t guess) {
    if (guess < fields_.size() && fields_[guess].key == key) return fields_[guess];
    for (const Field<Call>& one : fields_) {
      if (one.key == key || PyUnicode_Compare(one.key, key) == 0) return one;
    }
    throw pybind11::type_error(std::string(name_) + ": got the unknown argument '" + PyUnicode_AsUTF8(key) + "'");
  }

  static std::string missing(PyObject* names) {
    for (const Field<Call>& one : fields_) {
      if (!names || PySequence_Contains(names, one.key) != 1) return "'" + std::string(one.name) + "'";
    }
    return "";
  }

  inline static const char* name_;
  inline static std::vector<Field<Call>> fields_;
  inline static std::string signature_;
};

template <class T>
void append(std::vector<T>& fields, const std::vector<T>& more) {
  fields.insert(fields.end(), more.begin(), more.end());
}

}  // namespace sleepkern
