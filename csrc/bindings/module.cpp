// sleepkern._C: one m.def per entry point. Tensors arrive as (address, row stride, type code);
// sleepkern/backends/cpu/recurrence.py holds the other side of each signature.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <cmath>
#include <string>
#include <tuple>
#include <vector>

#include "bindings/arguments.h"
#include "common/interrupt.h"
#include "common/recurrence.h"
#include "cpu/runtime/implementation.h"
#include "cpu/runtime/thread_pool.h"
#ifdef SLEEPKERN_HAS_CUDA
#include "cuda/arch/device.h"
#endif

namespace py = pybind11;
using namespace sleepkern;

bool sleepkern::signalled() {
  const py::gil_scoped_acquire locked;
  return PyErr_CheckSignals() != 0;
}

namespace {

void run_forward(int gate, bool delta, bool normalize, float scale, int64_t sequences, int64_t T, int64_t H, int64_t HV,
                 int64_t K, int64_t V, uintptr_t offsets, View q, View k, View v, View g, View beta, uintptr_t state,
                 uintptr_t o, uintptr_t final_state) {
  Problem problem =
      describe(gate, delta, normalize, scale, sequences, T, H, HV, K, V, offsets, q, k, v, g, beta, state);
  check_offsets(problem.offsets, sequences, T);
  problem.o = reinterpret_cast<void*>(o);
  problem.final_state = reinterpret_cast<float*>(final_state);
  check_given("o", problem.o, problem.reads && problem.first(sequences) > 0);
  check_given("final_state", problem.final_state, sequences > 0);
  py::gil_scoped_release unlocked;
  forward(problem);
}

void run_backward(int gate, bool delta, bool normalize, float scale, int64_t sequences, int64_t T, int64_t H,
                  int64_t HV, int64_t K, int64_t V, uintptr_t offsets, View q, View k, View v, View g, View beta,
                  uintptr_t state, View dout, uintptr_t dfinal, uintptr_t dq, uintptr_t dk, int key_type, uintptr_t dv,
                  uintptr_t dg, uintptr_t dbeta, uintptr_t dstate) {
  const Problem problem =
      describe(gate, delta, normalize, scale, sequences, T, H, HV, K, V, offsets, q, k, v, g, beta, state);
  check_offsets(problem.offsets, sequences, T);
  auto pointer = [](uintptr_t address) { return reinterpret_cast<void*>(address); };
  const Gradients gradients{rows("do", dout),
                            static_cast<const float*>(pointer(dfinal)),
                            pointer(dq),
                            pointer(dk),
                            check_type("key_type", key_type),
                            pointer(dv),
                            pointer(dg),
                            pointer(dbeta),
                            static_cast<float*>(pointer(dstate))};
  const int64_t tokens = problem.first(sequences);
  check_rows("do", gradients.dout, tokens, problem.reads);
  check_given("dq", gradients.dq, problem.reads && tokens > 0);
  check_given("dk", gradients.dk, tokens > 0);
  check_given("dv", gradients.dv, tokens > 0);
  check_given("dg", gradients.dg, problem.gate != Gate::none && tokens > 0);
  if (H != HV && gradients.key_type != Type::float32) refuse("key_type", std::to_string(key_type), "0 where H < HV");
  py::gil_scoped_release unlocked;
  backward(problem, gradients);
}

void check(const Problem& p, const Replay& r) {
  check_between("passes", r.passes, 1, PASSES_LIMIT);
  check_given("final_state", p.final_state, p.sequences > 0);
  if (std::isnan(r.tol)) refuse("tol", "nan", "a number");
  check_given("residual", r.residual, r.tol > 0 && p.sequences > 0);
  check_given("made", r.made, r.tol > 0 && p.sequences > 0);
  if (!r.rank) return;
  if (p.gate == Gate::channel) refuse("rank", "channel decay", "one decay a head, or none");
  if (r.tol > 0) refuse("tol", std::to_string(r.tol), "0 with rank, which forms no state of a pass");
  check_between("T", p.longest(), 0, RANK_LIMIT);
}

void run_replay(int gate, bool delta, bool normalize, float scale, int64_t sequences, int64_t T, int64_t H, int64_t HV,
                int64_t K, int64_t V, uintptr_t offsets, View q, View k, View v, View g, View beta, uintptr_t state,
                uintptr_t final_state, bool rank, int64_t passes, double tol, uintptr_t before, uintptr_t residual,
                uintptr_t made) {
  Problem problem =
      describe(gate, delta, normalize, scale, sequences, T, H, HV, K, V, offsets, q, k, v, g, beta, state);
  check_offsets(problem.offsets, sequences, T);
  problem.final_state = reinterpret_cast<float*>(final_state);
  Interrupt interrupt(signalled);
  const Replay how{rank,
                   passes,
                   tol,
                   reinterpret_cast<float*>(before),
                   reinterpret_cast<float*>(residual),
                   reinterpret_cast<int32_t*>(made),
                   &interrupt};
  check(problem, how);
  {
    const py::gil_scoped_release unlocked;
    replay(problem, how);
  }
  if (interrupt.stop) throw py::error_already_set();
}

std::vector<std::string> isa_names() {
  std::array<const Implementation*, 8> list;
  const int n = implementations(list.data(), list.size());
  std::vector<std::string> names;
  for (int i = 0; i < n; ++i) names.emplace_back(list[i]->name);
  return names;
}

void set_isa(const std::string& name) {
  if (set_implementation(name.c_str())) return;
  std::string known;
  for (const std::string& isa : isa_names()) known += (known.empty() ? "" : ", ") + isa;
  throw py::value_error("isa: got '" + name + "'; expected one this machine runs: " + known);
}

double peak_gflops(double seconds) {
  if (!(seconds >= 0 && seconds <= 600)) refuse("seconds", std::to_string(seconds), "from 0 to 600");
  py::gil_scoped_release unlocked;
  return implementation().peak(seconds) * 1e-9;
}

// One dict a GPU; none where the module was built without CUDA or the machine has no GPU.
py::list cuda_devices() {
  py::list found;
#ifdef SLEEPKERN_HAS_CUDA
  for (const cuda::Device& d : cuda::devices()) {
    py::dict device;
    device["name"] = d.name;
    device["capability"] = py::make_tuple(d.major, d.minor);
    device["memory"] = d.memory;
    device["multiprocessors"] = d.multiprocessors;
    device["shared_memory"] = d.shared_memory;
    found.append(device);
  }
#endif
  return found;
}

#ifdef SLEEPKERN_HAS_CUDA
constexpr bool HAS_CUDA = true;
#else
constexpr bool HAS_CUDA = false;
#endif

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "Native kernels of sleepkern. Import torch first: the threads are torch's.";
  bind_express(m);
  m.def("forward", &run_forward);
  m.def("backward", &run_backward);
  m.def("replay", &run_replay);
  m.attr("head_limit") = HEAD_LIMIT;
  m.attr("rank_limit") = RANK_LIMIT;
  bind_mixer(m);
  bind_blocks(m);
  m.def("step_limit", [] { return STEP_LIMIT; }, "Sequences of at most this many tokens are stepped one by one.");
  m.def("isa", [] { return std::string(implementation().name); }, "The instruction set in use.");
  m.def("isas", &isa_names, "Those this machine runs, best first.");
  m.def("set_isa", &set_isa, "Use another one, for tests and benchmarks.");
  m.def("threads_source", &thread_source, "Whose threads: torch, openmp or none.");
  m.def("peak_gflops", &peak_gflops, "GFLOP/s that one core reaches from registers, measured for some seconds.");
  m.attr("has_cuda") = HAS_CUDA;
  m.def("cuda_devices", &cuda_devices, "The GPUs that the CUDA run-time library sees.");
#ifdef SLEEPKERN_HAS_CUDA
  bind_cuda(m);
#endif
}
