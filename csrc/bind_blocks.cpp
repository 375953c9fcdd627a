// A stack of blocks; sleepkern/sleep/packed.py holds the other side: a layer is a dict of sizes and addresses.
#include "bind.h"
#include "blocks.h"

namespace py = pybind11;

namespace sleepkern {
namespace {

using Address = uintptr_t;

class Described {
 public:
  explicit Described(const py::dict& values) : values_(values) {}
  template <class T>
  T get(const char* name) const {
    return values_[name].cast<T>();
  }
  float* at(const char* name) const { return reinterpret_cast<float*>(get<Address>(name)); }
  Array array(const char* name) const { return {at(name), Type::float32}; }

 private:
  const py::dict& values_;
};

Layer layer(const py::dict& values) {
  const Described of(values);
  Layer l{};
  l.recurrent = of.get<bool>("recurrent");
  l.into = of.at("into");
  l.into_width = of.get<int64_t>("into_width");
  l.out = of.at("out");
  l.up = of.at("up");
  l.down = of.at("down");
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
    l.taps = of.array("taps");
    l.gain = of.array("gain");
    l.gain_eps = of.get<float>("gain_eps");
    l.past = of.at("past");
    l.last = of.at("last");
    l.state = of.at("state");
  } else {
    l.q_gain = of.at("q_gain");
    l.k_gain = of.at("k_gain");
    l.q_eps = of.get<float>("q_eps");
    l.k_eps = of.get<float>("k_eps");
    l.kept = of.get<int64_t>("kept");
    l.keys = of.at("keys");
    l.values = of.at("values");
    l.all_keys = of.at("all_keys");
    l.all_values = of.at("all_values");
  }
  return l;
}

void run_blocks(int64_t B, int64_t L, int64_t d, int64_t passes, bool reinject, bool carry, bool pairs,
                const std::vector<py::dict>& layers, Address h, Address changes) {
  Blocks b{
      B, L, d, passes, reinject, pairs, carry, {}, reinterpret_cast<float*>(h), reinterpret_cast<double*>(changes)};
  for (const py::dict& one : layers) b.layers.push_back(layer(one));
  py::gil_scoped_release unlocked;
  sleep_blocks(b);
}

void run_pack(Address matrix, int64_t n, int64_t depth, Address scale, bool pairs, Address packed) {
  py::gil_scoped_release unlocked;
  pack_weight(reinterpret_cast<const float*>(matrix), n, depth, reinterpret_cast<const float*>(scale), pairs,
              reinterpret_cast<void*>(packed));
}

}  // namespace

void bind_blocks(py::module_& m) {
  m.def("sleep_blocks", &run_blocks);
  m.def("pack_weight", &run_pack);
  m.def("panel_width", &panel_width);
  m.def("multiplies_pairs", &multiplies_pairs, "Whether products of the instruction set in use can take bfloat16.");
}

}  // namespace sleepkern
