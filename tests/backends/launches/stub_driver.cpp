// libcuda without a GPU, for tests: it answers the driver calls that Triton makes for one device of compute capability
// 9.0, counts each of them, and keeps the grid, the block, the shared memory and the arguments of each launch.
//
// The sizes of a kernel's parameters come from its machine code, where ptxas writes them (EIATTR_KPARAM_INFO).
#include <cuda.h>

#include <atomic>
#include <cstdint>
#include <cstring>
#include <map>
#include <mutex>
#include <string>
#include <vector>

namespace {

struct Parameter {
  uint16_t offset;
  uint16_t bytes;
};
struct Function {
  std::string name;
  std::vector<Parameter> parameters;
};
struct Launch {
  const Function* function;
  unsigned grid[3], block[3], shared;
  void* stream;
  std::vector<unsigned char> arguments;
};

std::mutex mutex;
std::map<std::string, std::atomic<long>> counts;
std::vector<Launch> launches;
std::atomic<bool> keeps{false};
CUcontext current = nullptr;

std::atomic<long>& counter(const char* name) {
  const std::lock_guard<std::mutex> lock(mutex);
  return counts[name];
}

// The parameters of a kernel in a cubin, an ELF file: the section .nv.info.KERNEL has one record for each, with the tag
// 0x17 and the words (index, ordinal | offset << 16, flags | bytes << 18).
std::vector<Parameter> parameters_of(const unsigned char* image, const std::string& kernel) {
  const auto read = [&](uint64_t at, int bytes) {
    uint64_t x = 0;
    std::memcpy(&x, image + at, bytes);
    return x;
  };
  std::vector<Parameter> found;
  const uint64_t sections = read(0x28, 8), size = read(0x3a, 2), number = read(0x3c, 2), names = read(0x3e, 2);
  const uint64_t text = read(sections + names * size + 0x18, 8);
  for (uint64_t s = 0; s < number; ++s) {
    const uint64_t header = sections + s * size;
    if (".nv.info." + kernel != reinterpret_cast<const char*>(image + text + read(header, 4))) continue;
    const uint64_t begin = read(header + 0x18, 8), end = begin + read(header + 0x20, 8);
    for (uint64_t at = begin; at < end;) {
      const uint64_t format = read(at, 1), tag = read(at + 1, 1), bytes = read(at + 2, 2);
      if (tag == 0x17) {
        const uint64_t place = read(at + 8, 4), kind = read(at + 12, 4);
        if (found.size() <= (place & 0xffff)) found.resize((place & 0xffff) + 1);
        found[place & 0xffff] = {static_cast<uint16_t>(place >> 16), static_cast<uint16_t>(kind >> 18)};
      }
      at += format == 4 ? 4 + bytes : 4;
    }
  }
  return found;
}

CUresult launched(const Function* f, const unsigned (&grid)[3], const unsigned (&block)[3], unsigned shared,
                  void* stream, void** parameters) {
  if (!keeps) return CUDA_SUCCESS;
  Launch one{f, {grid[0], grid[1], grid[2]}, {block[0], block[1], block[2]}, shared, stream, {}};
  for (size_t i = 0; i < f->parameters.size(); ++i) {
    const Parameter& p = f->parameters[i];
    if (one.arguments.size() < p.offset + size_t(p.bytes)) one.arguments.resize(p.offset + p.bytes);
    std::memcpy(one.arguments.data() + p.offset, parameters[i], p.bytes);
  }
  const std::lock_guard<std::mutex> lock(mutex);
  launches.push_back(one);
  return CUDA_SUCCESS;
}

}  // namespace

extern "C" {

// What a test reads.
void stub_reset(bool keep_launches) {
  const std::lock_guard<std::mutex> lock(mutex);
  for (auto& [name, number] : counts) number = 0;
  launches.clear();
  keeps = keep_launches;
}
// "name number" of each driver call, one a line.
const char* stub_counts() {
  static std::string text;
  const std::lock_guard<std::mutex> lock(mutex);
  text.clear();
  for (const auto& [name, number] : counts)
    if (number > 0) text += name + " " + std::to_string(number) + "\n";
  return text.c_str();
}
int stub_launches() { return static_cast<int>(launches.size()); }
const char* stub_kernel(int i) { return launches.at(i).function->name.c_str(); }
// grid, block, bytes of shared memory, stream, number of parameters, and the function, which is another one for each
// compiled kernel.
void stub_shape(int i, uint64_t* into) {
  const Launch& one = launches.at(i);
  for (int axis = 0; axis < 3; ++axis) into[axis] = one.grid[axis], into[3 + axis] = one.block[axis];
  into[6] = one.shared;
  into[7] = reinterpret_cast<uint64_t>(one.stream);
  into[8] = one.function->parameters.size();
  into[9] = reinterpret_cast<uint64_t>(one.function);
}
// The bytes of a parameter; its value goes into `into`, of which 8 bytes are taken.
int stub_parameter(int i, int parameter, unsigned char* into) {
  const Parameter& p = launches.at(i).function->parameters.at(parameter);
  std::memcpy(into, launches.at(i).arguments.data() + p.offset, p.bytes < 8 ? p.bytes : 8);
  return p.bytes;
}

// What Triton calls.
#define COUNTED                                                  \
  static std::atomic<long>& number_of_calls = counter(__func__); \
  ++number_of_calls
CUresult cuInit(unsigned) {
  COUNTED;
  return CUDA_SUCCESS;
}
CUresult cuDriverGetVersion(int* version) {
  COUNTED;
  return *version = 13000, CUDA_SUCCESS;
}
CUresult cuGetErrorString(CUresult, const char** text) {
  COUNTED;
  return *text = "an error of the stub", CUDA_SUCCESS;
}
CUresult cuDeviceGetCount(int* n) {
  COUNTED;
  return *n = 1, CUDA_SUCCESS;
}
CUresult cuDeviceGet(CUdevice* device, int index) {
  COUNTED;
  return *device = index, CUDA_SUCCESS;
}
CUresult cuDeviceGetAttribute(int* value, CUdevice_attribute which, CUdevice) {
  COUNTED;
  switch (which) {
    case CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR:
      *value = 9;
      break;
    case CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR:
      *value = 0;
      break;
    case CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT:
      *value = 132;
      break;
    case CU_DEVICE_ATTRIBUTE_WARP_SIZE:
      *value = 32;
      break;
    case CU_DEVICE_ATTRIBUTE_MAX_REGISTERS_PER_BLOCK:
      *value = 65536;
      break;
    case CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN:
      *value = 232448;
      break;
    case CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_MULTIPROCESSOR:
      *value = 233472;
      break;
    default:
      *value = 0;
  }
  return CUDA_SUCCESS;
}
CUresult cuDevicePrimaryCtxRetain(CUcontext* context, CUdevice) {
  COUNTED;
  return *context = reinterpret_cast<CUcontext>(0x1000), CUDA_SUCCESS;
}
CUresult cuCtxGetCurrent(CUcontext* context) {
  COUNTED;
  return *context = current, CUDA_SUCCESS;
}
CUresult cuCtxSetCurrent(CUcontext context) {
  COUNTED;
  return current = context, CUDA_SUCCESS;
}
CUresult cuCtxGetDevice(CUdevice* device) {
  COUNTED;
  return *device = 0, CUDA_SUCCESS;
}
CUresult cuCtxGetLimit(size_t* value, CUlimit) {
  COUNTED;
  return *value = 0, CUDA_SUCCESS;
}
CUresult cuCtxSetLimit(CUlimit, size_t) {
  COUNTED;
  return CUDA_SUCCESS;
}
CUresult cuCtxSynchronize(void) {
  COUNTED;
  return CUDA_SUCCESS;
}
CUresult cuStreamSynchronize(CUstream) {
  COUNTED;
  return CUDA_SUCCESS;
}
CUresult cuStreamIsCapturing(CUstream, CUstreamCaptureStatus* status) {
  COUNTED;
  return *status = CU_STREAM_CAPTURE_STATUS_NONE, CUDA_SUCCESS;
}
CUresult cuModuleLoadData(CUmodule* module, const void* image) {
  COUNTED;
  return *module = reinterpret_cast<CUmodule>(const_cast<void*>(image)), CUDA_SUCCESS;
}
CUresult cuModuleUnload(CUmodule) {
  COUNTED;
  return CUDA_SUCCESS;
}
CUresult cuModuleGetFunction(CUfunction* function, CUmodule module, const char* name) {
  COUNTED;
  *function = reinterpret_cast<CUfunction>(
      new Function{name, parameters_of(reinterpret_cast<const unsigned char*>(module), name)});
  return CUDA_SUCCESS;
}
CUresult cuFuncGetAttribute(int* value, CUfunction_attribute which, CUfunction) {
  COUNTED;
  return *value = which == CU_FUNC_ATTRIBUTE_MAX_THREADS_PER_BLOCK ? 1024 : 0, CUDA_SUCCESS;
}
CUresult cuFuncSetAttribute(CUfunction, CUfunction_attribute, int) {
  COUNTED;
  return CUDA_SUCCESS;
}
CUresult cuFuncSetCacheConfig(CUfunction, CUfunc_cache) {
  COUNTED;
  return CUDA_SUCCESS;
}
CUresult cuOccupancyMaxActiveClusters(int* n, CUfunction, const CUlaunchConfig*) {
  COUNTED;
  return *n = 1, CUDA_SUCCESS;
}
CUresult cuPointerGetAttribute(void* value, CUpointer_attribute, CUdeviceptr pointer) {
  COUNTED;
  return std::memcpy(value, &pointer, sizeof pointer), CUDA_SUCCESS;
}
CUresult cuLaunchKernelEx(const CUlaunchConfig* c, CUfunction f, void** parameters, void**) {
  COUNTED;
  return launched(reinterpret_cast<const Function*>(f), {c->gridDimX, c->gridDimY, c->gridDimZ},
                  {c->blockDimX, c->blockDimY, c->blockDimZ}, c->sharedMemBytes, c->hStream, parameters);
}
CUresult cuLaunchKernel(CUfunction f, unsigned gx, unsigned gy, unsigned gz, unsigned bx, unsigned by, unsigned bz,
                        unsigned shared, CUstream stream, void** parameters, void**) {
  COUNTED;
  return launched(reinterpret_cast<const Function*>(f), {gx, gy, gz}, {bx, by, bz}, shared, stream, parameters);
}
// Calls that the kernels of this package do not make; Triton's module names them.
CUresult cuTensorMapEncodeTiled(CUtensorMap*, CUtensorMapDataType, cuuint32_t, void*, const cuuint64_t*,
                                const cuuint64_t*, const cuuint32_t*, const cuuint32_t*, CUtensorMapInterleave,
                                CUtensorMapSwizzle, CUtensorMapL2promotion, CUtensorMapFloatOOBfill) {
  COUNTED;
  return CUDA_ERROR_NOT_SUPPORTED;
}
}
