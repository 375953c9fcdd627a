#include "cuda/arch/launch.h"
#include "cuda/recurrence/api.h"
#include "cuda/recurrence/describe.h"
#include "cuda/recurrence/kernel_choice.h"
#include "cuda/recurrence/transition_powers.cuh"

namespace sleepkern::cuda {

int64_t chain_memory(int K, bool backward) {
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

void powers(const Chain& chain, void* stream) {
  const Grid grid{chain.heads * chain.value_blocks, 1};
  with_width(chain.K, [&](auto width) {
    run("powers", powers_kernel<decltype(width)::value>, grid, THREADS, chain_memory(chain.K, false), chain, stream);
  });
}

void adjoint(const Chain& chain, void* stream) {
  const Grid grid{chain.heads * chain.value_blocks, 1};
  with_width(chain.K, [&](auto width) {
    run("adjoint", adjoint_kernel<decltype(width)::value>, grid, THREADS, chain_memory(chain.K, true), chain, stream);
  });
}

}  // namespace sleepkern::cuda
