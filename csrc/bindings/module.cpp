// sleepkern._C: the list of its exports.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <string>
#include <vector>

#include "bindings/arguments.h"
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

// One dict for each GPU. The list is empty if the module was built without CUDA or the machine has no GPU.
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

void export_constants(py::module_& m) {
  m.attr("head_limit") = HEAD_LIMIT;
  m.attr("convolution_limit") = CONVOLUTION_LIMIT;
  m.attr("rank_limit") = RANK_LIMIT;
  m.attr("decode_limit") = DECODE_LIMIT;
  m.attr("norm_eps") = NORM_EPS;
  m.attr("min_log_decay") = MIN_LOG_DECAY;
  py::dict types, gates;
  types["float32"] = static_cast<int>(Type::float32);
  types["bfloat16"] = static_cast<int>(Type::bfloat16);
  types["float16"] = static_cast<int>(Type::float16);
  gates["none"] = static_cast<int>(Gate::none);
  gates["head"] = static_cast<int>(Gate::head);
  gates["channel"] = static_cast<int>(Gate::channel);
  m.attr("type_codes") = types;
  m.attr("gate_codes") = gates;
}

#ifdef SLEEPKERN_HAS_CUDA
constexpr bool HAS_CUDA = true;
#else
constexpr bool HAS_CUDA = false;
#endif

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "Native kernels of sleepkern. Import torch first: the threads are torch's.";
  export_constants(m);
  bind_fast_path(m);
  bind_recurrence(m);
  bind_decode(m);
  bind_mixer(m);
  bind_blocks(m);
  bind_witness(m);
  m.def("isa", [] { return std::string(implementation().name); }, "The instruction set in use.");
  m.def("isas", &isa_names, "Those this machine runs, best first.");
  m.def("set_isa", &set_isa, py::arg("name"), "Use another one, for tests and benchmarks.");
  m.def("threads_source", &thread_source, "Whose threads: torch, openmp or none.");
  m.def("peak_gflops", &peak_gflops, py::arg("seconds"),
        "GFLOP/s that one core reaches from registers, measured for some seconds.");
  m.attr("has_cuda") = HAS_CUDA;
  m.def("cuda_devices", &cuda_devices, "The GPUs that the CUDA run-time library sees.");
#ifdef SLEEPKERN_HAS_CUDA
  bind_cuda(m);
#endif
}
