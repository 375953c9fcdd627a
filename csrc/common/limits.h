// Limits and constants that Python needs to know as well: each is written once, and _C hands it on.
#pragma once

#include <cstdint>

namespace sleepkern {

constexpr int64_t HEAD_LIMIT = 256;          // largest K and V of the kernels
constexpr int64_t CONVOLUTION_LIMIT = 4;     // widest short convolution of the kernels
constexpr int64_t RANK_LIMIT = 64;           // longest window of replay by rank
constexpr int64_t PASSES_LIMIT = INT32_MAX;  // what passes_done can count

// The CPU steps through sequences of at most this many tokens one by one; longer ones go in chunks, which from 5 to 6
// tokens on takes less time on AVX2 and AVX-512, K = V = 64 and 128.
constexpr int64_t DECODE_LIMIT = 5;

// Added to |x|^2 in the q/k normalisation x / sqrt(|x|^2 + eps), as transformers and flash-linear-attention do.
constexpr double NORM_EPS = 1e-6;

// A log decay below this counts as this: exp of it is 0 in every type, and -inf itself would make differences of sums
// of log decays into NaN.
constexpr double MIN_LOG_DECAY = -1e4;

}  // namespace sleepkern
