// The recurrence on the CPU: one pass, with or without kept states, its gradients, and a replay.
// sleepkern/backends/cpu/recurrence.py fills the fields.
#include "common/recurrence.h"

#include <algorithm>
#include <cmath>
#include <vector>

#include "bindings/named.h"
#include "bindings/recurrence_fields.h"
#include "common/interrupt.h"
#include "cpu/runtime/implementation.h"

namespace py = pybind11;

namespace sleepkern {
namespace {

struct BackwardCall : Problem, Gradients {};
struct ReplayCall : Problem, Replay {};
struct RawForwardCall : Problem {};
struct RawBackwardCall : BackwardCall {};

// How a call names the states that it keeps: KeptStates in common/recurrence.h, and how many the tensor holds.
struct KeptFields {
  int64_t state_every, state_count;
  float* states;         // of a forward
  const float* dstates;  // of a backward
};
struct KeepingForwardCall : Problem, KeptFields {};
struct KeepingBackwardCall : BackwardCall, KeptFields {};

template <class Call>
std::vector<Field<Call>> gradient_fields() {
  return {field<Call, &Gradients::dout>("do"),
          field<Call, &Gradients::dfinal>("dfinal"),
          field<Call, &Gradients::dq>("dq"),
          field<Call, &Gradients::dk>("dk"),
          field<Call, &Gradients::key_type>("key_type"),
          field<Call, &Gradients::dv>("dv"),
          field<Call, &Gradients::dg>("dg"),
          field<Call, &Gradients::dbeta>("dbeta"),
          field<Call, &Gradients::dstate>("dstate")};
}

void run_forward(Problem& problem) {
  complete(problem);
  check_given("o", problem.o, problem.want_output && problem.first(problem.sequences) > 0);
  check_given("final_state", problem.final_state, problem.sequences > 0);
  py::gil_scoped_release unlocked;
  forward(problem);
}

void run_backward(BackwardCall& call) {
  complete(call);
  const int64_t tokens = call.first(call.sequences);
  check_rows("do", call.dout, tokens, call.want_output);
  check_given("dq", call.dq, call.want_output && tokens > 0);
  check_given("dk", call.dk, tokens > 0);
  check_given("dv", call.dv, tokens > 0);
  check_given("dg", call.dg, call.gate != Gate::none && tokens > 0);
  if (call.H != call.HV && call.key_type != Type::float32) {
    refuse("key_type", std::to_string(static_cast<int>(call.key_type)), "0 where H < HV");
  }
  py::gil_scoped_release unlocked;
  backward(call, call);
}

// Gives a checked problem its KeptStates, with the offsets of packed sequences in `offsets`. Beyond the longest
// sequence it does not matter how far two kept states are apart.
void keep(Problem& problem, const KeptFields& given, KeptStates& kept, std::vector<int64_t>& offsets) {
  check_at_least("state_every", given.state_every, 1);
  kept = {std::min(given.state_every, std::max<int64_t>(problem.T, 1)), given.states, nullptr, given.dstates};
  int64_t count = problem.sequences * kept.count(problem.T);
  if (problem.offsets) {
    offsets.push_back(count = 0);
    for (int64_t n = 0; n < problem.sequences; ++n)
      offsets.push_back(count += kept.count(problem.first(n + 1) - problem.first(n)));
    kept.offsets = offsets.data();
  }
  check_product("states, HV, K, V", {count, problem.HV, problem.K, problem.V});
  if (given.state_count != count) {
    refuse("state_count", std::to_string(given.state_count), std::to_string(count) + ", the states that are kept");
  }
  problem.kept = &kept;
}

void run_keeping_forward(KeepingForwardCall& call) {
  KeptStates kept;
  std::vector<int64_t> offsets;
  complete(call);
  keep(call, call, kept, offsets);
  check_given("states", call.states, call.state_count > 0);
  run_forward(call);
}

void run_keeping_backward(KeepingBackwardCall& call) {
  KeptStates kept;
  std::vector<int64_t> offsets;
  complete(call);
  keep(call, call, kept, offsets);
  check_given("dstates", call.dstates, call.state_count > 0);
  run_backward(call);
}

void run_forward_of_raw(RawForwardCall& call) {
  check(call, call);
  run_forward(call);
}

// Adds the sequences' gradients of A_log and dt_bias to those of the first one, in order.
void run_backward_of_raw(RawBackwardCall& call) {
  check(call, call);
  check_given("gate_sums", call.gate_sums, call.raw_decay && call.sequences > 0);
  run_backward(call);
  if (!call.gate_sums) return;
  const int64_t size = call.HV * (1 + (call.gate == Gate::channel ? call.K : 1));
  for (int64_t n = 1; n < call.sequences; ++n) {
    for (int64_t i = 0; i < size; ++i) call.gate_sums[i] += call.gate_sums[n * size + i];
  }
}

void check(const Problem& p, const Replay& r) {
  check_between("passes", r.passes, 1, PASSES_LIMIT);
  check_given("final_state", p.final_state, p.sequences > 0);
  if (std::isnan(r.tol)) refuse("tol", "nan", "a number");
  check_given("residual", r.residual, r.tol > 0 && p.sequences > 0);
  check_given("passes_done", r.passes_done, r.tol > 0 && p.sequences > 0);
  if (!r.rank) return;
  if (p.gate == Gate::channel) refuse("rank", "channel decay", "one decay a head, or none");
  if (r.tol > 0) refuse("tol", std::to_string(r.tol), "0 with rank, which forms no state of a pass");
  check_between("T", p.longest(), 0, RANK_LIMIT);
}

void run_replay(ReplayCall& call) {
  Interrupt interrupt(signalled);
  call.interrupt = &interrupt;
  complete(call);
  check(call, call);
  {
    const py::gil_scoped_release unlocked;
    replay(call, call);
  }
  if (interrupt.stop) throw py::error_already_set();
}

}  // namespace

void bind_recurrence(py::module_& m) {
  auto forward_fields = problem_fields<Problem>();
  append(forward_fields, {field<Problem, &Problem::o>("o"), field<Problem, &Problem::final_state>("final_state")});
  NamedFunction<Problem, run_forward>::bind(m, "forward", std::move(forward_fields));

  auto backward_fields = problem_fields<BackwardCall>();
  append(backward_fields, gradient_fields<BackwardCall>());
  NamedFunction<BackwardCall, run_backward>::bind(m, "backward", std::move(backward_fields));

  auto raw_fields = problem_fields<RawForwardCall>();
  append(raw_fields, raw_gate_fields<RawForwardCall>());
  append(raw_fields,
         {field<RawForwardCall, &Problem::o>("o"), field<RawForwardCall, &Problem::final_state>("final_state")});
  NamedFunction<RawForwardCall, run_forward_of_raw>::bind(m, "forward_of_raw", std::move(raw_fields));

  auto raw_backward_fields = problem_fields<RawBackwardCall>();
  append(raw_backward_fields, raw_gate_fields<RawBackwardCall>());
  append(raw_backward_fields, gradient_fields<RawBackwardCall>());
  append(raw_backward_fields, {field<RawBackwardCall, &Gradients::gate_sums>("gate_sums")});
  NamedFunction<RawBackwardCall, run_backward_of_raw>::bind(m, "backward_of_raw", std::move(raw_backward_fields));

  auto keeping_fields = problem_fields<KeepingForwardCall>();
  append(keeping_fields,
         {field<KeepingForwardCall, &Problem::o>("o"), field<KeepingForwardCall, &Problem::final_state>("final_state"),
          field<KeepingForwardCall, &KeptFields::state_every>("state_every"),
          field<KeepingForwardCall, &KeptFields::state_count>("state_count"),
          field<KeepingForwardCall, &KeptFields::states>("states")});
  NamedFunction<KeepingForwardCall, run_keeping_forward>::bind(m, "forward_keeping_states", std::move(keeping_fields));

  auto keeping_backward_fields = problem_fields<KeepingBackwardCall>();
  append(keeping_backward_fields, gradient_fields<KeepingBackwardCall>());
  append(keeping_backward_fields, {field<KeepingBackwardCall, &KeptFields::state_every>("state_every"),
                                   field<KeepingBackwardCall, &KeptFields::state_count>("state_count"),
                                   field<KeepingBackwardCall, &KeptFields::dstates>("dstates")});
  NamedFunction<KeepingBackwardCall, run_keeping_backward>::bind(m, "backward_keeping_states",
                                                                 std::move(keeping_backward_fields));

  auto replay_fields = problem_fields<ReplayCall>();
  append(replay_fields,
         {field<ReplayCall, &Problem::final_state>("final_state"), field<ReplayCall, &Replay::rank>("rank"),
          field<ReplayCall, &Replay::passes>("passes"), field<ReplayCall, &Replay::tol>("tol"),
          field<ReplayCall, &Replay::before>("before"), field<ReplayCall, &Replay::residual>("residual"),
          field<ReplayCall, &Replay::passes_done>("passes_done")});
  NamedFunction<ReplayCall, run_replay>::bind(m, "replay", std::move(replay_fields));
}

}  // namespace sleepkern
