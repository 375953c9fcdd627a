// The part of DLPack 1.x (dmlc/dlpack, dlpack.h) that this module uses: the layout of a tensor, and the table of
// functions by which a framework exports its tensors without a copy and without a call into Python.
#pragma once

#include <cstdint>

namespace dlpack {

constexpr int32_t CPU = 1, CUDA = 2;
constexpr uint8_t FLOAT = 2, BFLOAT = 4;
constexpr uint32_t MAJOR = 1;

struct Device {
  int32_t type, id;
};

struct DataType {
  uint8_t code, bits;
  uint16_t lanes;
};

struct Tensor {
  void* data;
  Device device;
  int32_t dimensions;
  DataType type;
  int64_t *shape, *strides;
  uint64_t offset;  // bytes from data
};

struct ExchangeApi {
  uint32_t major, minor;
  ExchangeApi* previous;
  void *allocate, *export_owned, *import_owned;
  // Fills a view that is valid as long as the tensor is. Returns 0, or -1 with a Python exception.
  int (*view)(void* py_tensor, Tensor* out);
  void* current_stream;
};

}  // namespace dlpack
