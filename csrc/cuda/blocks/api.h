// The launch for a stack of blocks, for its bindings. Its std::runtime_error names kernel, shape and reason.
#pragma once

#include <cstdint>

#include "cuda/blocks/params.h"

namespace sleepkern::cuda {

int64_t blocks_memory(const BlocksParams& call);  // bytes of shared memory that a CTA needs

void sleep_blocks(const BlocksParams& call, void* stream);

}  // namespace sleepkern::cuda
