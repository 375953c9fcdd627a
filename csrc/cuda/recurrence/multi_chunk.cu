#include "cuda/arch/launch.h"
#include "cuda/recurrence/api.h"
#include "cuda/recurrence/describe.h"
#include "cuda/recurrence/kernel_choice.h"
#include "cuda/recurrence/multi_chunk.cuh"
#include "cuda/recurrence/tokens.cuh"

namespace sleepkern::cuda {

int64_t multi_chunk_memory(int mode, int K, bool want_output, int v_tile, int slots) {
  int64_t bytes = 0;
  with_kernel(mode, K, [&](auto m, auto width) {
    bytes =
        MultiChunkMemory<decltype(m)::value, decltype(width)::value>(nullptr, v_tile, slots, want_output).arena.used;
  });
  return bytes;
}

void chunk_factors(const ReplayParams& call, void* stream) {
  const bool channel = call.problem.gate == Gate::channel;
  const int64_t shared =
      single_chunk_memory(call.mode, static_cast<int>(call.problem.K), call.problem.want_output, channel);
  with_kernel(call.mode, call.problem.K, [&](auto m, auto width) {
    constexpr Mode MODE = decltype(m)::value;
    constexpr int KP = decltype(width)::value;
    run("chunk_factors", channel ? chunk_factors_kernel<MODE, KP, true> : chunk_factors_kernel<MODE, KP, false>,
        {slots_of(call.problem), call.problem.HV}, THREADS, shared, call, stream);
  });
}

void multi_chunk(const ReplayParams& call, void* stream) {
  const Grid grid{call.problem.sequences * call.problem.HV * call.v_tiles, 1};
  const int K = static_cast<int>(call.problem.K);
  const auto state_pass = [&](const ReplayParams& params) {
    const int64_t shared = multi_chunk_memory(params.mode, K, params.problem.want_output, params.v_tile, params.slots);
    with_kernel(params.mode, K, [&](auto m, auto width) {
      run("state_pass", state_pass_kernel<decltype(m)::value, decltype(width)::value>, grid, THREADS, shared, params,
          stream);
    });
  };
  if (!call.affine) return state_pass(call);
  if (call.passes > (call.problem.want_output && !call.stops() ? 1 : 0)) {
    const int64_t shared = multi_chunk_memory(call.mode, K, false, call.v_tile, call.slots);
    with_kernel(call.mode, K, [&](auto m, auto width) {
      run("affine", affine_kernel<decltype(m)::value, decltype(width)::value>, grid, THREADS, shared, call, stream);
    });
  }
  if (!call.problem.want_output) return;
  ReplayParams last = call;
  last.passes = 1;
  last.residual = nullptr;
  if (call.passes > 1 || call.stops()) last.problem.state = call.before;
  state_pass(last);
}

}  // namespace sleepkern::cuda
