#include <cuda_runtime_api.h>

#include <stdexcept>

#include "cuda/device.h"

namespace sleepkern::cuda {

std::vector<Device> devices() {
  int count = 0;
  const cudaError_t error = cudaGetDeviceCount(&count);
  // No GPU and no usable driver are answers, not failures.
  if (error == cudaErrorNoDevice || error == cudaErrorInsufficientDriver) {
    cudaGetLastError();
    return {};
  }
  if (error != cudaSuccess) throw std::runtime_error(cudaGetErrorString(error));
  std::vector<Device> found;
  for (int i = 0; i < count; ++i) {
    cudaDeviceProp p;
    if (cudaGetDeviceProperties(&p, i) != cudaSuccess) continue;
    found.push_back({p.name, p.major, p.minor, p.totalGlobalMem, p.multiProcessorCount, p.sharedMemPerBlockOptin});
  }
  return found;
}

int runtime_version() {
  int version = 0;
  cudaRuntimeGetVersion(&version);
  return version;
}

}  // namespace sleepkern::cuda
