// The arguments of a launch in words, for the message of a launch that failed.
#pragma once

#include <string>

#include "common/recurrence.h"
#include "cuda/recurrence/params.h"

namespace sleepkern::cuda {

inline std::string describe(const Problem& problem) {
  return "sequences = " + std::to_string(problem.sequences) + ", T = " + std::to_string(problem.T) +
         ", HV = " + std::to_string(problem.HV) + ", K = " + std::to_string(problem.K) +
         ", V = " + std::to_string(problem.V);
}
inline std::string describe(const ReplayParams& call) {
  return describe(call.problem) + ", passes = " + std::to_string(call.passes) +
         ", v_tile = " + std::to_string(call.v_tile) + ", slots = " + std::to_string(call.slots);
}
inline std::string describe(const DecodeParams& call) { return describe(call.problem); }
inline std::string describe(const PowersParams& call) {
  return "heads = " + std::to_string(call.heads) + ", K = " + std::to_string(call.K) +
         ", V = " + std::to_string(call.V) + ", passes = " + std::to_string(call.passes);
}

}  // namespace sleepkern::cuda
