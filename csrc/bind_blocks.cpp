// A stack of blocks; sleepkern/sleep/packed.py holds the other side: a layer is a dict of sizes and addresses.
#include "bind.h"
#include "blocks.h"
#include "cpu/memory.h"

namespace py = pybind11;

namespace sleepkern {
namespace {

using Address = uintptr_t;

Array floats(const Described& of, const char* name) { return {of.get<float*>(name), Type::float32}; }

Weights weights(const Described& of, const char* name, const char* balance) {
  return {of.get<float*>(name), of.get<float>(balance)};
}

Layer layer(const py::dict& values) {
  const Described of(values);
  Layer l{};
  l.recurrent = of.get<bool>("recurrent");
  l.into = weights(of, "into", "into_balance");
  l.into_width = of.get<int64_t>("into_width");
  l.out = weights(of, "out", "out_balance");
  l.up = weights(of, "up", "up_balance");
  l.down = of.get<float*>("down");
  l.hidden = of.get<int64_t>("hidden");
  l.mixer_eps = of.get<float>("mixer_eps");
  l.mlp_eps = of.get<float>("mlp_eps");
  l.H = of.get<int64_t>("H");
  if (l.recurrent) {
    l.HV = of.get<int64_t>("HV");
    l.K = of.get<int64_t>("K");
    l.V = of.get<int64_t>("V");
    l.W = of.get<int64_t>("W");
    l.decay_bias = of.get<float>("decay_bias");
    l.strength = of.get<float>("strength");
    l.taps = floats(of, "taps");
    l.gain = floats(of, "gain");
    l.gain_eps = of.get<float>("gain_eps");
    l.past = of.get<float*>("past");
    l.last = of.get<float*>("last");
    l.state = of.get<float*>("state");
  } else {
    l.q_gain = of.get<float*>("q_gain");
    l.k_gain = of.get<float*>("k_gain");
    l.q_eps = of.get<float>("q_eps");
    l.k_eps = of.get<float>("k_eps");
    l.kept = of.get<int64_t>("kept");
    l.keys = of.get<float*>("keys");
    l.values = of.get<float*>("values");
    l.all_keys = of.get<float*>("all_keys");
    l.all_values = of.get<float*>("all_values");
  }
  return l;
}

void run_blocks(int64_t B, int64_t L, int64_t d, int64_t passes, bool reinject, bool carry, Form form,
                const std::vector<py::dict>& layers, Address h, Address changes) {
  Blocks b{B, L, d, passes, reinject, form, carry, {}, reinterpret_cast<float*>(h), reinterpret_cast<double*>(changes)};
  for (const py::dict& one : layers) b.layers.push_back(layer(one));
  py::gil_scoped_release unlocked;
  sleep_blocks(b);
}

void run_pack(Address matrix, int64_t n, int64_t depth, Form form, Address packed) {
  py::gil_scoped_release unlocked;
  pack_weight(reinterpret_cast<const float*>(matrix), n, depth, form, reinterpret_cast<void*>(packed));
}

}  // namespace

void bind_blocks(py::module_& m) {
  py::enum_<Form>(m, "Form", "How the operands of products with weights are taken.")
      .value("plain", Form::plain)
      .value("winograd", Form::winograd)
      .value("bfloat16", Form::bfloat16);
  m.def("sleep_blocks", &run_blocks);
  m.def("pack_weight", &run_pack);
  m.def("packed_size", &packed_size);
  m.def(
      "prefer_huge_pages",
      [](Address memory, int64_t bytes) { prefer_huge_pages(reinterpret_cast<void*>(memory), bytes); },
      "Advice for memory that is about to be written whole.");
  m.def("panel_width", &panel_width);
  m.def("adds_beside_products", &adds_beside_products, "Whether Form.winograd is the faster one here.");
  m.def("multiplies_pairs", &multiplies_pairs, "Whether products of the instruction set in use can take bfloat16.");
}

}  // namespace sleepkern
