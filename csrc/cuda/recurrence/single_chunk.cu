#include "cuda/arch/launch.h"
#include "cuda/recurrence/api.h"
#include "cuda/recurrence/chunk_memory.cuh"
#include "cuda/recurrence/describe.h"
#include "cuda/recurrence/kernel_choice.h"
#include "cuda/recurrence/single_chunk.cuh"

namespace sleepkern::cuda {

int64_t single_chunk_memory(int mode, int K, bool want_output, bool channel) {
  int64_t bytes = 0;
  with_kernel(mode, K, [&](auto m, auto width) {
    constexpr Mode MODE = decltype(m)::value;
    constexpr int KP = decltype(width)::value;
    bytes = channel ? ChunkMemory<MODE, KP, true>(nullptr, want_output).arena.used
                    : ChunkMemory<MODE, KP, false>(nullptr, want_output).arena.used;
  });
  return bytes;
}

void single_chunk(const ReplayParams& call, void* stream) {
  const bool channel = call.problem.gate == Gate::channel;
  const Grid grid{call.problem.sequences * call.problem.HV * call.v_tiles, 1};
  const int64_t shared =
      single_chunk_memory(call.mode, static_cast<int>(call.problem.K), call.problem.want_output, channel);
  with_kernel(call.mode, call.problem.K, [&](auto m, auto width) {
    constexpr Mode MODE = decltype(m)::value;
    constexpr int KP = decltype(width)::value;
    run("single_chunk", channel ? single_chunk_kernel<MODE, KP, true> : single_chunk_kernel<MODE, KP, false>, grid,
        THREADS, shared, call, stream);
  });
}

}  // namespace sleepkern::cuda
