// The fields and checks that every call of the recurrence has. sleepkern/backends/cpu/fields.py fills them.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "bindings/checks.h"
#include "bindings/named.h"
#include "common/recurrence.h"

namespace sleepkern {

template <class Call>
std::vector<Field<Call>> problem_fields() {
  return {field<Call, &Problem::gate>("gate"),
          field<Call, &Problem::delta>("delta"),
          field<Call, &Problem::normalize>("normalize"),
          field<Call, &Problem::scale>("scale"),
          field<Call, &Problem::sequences>("sequences"),
          field<Call, &Problem::T>("T"),
          field<Call, &Problem::H>("H"),
          field<Call, &Problem::HV>("HV"),
          field<Call, &Problem::K>("K"),
          field<Call, &Problem::V>("V"),
          field<Call, &Problem::offsets>("offsets"),
          field<Call, &Problem::q>("q"),
          field<Call, &Problem::k>("k"),
          field<Call, &Problem::v>("v"),
          field<Call, &Problem::g>("g"),
          field<Call, &Problem::beta>("beta"),
          field<Call, &Problem::state>("state")};
}

template <class Call>
std::vector<Field<Call>> raw_gate_fields() {
  return {field<Call, &RawGates::raw_decay>("raw_decay"), field<Call, &RawGates::lower_bound>("lower_bound"),
          field<Call, &RawGates::beta_scale>("beta_scale"), field<Call, &RawGates::A_log>("A_log"),
          field<Call, &RawGates::dt_bias>("dt_bias")};
}

// The checks of all entry points. Outputs are wanted if q is given.
inline void complete(Problem& problem) {
  problem.want_output = problem.q.data != nullptr;
  check(problem);
  check_offsets(problem.offsets, problem.sequences, problem.T);
}

inline void check(const RawGates& gates, const Problem& p) {
  check_given("beta", p.beta.data, gates.beta_scale != 0 && p.first(p.sequences) > 0);
  if (!(gates.lower_bound <= 0)) refuse("lower_bound", std::to_string(gates.lower_bound), "at most 0");
  if (gates.raw_decay && p.gate == Gate::none) refuse("raw_decay", "True", "False for a rule without decay");
}

}  // namespace sleepkern
