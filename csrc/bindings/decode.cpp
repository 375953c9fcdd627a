// A decode step on states that are anywhere. sleepkern/backends/cpu/decode.py fills the fields.
#include "common/decode.h"

#include <string>
#include <vector>

#include "bindings/checks.h"
#include "bindings/named.h"
#include "bindings/recurrence_fields.h"
#include "cpu/runtime/implementation.h"

namespace py = pybind11;

namespace sleepkern {
namespace {

struct DecodeCall : Problem, DecodeStates {};

// Checks that each of `entries` entries of states is absent or a row that exists. The kernel reads the indices from
// `copy`, because another thread may write to the caller's while it runs.
void check_states(const char* name, StateRows& x, int64_t entries, const Problem& p, std::vector<int64_t>& copy) {
  check_at_least(name, x.rows, 0);
  check_at_least(name, x.stride, 0);
  check_at_least(name, x.head_stride, 0);
  check_product(name, {x.rows, x.stride});
  check_product(name, {p.HV, x.head_stride});
  check_given(name, x.data, x.rows > 0 && entries > 0);
  if (!x.indices && x.rows < entries) {
    refuse(name, std::to_string(x.rows) + " rows", "at least " + std::to_string(entries));
  }
  if (!x.indices || entries == 0) return;
  copy.resize(static_cast<size_t>(entries));
  for (int64_t n = 0; n < entries; ++n) {
    const int64_t row = offset_at(x.indices, n);
    if (row >= x.rows) {
      refuse(name, "index " + std::to_string(row), "less than " + std::to_string(x.rows) + ", the rows of the pool");
    }
    copy[static_cast<size_t>(n)] = row;
  }
  x.indices = copy.data();
}

void run_decode(DecodeCall& call) {
  complete(call);
  check(call, call);
  if (call.type == Type::float16) refuse("state_type", "2", "0 or 1, float32 or bfloat16");
  const int64_t tokens = call.first(call.sequences);
  check_given("o", call.o, call.want_output && tokens > 0);
  std::vector<int64_t> from_rows, to_rows;
  check_states("states", call.from, call.sequences, call, from_rows);
  if (call.each_token) check_states("states_out", call.to, tokens, call, to_rows);
  if (!call.each_token) call.to = call.from;
  py::gil_scoped_release unlocked;
  decode(call, call);
}

}  // namespace

void bind_decode(py::module_& m) {
  auto fields = problem_fields<DecodeCall>();
  fields.pop_back();  // `state`, which is in `states`
  append(fields, raw_gate_fields<DecodeCall>());
  append(fields,
         {field<DecodeCall, &Problem::o>("o"), field<DecodeCall, &DecodeStates::type>("state_type"),
          field<DecodeCall, &DecodeStates::from>("states"), field<DecodeCall, &DecodeStates::each_token>("each_token"),
          field<DecodeCall, &DecodeStates::to>("states_out")});
  NamedFunction<DecodeCall, run_decode>::bind(m, "decode", std::move(fields));
}

}  // namespace sleepkern
