// The launches of the recurrence, for its bindings. Each throws std::runtime_error that names kernel, shape and reason.
#pragma once

#include <cstdint>

#include "cuda/recurrence/params.h"

namespace sleepkern::cuda {

// Bytes of shared memory that a CTA needs.
int64_t single_chunk_memory(int mode, int K, bool want_output, bool channel);  // also that of chunk_factors
int64_t multi_chunk_memory(int mode, int K, bool want_output, int v_tile, int slots);
int64_t powers_memory(int K, bool backward);

void single_chunk(const ReplayParams& call, void* stream);
void chunk_factors(const ReplayParams& call, void* stream);
void multi_chunk(const ReplayParams& call, void* stream);
void powers(const PowersParams& params, void* stream);
void powers_backward(const PowersParams& params, void* stream);
void decode(const DecodeParams& steps, void* stream);

}  // namespace sleepkern::cuda
