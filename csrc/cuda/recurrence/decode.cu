#include "cuda/arch/launch.h"
#include "cuda/recurrence/api.h"
#include "cuda/recurrence/decode.cuh"
#include "cuda/recurrence/describe.h"

namespace sleepkern::cuda {
namespace {

template <class State>
void launch(const DecodeStates& call, void* stream) {
  const Problem& problem = call.problem;
  const Grid grid{problem.sequences * problem.HV, (problem.V + DECODE_COLUMNS - 1) / DECODE_COLUMNS};
  auto* kernel = problem.K <= 64    ? decode_kernel<8, State>
                 : problem.K <= 128 ? decode_kernel<16, State>
                                    : decode_kernel<32, State>;
  run("decode", kernel, grid, DECODE_THREADS, 0, call, stream);
}

}  // namespace

void decode_states(const DecodeStates& call, void* stream) {
  call.bf16 ? launch<uint16_t>(call, stream) : launch<float>(call, stream);
}

void decode(const DecodeParams& params, void* stream) {
  DecodeStates call{};
  static_cast<DecodeParams&>(call) = params;
  call.states = params.problem.final_state;
  call.head_stride = params.problem.K * params.problem.V;
  decode_states(call, stream);
}

}  // namespace sleepkern::cuda
