// Attributes of torch's tensors by the C functions of the class, which costs no look-up and which Python cannot
// replace.
#pragma once

#include <pybind11/pybind11.h>

#include <array>
#include <cstdint>

#include "bindings/dlpack.h"

namespace sleepkern {

// What says that a tensor has the values that it had: where they are stored and how, and the writes that torch counted.
struct TensorRecord {
  const void* address;
  dlpack::Device device;
  dlpack::DataType type;
  int dimensions;
  std::array<int64_t, 3> shape, strides;
  int64_t version;
  uintptr_t storage;  // the number of its storage, which no other storage has while somebody holds it weakly

  bool operator==(const TensorRecord& other) const;
};

// Stores the classes and the C functions of their attributes; false if the attributes do not have the kinds of torch's.
bool use_tensor_attributes(const pybind11::type& tensor, const pybind11::type& parameter,
                           const pybind11::type& storage);

// Reads a tensor that is plain: of the class of tensors or of parameters, of at most 3 dimensions, not made in
// inference mode, without hooks, and with its values themselves in memory. Returns false for any other object.
bool read_plain(PyObject* tensor, TensorRecord& out);

// The writes to a tensor that torch counted; -1 for another object.
int64_t version_of(PyObject* tensor);

}  // namespace sleepkern
