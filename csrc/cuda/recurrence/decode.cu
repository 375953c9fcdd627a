#include "cuda/arch/launch.h"
#include "cuda/recurrence/api.h"
#include "cuda/recurrence/decode.cuh"
#include "cuda/recurrence/describe.h"

namespace sleepkern::cuda {

void decode(const DecodeParams& params, void* stream) {
  const Problem& problem = params.problem;
  const Grid grid{problem.sequences * problem.HV, (problem.V + DECODE_COLUMNS - 1) / DECODE_COLUMNS};
  auto* kernel = problem.K <= 64 ? decode_kernel<8> : problem.K <= 128 ? decode_kernel<16> : decode_kernel<32>;
  run("decode", kernel, grid, DECODE_THREADS, 0, params, stream);
}

}  // namespace sleepkern::cuda
