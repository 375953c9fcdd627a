#include "cuda/chain.cuh"
#include "cuda/launch-inl.h"

namespace sleepkern::cuda {

int64_t chain_memory(int mode, int K, bool backward) {
  int64_t bytes = 0;
  with_kernel(mode, K, [&](auto m, auto width) {
    using N = Number<decltype(m)::value>;
    constexpr int KP = decltype(width)::value;
    Arena arena{nullptr};
    arena.take<N>(KP * KP);
    for (int i = 0; i < (backward ? 2 : 0); ++i) arena.take<N>(KP * COLUMNS);
    bytes = arena.used;
  });
  return bytes;
}

void powers(const Chain& chain, void* stream) {
  const Grid grid{chain.heads * chain.value_blocks, 1};
  with_kernel(chain.mode, chain.K, [&](auto m, auto width) {
    run("powers", powers_kernel<decltype(m)::value, decltype(width)::value>, grid, THREADS,
        chain_memory(chain.mode, chain.K, false), chain, stream);
  });
}

void adjoint(const Chain& chain, void* stream) {
  const Grid grid{chain.heads * chain.value_blocks, 1};
  with_kernel(chain.mode, chain.K, [&](auto m, auto width) {
    run("adjoint", adjoint_kernel<decltype(m)::value, decltype(width)::value>, grid, THREADS,
        chain_memory(chain.mode, chain.K, true), chain, stream);
  });
}

}  // namespace sleepkern::cuda
