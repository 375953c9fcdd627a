// The launches of the recurrence, for its bindings. Each throws std::runtime_error that names kernel, shape and reason.
#pragma once

#include <cstdint>

#include "cuda/recurrence/params.h"

namespace sleepkern::cuda {

// Bytes of shared memory that a CTA needs.
int64_t window_memory(int mode, int K, bool reads, bool channel);  // also that of chunk_factors
int64_t replay_memory(int mode, int K, bool reads, int block, int slots);
int64_t chain_memory(int K, bool backward);

void window(const Call& call, void* stream);
void prepare(const Call& call, void* stream);
void replay(const Call& call, void* stream);
void powers(const Chain& chain, void* stream);
void adjoint(const Chain& chain, void* stream);
void step(const Steps& steps, void* stream);

}  // namespace sleepkern::cuda
