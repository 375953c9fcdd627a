#include "cuda/arch/launch.h"
#include "cuda/recurrence/api.h"
#include "cuda/recurrence/decode.cuh"
#include "cuda/recurrence/describe.h"

namespace sleepkern::cuda {

void step(const Steps& steps, void* stream) {
  const Problem& p = steps.p;
  const Grid grid{p.sequences * p.HV, (p.V + STEP_COLUMNS - 1) / STEP_COLUMNS};
  auto* kernel = p.K <= 64 ? step_kernel<8> : p.K <= 128 ? step_kernel<16> : step_kernel<32>;
  run("step", kernel, grid, STEP_THREADS, 0, steps, stream);
}

}  // namespace sleepkern::cuda
