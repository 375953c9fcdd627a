// The choice of a kernel by the width of keys and the mode.
#pragma once

#include <cstdint>
#include <stdexcept>
#include <string>

#include "cuda/arch/mma_tiles.h"
#include "cuda/recurrence/params.h"

namespace sleepkern::cuda {

// use(width) or use(mode, width) launches a kernel; both arguments are compile-time constants.
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
    use(ModeOf<Mode::fp32x3>(), width);
  });
}

}  // namespace sleepkern::cuda
