// The launches of csrc/cuda as a Python module whose "GPU" is the CPU.
#include "bindings/arguments.h"
#include "bindings/fast_path.h"
#include "cuda_on_cpu.h"

namespace py = pybind11;

PYBIND11_MODULE(cuda_on_cpu, m) {
  sleepkern::bind_cuda(m);
  m.def("use_exchange_api", &sleepkern::use_exchange_api);
  m.attr("head_limit") = sleepkern::HEAD_LIMIT;
  m.def("set_options", [](const std::string& order, unsigned seed, int capability, bool early_copies) {
    using cuda_on_cpu::Order;
    cuda_on_cpu::options.order = order == "forward"    ? Order::forward
                                 : order == "backward" ? Order::backward
                                                       : Order::random;
    cuda_on_cpu::options.seed = seed;
    cuda_on_cpu::options.capability = capability;
    cuda_on_cpu::options.early_copies = early_copies;
  });
}
