// A kernel launch. The error of a failed launch names the kernel and has describe(arguments).
#pragma once

#include <cstdint>
#include <stdexcept>
#include <string>

#include "cuda/arch/ptx.h"

namespace sleepkern::cuda {

struct Grid {
  int64_t x, y;
};

// cluster: the number of neighbouring CTAs that can access each other's shared memory.
#ifdef SLEEPKERN_CUDA_ON_CPU
template <class Arguments>
void run(const char*, void (*kernel)(Arguments), Grid grid, int threads, int64_t shared, const Arguments& arguments,
         void*, int cluster = 1) {
  cuda_on_cpu::launch(
      {static_cast<unsigned>(grid.x), static_cast<unsigned>(grid.y), 1}, threads, shared, [&] { kernel(arguments); },
      cluster);
}
#else
template <class Arguments>
void run(const char* name, void (*kernel)(Arguments), Grid grid, int threads, int64_t shared,
         const Arguments& arguments, void* stream, int cluster = 1) {
  if (grid.x == 0 || grid.y == 0) return;
  const auto check = [&](cudaError_t error) {
    if (error == cudaSuccess) return;
    cudaGetLastError();  // so that the next launch does not report it again
    throw std::runtime_error(std::string("sleepkern: kernel ") + name + " (" + describe(arguments) + ", " +
                             std::to_string(shared) + " bytes of shared memory): " + cudaGetErrorString(error));
  };
  if (shared > 48 * 1024) {
    check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shared)));
  }
  void* packed[] = {const_cast<Arguments*>(&arguments)};
  const dim3 ctas(static_cast<unsigned>(grid.x), static_cast<unsigned>(grid.y));
  cudaLaunchConfig_t config{};
  config.gridDim = ctas;
  config.blockDim = dim3(threads);
  config.dynamicSmemBytes = shared;
  config.stream = static_cast<cudaStream_t>(stream);
  cudaLaunchAttribute cluster_size{};
  cluster_size.id = cudaLaunchAttributeClusterDimension;
  cluster_size.val.clusterDim.x = static_cast<unsigned>(cluster);
  cluster_size.val.clusterDim.y = cluster_size.val.clusterDim.z = 1;
  config.attrs = &cluster_size;
  config.numAttrs = cluster > 1 ? 1 : 0;
  check(cudaLaunchKernelExC(&config, reinterpret_cast<const void*>(kernel), packed));
}
#endif

}  // namespace sleepkern::cuda
