// What the files that launch kernels share: the launch itself, and the choice of a kernel by width and mode.
#pragma once

#include <stdexcept>
#include <string>

#include "cuda/launch.h"
#include "cuda/tile.h"

namespace sleepkern::cuda {

struct Grid {
  int64_t x, y;
};

inline std::string describe(const Problem& p) {
  return "sequences = " + std::to_string(p.sequences) + ", T = " + std::to_string(p.T) +
         ", HV = " + std::to_string(p.HV) + ", K = " + std::to_string(p.K) + ", V = " + std::to_string(p.V);
}
inline std::string describe(const Call& c) {
  return describe(c.p) + ", passes = " + std::to_string(c.passes) + ", block = " + std::to_string(c.block) +
         ", slots = " + std::to_string(c.slots);
}
inline std::string describe(const Steps& s) { return describe(s.p); }
inline std::string describe(const Chain& c) {
  return "heads = " + std::to_string(c.heads) + ", K = " + std::to_string(c.K) + ", V = " + std::to_string(c.V) +
         ", passes = " + std::to_string(c.passes);
}

inline std::string describe(const BlocksCall& c) {
  return "B = " + std::to_string(c.B) + ", L = " + std::to_string(c.L) + ", d = " + std::to_string(c.d) +
         ", layers = " + std::to_string(c.depth) + ", passes = " + std::to_string(c.passes) +
         ", cluster = " + std::to_string(c.cluster) + ", windows of a cluster = " + std::to_string(c.group);
}

// cluster: neighbouring thread blocks that see each other's shared memory.
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
  const dim3 blocks(static_cast<unsigned>(grid.x), static_cast<unsigned>(grid.y));
  cudaLaunchConfig_t how{};
  how.gridDim = blocks;
  how.blockDim = dim3(threads);
  how.dynamicSmemBytes = shared;
  how.stream = static_cast<cudaStream_t>(stream);
  cudaLaunchAttribute together{};
  together.id = cudaLaunchAttributeClusterDimension;
  together.val.clusterDim.x = static_cast<unsigned>(cluster);
  together.val.clusterDim.y = together.val.clusterDim.z = 1;
  how.attrs = &together;
  how.numAttrs = cluster > 1 ? 1 : 0;
  check(cudaLaunchKernelExC(&how, reinterpret_cast<const void*>(kernel), packed));
}
#endif

// A kernel is chosen by use(width) or use(mode, width), both constants.
template <Mode MODE>
struct ModeOf {
  static constexpr Mode value = MODE;
};
template <int KP>
struct WidthOf {
  static constexpr int value = KP;
};

template <class Use>
void with_width(int64_t K, Use use) {
  if (K <= 64) return use(WidthOf<64>());
  if (K <= WIDEST_KEY) return use(WidthOf<128>());
  throw std::runtime_error("sleepkern: no CUDA kernel for K = " + std::to_string(K));
}

template <class Use>
void with_kernel(int mode, int64_t K, Use use) {
  with_width(K, [&](auto width) {
    if (mode == static_cast<int>(Mode::bf16)) return use(ModeOf<Mode::bf16>(), width);
    use(ModeOf<Mode::exact>(), width);
  });
}

}  // namespace sleepkern::cuda
