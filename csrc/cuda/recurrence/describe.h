// The arguments of a launch in words, for the message of a launch that failed.
#pragma once

#include <string>

#include "common/recurrence.h"
#include "cuda/recurrence/params.h"

namespace sleepkern::cuda {

inline std::string describe(const Problem& p) {
  return "sequences = " + std::to_string(p.sequences) + ", T = " + std::to_string(p.T) +
         ", HV = " + std::to_string(p.HV) + ", K = " + std::to_string(p.K) + ", V = " + std::to_string(p.V);
}
inline std::string describe(const ReplayParams& c) {
  return describe(c.p) + ", passes = " + std::to_string(c.passes) + ", v_tile = " + std::to_string(c.v_tile) +
         ", slots = " + std::to_string(c.slots);
}
inline std::string describe(const DecodeParams& s) { return describe(s.p); }
inline std::string describe(const PowersParams& c) {
  return "heads = " + std::to_string(c.heads) + ", K = " + std::to_string(c.K) + ", V = " + std::to_string(c.V) +
         ", passes = " + std::to_string(c.passes);
}

}  // namespace sleepkern::cuda
