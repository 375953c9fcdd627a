// The launch for a stack of blocks. sleepkern/backends/cuda/blocks.py fills a struct for the call and one for each
// layer, once for a problem and once for the weights. What differs between two calls are arguments, because setting a
// field of a struct takes a third of a microsecond.
#include "bindings/arguments.h"
#include "bindings/struct_fields.h"
#include "cuda/blocks/api.h"
#include "cuda/blocks/weight_order.h"

namespace py = pybind11;

namespace sleepkern {
namespace {

cuda::BlocksParams with_layers(const cuda::BlocksParams& params, const py::list& layers) {
  cuda::BlocksParams whole = params;
  if (layers.size() > cuda::MOST_LAYERS) throw std::runtime_error("sleepkern: more layers than a launch takes");
  whole.depth = 0;
  for (const py::handle layer : layers) whole.layers[whole.depth++] = layer.cast<const cuda::BlockLayer&>();
  return whole;
}

using Address = uintptr_t;

// What a layer carries through a call: the index of its first sums, and
//   recurrent  whether there is a state before, the addresses of the state, of the convolution's last inputs, and of
//   its
//              inputs before
//   attention  the tokens before, the addresses of keys and values, and 0
using Carried = std::tuple<int32_t, int32_t, Address, Address, Address>;

template <class T>
void point(T*& field, Address address) {
  field = reinterpret_cast<T*>(address);
}

void carry(cuda::BlockLayer& layer, const Carried& carried) {
  const auto& [first_sum, before, first, second, third] = carried;
  layer.first_sum = first_sum;
  if (layer.recurrent) {
    layer.continued = before;
    point(layer.state, first);
    point(layer.last, second);
    point(layer.past, third);
  } else {
    layer.kept = before;
    point(layer.keys, first);
    point(layer.values, second);
  }
}

void run_blocks(const cuda::BlocksParams& params, const py::list& layers, const std::vector<Carried>& carried,
                Address h, Address out, Address weights, Address stages, Address changes, Address stream) {
  cuda::BlocksParams whole = with_layers(params, layers);
  if (carried.size() != layers.size()) throw std::runtime_error("sleepkern: what layers carry is not one of each");
  for (size_t i = 0; i < carried.size(); ++i) carry(whole.layers[i], carried[i]);
  point(whole.h, h);
  point(whole.out, out);
  point(whole.weights, weights);
  point(whole.stages, stages);
  point(whole.changes, changes);
  py::gil_scoped_release unlocked;
  cuda::sleep_blocks(whole, reinterpret_cast<void*>(stream));
}

#define SLEEPKERN_FIELD(name) bind_field(type, #name, &Struct::name)

void bind_layer(py::module_& m) {
  using Struct = cuda::BlockLayer;
  py::class_<Struct> type(m, "CudaBlockLayer", py::module_local());
  type.def(py::init([] { return Struct{}; }));
  SLEEPKERN_FIELD(recurrent);
  SLEEPKERN_FIELD(heads);
  SLEEPKERN_FIELD(value_heads);
  SLEEPKERN_FIELD(K);
  SLEEPKERN_FIELD(V);
  SLEEPKERN_FIELD(KP);
  SLEEPKERN_FIELD(VP);
  SLEEPKERN_FIELD(W);
  SLEEPKERN_FIELD(into);
  SLEEPKERN_FIELD(hidden);
  SLEEPKERN_FIELD(mixer_eps);
  SLEEPKERN_FIELD(mlp_eps);
  // gated DeltaNet
  SLEEPKERN_FIELD(taps);
  SLEEPKERN_FIELD(gain);
  SLEEPKERN_FIELD(decay_bias);
  SLEEPKERN_FIELD(strength);
  SLEEPKERN_FIELD(gain_eps);
  // attention
  SLEEPKERN_FIELD(q_gain);
  SLEEPKERN_FIELD(k_gain);
  SLEEPKERN_FIELD(q_eps);
  SLEEPKERN_FIELD(k_eps);
}

void bind_call(py::module_& m) {
  using Struct = cuda::BlocksParams;
  py::class_<Struct> type(m, "CudaBlocks", py::module_local());
  type.def(py::init([] { return Struct{}; }));
  SLEEPKERN_FIELD(tiles);
  SLEEPKERN_FIELD(cluster);
  SLEEPKERN_FIELD(group);
  SLEEPKERN_FIELD(exchange);
  SLEEPKERN_FIELD(ring);
  SLEEPKERN_FIELD(columns);
  SLEEPKERN_FIELD(L);
  SLEEPKERN_FIELD(type);
  SLEEPKERN_FIELD(B);
  SLEEPKERN_FIELD(d);
  SLEEPKERN_FIELD(passes);
  SLEEPKERN_FIELD(reinject);
  SLEEPKERN_FIELD(carry);
  SLEEPKERN_FIELD(sums);
}

void bind_weight_order(py::module_& m) {
  using cuda::WeightOrder;
  py::class_<WeightOrder>(m, "CudaWeightOrder", py::module_local())
      .def(py::init([](const cuda::BlocksParams& params, const py::list& layers, const std::vector<int>& hidden) {
             return cuda::weight_order(with_layers(params, layers), hidden);
           }),
           py::arg("call"), py::arg("layers"), py::arg("hidden"))
      .def_readonly("stages", &WeightOrder::stages)
      .def("copy_indices", [](const WeightOrder& order, uintptr_t address) {
        auto* to = reinterpret_cast<int32_t*>(address);
        for (const std::vector<int32_t>& stream : order.streams) to = std::copy(stream.begin(), stream.end(), to);
      });
}

// The kernels' constants that the plan in Python uses.
void bind_constants(py::module_& m) {
  struct Constants {};
  py::class_<Constants> type(m, "CudaBlocksConstants", py::module_local());
  type.attr("MOST_LAYERS") = cuda::MOST_LAYERS;
  type.attr("WIDEST_MODEL") = cuda::WIDEST_MODEL;
  type.attr("WIDEST_HEAD") = cuda::WIDEST_HEAD;
  type.attr("LONGEST") = cuda::LONGEST;
  type.attr("TAPS") = cuda::TAPS;
  type.attr("WARPS") = cuda::WARPS;
  type.attr("TILES") = py::make_tuple(cuda::TILES_OF[0], cuda::TILES_OF[1], cuda::TILES_OF[2]);
  type.attr("STAGE") = cuda::STAGE;
}

}  // namespace

void bind_cuda_blocks(py::module_& m) {
  using py::arg;
  bind_weight_order(m);
  bind_constants(m);
  m.def("cuda_blocks_paired", &cuda::paired, arg("tiles"), "Whether a warp multiplies by two groups at a time.");
  bind_layer(m);
  bind_call(m);
  m.def("cuda_blocks", &run_blocks, arg("call"), arg("layers"), arg("carried"), py::kw_only(), arg("h"), arg("out"),
        arg("weights"), arg("stages"), arg("changes"), arg("stream"));
  m.def(
      "cuda_blocks_memory",
      [](const cuda::BlocksParams& params, const py::list& layers) {
        return cuda::blocks_memory(with_layers(params, layers));
      },
      arg("call"), arg("layers"), "Bytes of shared memory of a CTA.");
}

}  // namespace sleepkern
