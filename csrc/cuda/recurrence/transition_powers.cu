#include "cuda/arch/launch.h"
#include "cuda/recurrence/api.h"
#include "cuda/recurrence/describe.h"
#include "cuda/recurrence/kernel_choice.h"
#include "cuda/recurrence/transition_powers.cuh"

namespace sleepkern::cuda {

int64_t powers_memory(int K, bool backward) {
  int64_t bytes = 0;
  with_width(K, [&](auto width) {
    constexpr int KP = decltype(width)::value;
    Arena arena{nullptr};
    arena.take<Number<FULL>>(KP * KP);
    for (int i = 0; i < (backward ? 2 : 0); ++i) arena.take<Number<FULL>>(KP * COLUMNS);
    bytes = arena.used;
  });
  return bytes;
}

void powers(const PowersParams& params, void* stream) {
  const Grid grid{params.heads * params.v_tiles, 1};
  with_width(params.K, [&](auto width) {
    run("powers", powers_kernel<decltype(width)::value>, grid, THREADS, powers_memory(params.K, false), params, stream);
  });
}

void powers_backward(const PowersParams& params, void* stream) {
  const Grid grid{params.heads * params.v_tiles, 1};
  with_width(params.K, [&](auto width) {
    run("powers_backward", powers_backward_kernel<decltype(width)::value>, grid, THREADS, powers_memory(params.K, true),
        params, stream);
  });
}

}  // namespace sleepkern::cuda
