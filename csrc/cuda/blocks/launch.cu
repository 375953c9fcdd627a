#include <algorithm>
#include <stdexcept>
#include <string>

#include "cuda/arch/launch.h"
#include "cuda/blocks/api.h"
#include "cuda/blocks/kernel.cuh"
#include "cuda/recurrence/kernel_choice.h"
#include "cuda/recurrence/params.h"

namespace sleepkern::cuda {

inline std::string describe(const BlocksParams& call) {
  return "B = " + std::to_string(call.B) + ", L = " + std::to_string(call.L) + ", d = " + std::to_string(call.d) +
         ", layers = " + std::to_string(call.depth) + ", passes = " + std::to_string(call.passes) +
         ", cluster = " + std::to_string(call.cluster) + ", windows of a cluster = " + std::to_string(call.group);
}

int64_t blocks_memory(const BlocksParams& call) { return smem_offsets(call).end; }

void sleep_blocks(const BlocksParams& given, void* stream) {
  BlocksParams call = given;
  call.at = smem_offsets(given);
  const Grid grid{static_cast<int64_t>((call.B + call.group - 1) / call.group) * call.cluster, 1};
  const auto launch = [&](auto kernel) {
    run("blocks", kernel, grid, THREADS, call.at.end, call, stream, call.cluster);
  };
  int widest = 0;
  for (int i = 0; i < call.depth; ++i) widest = std::max(widest, call.layers[i].K);
  with_width(widest, [&](auto width) {
    constexpr int KEYS = decltype(width)::value;
    switch (call.tiles) {
      case TILES_OF[0]:
        return launch(blocks_kernel<TILES_OF[0], KEYS>);
      case TILES_OF[1]:
        return launch(blocks_kernel<TILES_OF[1], KEYS>);
      case TILES_OF[2]:
        return launch(blocks_kernel<TILES_OF[2], KEYS>);
      default:
        throw std::runtime_error("sleepkern: no CUDA kernel for " + std::to_string(16 * call.tiles) + " rows");
    }
  });
}

}  // namespace sleepkern::cuda
