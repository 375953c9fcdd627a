#include <cuda_runtime_api.h>

#include <stdexcept>

#include "cuda/arch/device.h"

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
    const cudaError_t found_one = cudaGetDeviceProperties(&p, i);
    if (found_one != cudaSuccess) throw std::runtime_error(cudaGetErrorString(found_one));
    found.push_back({p.name, p.major, p.minor, p.totalGlobalMem, p.multiProcessorCount, p.sharedMemPerBlockOptin});
  }
  return found;
}

}  // namespace sleepkern::cuda
