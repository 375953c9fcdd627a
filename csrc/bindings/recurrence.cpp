// The recurrence on the CPU: one pass, its gradients, and a replay. sleepkern/backends/cpu/recurrence.py fills the
// fields.
#include "common/recurrence.h"

#include <cmath>

#include "bindings/named.h"
#include "common/interrupt.h"
#include "cpu/runtime/implementation.h"

namespace py = pybind11;

namespace sleepkern {
namespace {

struct BackwardCall : Problem, Gradients {};
struct ReplayCall : Problem, Replay {};
struct RawForwardCall : Problem {};
struct RawBackwardCall : BackwardCall {};

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

// The checks of all entry points. Outputs are wanted if q is given.
void complete(Problem& problem) {
  problem.want_output = problem.q.data != nullptr;
  check(problem);
  check_offsets(problem.offsets, problem.sequences, problem.T);
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

void check(const RawGates& gates, const Problem& p) {
  check_given("beta", p.beta.data, gates.beta_scale != 0 && p.first(p.sequences) > 0);
  if (!(gates.lower_bound <= 0)) refuse("lower_bound", std::to_string(gates.lower_bound), "at most 0");
  if (gates.raw_decay && p.gate == Gate::none) refuse("raw_decay", "True", "False for a rule without decay");
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

  auto replay_fields = problem_fields<ReplayCall>();
  append(replay_fields,
         {field<ReplayCall, &Problem::final_state>("final_state"), field<ReplayCall, &Replay::rank>("rank"),
          field<ReplayCall, &Replay::passes>("passes"), field<ReplayCall, &Replay::tol>("tol"),
          field<ReplayCall, &Replay::before>("before"), field<ReplayCall, &Replay::residual>("residual"),
          field<ReplayCall, &Replay::passes_done>("passes_done")});
  NamedFunction<ReplayCall, run_replay>::bind(m, "replay", std::move(replay_fields));
}

}  // namespace sleepkern
