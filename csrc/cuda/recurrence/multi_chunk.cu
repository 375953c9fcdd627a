#include "cuda/arch/launch.h"
#include "cuda/recurrence/api.h"
#include "cuda/recurrence/describe.h"
#include "cuda/recurrence/kernel_choice.h"
#include "cuda/recurrence/multi_chunk.cuh"
#include "cuda/recurrence/tokens.cuh"

namespace sleepkern::cuda {

int64_t replay_memory(int mode, int K, bool reads, int block, int slots) {
  int64_t bytes = 0;
  with_kernel(mode, K, [&](auto m, auto width) {
    bytes = ReplayMemory<decltype(m)::value, decltype(width)::value>(nullptr, block, slots, reads).arena.used;
  });
  return bytes;
}

void prepare(const Call& call, void* stream) {
  const bool channel = call.p.gate == Gate::channel;
  const int64_t shared = window_memory(call.mode, static_cast<int>(call.p.K), call.p.reads, channel);
  with_kernel(call.mode, call.p.K, [&](auto m, auto width) {
    constexpr Mode MODE = decltype(m)::value;
    constexpr int KP = decltype(width)::value;
    run("prepare", channel ? prepare_kernel<MODE, KP, true> : prepare_kernel<MODE, KP, false>,
        {slots_of(call.p), call.p.HV}, THREADS, shared, call, stream);
  });
}

void replay(const Call& call, void* stream) {
  const Grid grid{call.p.sequences * call.p.HV * call.value_blocks, 1};
  const int K = static_cast<int>(call.p.K);
  const auto state_pass = [&](const Call& c) {
    const int64_t shared = replay_memory(c.mode, K, c.p.reads, c.block, c.slots);
    with_kernel(c.mode, K, [&](auto m, auto width) {
      run("state_pass", state_pass_kernel<decltype(m)::value, decltype(width)::value>, grid, THREADS, shared, c,
          stream);
    });
  };
  if (!call.affine) return state_pass(call);
  if (call.passes > (call.p.reads && !call.stops() ? 1 : 0)) {
    const int64_t shared = replay_memory(call.mode, K, false, call.block, call.slots);
    with_kernel(call.mode, K, [&](auto m, auto width) {
      run("affine", affine_kernel<decltype(m)::value, decltype(width)::value>, grid, THREADS, shared, call, stream);
    });
  }
  if (!call.p.reads) return;
  Call last = call;
  last.passes = 1;
  last.residual = nullptr;
  if (call.passes > 1 || call.stops()) last.p.state = call.before;
  state_pass(last);
}

}  // namespace sleepkern::cuda
