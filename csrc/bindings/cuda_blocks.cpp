// The launch for a stack of blocks; sleepkern/backends/cuda/blocks.py holds the other side: the call and each layer are
// dicts of sizes and addresses.
#include "bindings/arguments.h"
#include "cuda/blocks/api.h"

namespace py = pybind11;

namespace sleepkern {
namespace {

#define SLEEPKERN_READ(field) of.read(#field, to.field)

// What the memory of a launch depends on.
void read_share(const Described& of, cuda::BlockLayer& to) {
  SLEEPKERN_READ(recurrent);
  SLEEPKERN_READ(heads);
  SLEEPKERN_READ(value_heads);
  SLEEPKERN_READ(K);
  SLEEPKERN_READ(V);
  SLEEPKERN_READ(KP);
  SLEEPKERN_READ(VP);
  SLEEPKERN_READ(W);
  SLEEPKERN_READ(into);
  SLEEPKERN_READ(hidden);
}

void read_layer(const Described& of, cuda::BlockLayer& to) {
  SLEEPKERN_READ(first_unit);
  SLEEPKERN_READ(mixer_eps);
  SLEEPKERN_READ(mlp_eps);
  if (to.recurrent) {
    SLEEPKERN_READ(taps);
    SLEEPKERN_READ(gain);
    SLEEPKERN_READ(state);
    SLEEPKERN_READ(past);
    SLEEPKERN_READ(last);
    SLEEPKERN_READ(continued);
    SLEEPKERN_READ(decay_bias);
    SLEEPKERN_READ(strength);
    SLEEPKERN_READ(gain_eps);
  } else {
    SLEEPKERN_READ(q_gain);
    SLEEPKERN_READ(k_gain);
    SLEEPKERN_READ(keys);
    SLEEPKERN_READ(values);
    SLEEPKERN_READ(kept);
    SLEEPKERN_READ(q_eps);
    SLEEPKERN_READ(k_eps);
  }
}

cuda::BlocksCall read_sizes(const py::dict& values, const std::vector<py::dict>& layers) {
  cuda::BlocksCall to{};
  const Described of(values);
  SLEEPKERN_READ(tiles);
  SLEEPKERN_READ(cluster);
  SLEEPKERN_READ(group);
  SLEEPKERN_READ(exchange);
  SLEEPKERN_READ(ring);
  SLEEPKERN_READ(columns);
  SLEEPKERN_READ(L);
  if (layers.size() > cuda::MOST_LAYERS) throw std::runtime_error("sleepkern: more layers than a launch takes");
  to.depth = static_cast<int32_t>(layers.size());
  for (int i = 0; i < to.depth; ++i) read_share(Described(layers[i]), to.layers[i]);
  return to;
}

cuda::BlocksCall read_call(const py::dict& values, const std::vector<py::dict>& layers) {
  cuda::BlocksCall to = read_sizes(values, layers);
  const Described of(values);
  SLEEPKERN_READ(h);
  SLEEPKERN_READ(out);
  SLEEPKERN_READ(weights);
  SLEEPKERN_READ(stages);
  SLEEPKERN_READ(changes);
  SLEEPKERN_READ(type);
  SLEEPKERN_READ(B);
  SLEEPKERN_READ(d);
  SLEEPKERN_READ(passes);
  SLEEPKERN_READ(reinject);
  SLEEPKERN_READ(carry);
  SLEEPKERN_READ(units);
  for (int i = 0; i < to.depth; ++i) read_layer(Described(layers[i]), to.layers[i]);
  return to;
}

void run_blocks(const py::dict& values, const std::vector<py::dict>& layers, uintptr_t stream) {
  const cuda::BlocksCall call = read_call(values, layers);
  py::gil_scoped_release unlocked;
  cuda::sleep_blocks(call, reinterpret_cast<void*>(stream));
}

}  // namespace

void bind_cuda_blocks(py::module_& m) {
  m.def("cuda_blocks", &run_blocks);
  m.def("cuda_blocks_memory", [](const py::dict& values, const std::vector<py::dict>& layers) {
    return cuda::blocks_memory(read_sizes(values, layers));
  });
  m.attr("cuda_blocks_layers") = cuda::MOST_LAYERS;
}

}  // namespace sleepkern
