// Limits and constants that Python needs as well. Each is written once, and _C exports it.
#pragma once

#include <cstdint>

namespace sleepkern {

constexpr int64_t HEAD_LIMIT = 256;          // largest K and V of the kernels
constexpr int64_t CONVOLUTION_LIMIT = 4;     // widest short convolution of the kernels
constexpr int64_t RANK_LIMIT = 64;           // longest window of replay by rank
constexpr int64_t PASSES_LIMIT = INT32_MAX;  // the largest count that passes_done holds

// The CPU decodes sequences of at most this many tokens one by one, and cuts longer ones into chunks. Chunks take less
// time from 5 to 6 tokens on, on AVX2 and AVX-512 with K = V = 64 and 128.
constexpr int64_t DECODE_LIMIT = 5;

// Added to |x|^2 in the q/k normalisation x / sqrt(|x|^2 + eps), as transformers and flash-linear-attention do.
constexpr double NORM_EPS = 1e-6;

// A log decay below this value is replaced by it. exp of it is 0 in every type, and with -inf itself a difference of
// two sums of log decays would be NaN.
constexpr double MIN_LOG_DECAY = -1e4;

}  // namespace sleepkern
