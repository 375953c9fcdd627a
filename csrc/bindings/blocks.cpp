// A stack of blocks; sleepkern/backends/cpu/blocks.py holds the other side: a layer is a dict of sizes and addresses.
#include "common/blocks.h"

#include "bindings/arguments.h"
#include "common/interrupt.h"
#include "cpu/runtime/huge_pages.h"

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

// Sizes against each other; how much memory lies at an address is the caller's word.
void check(const Layer& l, const Blocks& b) {
  check_at_least("hidden", l.hidden, 1);
  check_product("hidden, d", {l.hidden, b.d});
  for (const auto& [name, packed] : {std::pair<const char*, const void*>{"into", l.into.packed},
                                     {"out", l.out.packed},
                                     {"up", l.up.packed},
                                     {"down", l.down}}) {
    check_given(name, packed);
  }
  if (!l.recurrent) {
    check_at_least("H", l.H, 1);
    if (b.d % l.H != 0) refuse("H", std::to_string(l.H), "a divisor of d = " + std::to_string(b.d));
    check_between("into_width", l.into_width, 3 * b.d, 3 * b.d);
    check_at_least("kept", l.kept, 0);
    check_product("B, kept + L, d", {b.B, l.kept, b.d});
    check_given("q_gain", l.q_gain);
    check_given("k_gain", l.k_gain);
    check_given("keys", l.keys, l.kept > 0);
    check_given("values", l.values, l.kept > 0);
    check_given("all_keys", l.all_keys);
    check_given("all_values", l.all_values);
    return;
  }
  check_heads(l.H, l.HV);
  check_between("K", l.K, 1, HEAD_LIMIT);
  check_between("V", l.V, 1, HEAD_LIMIT);
  check_between("W", l.W, 1, CONVOLUTION_LIMIT);
  check_product("B, HV, K, V", {b.B, l.HV, l.K, l.V});
  check_product("B, L, H, K", {b.B, b.L, l.H, 2 * l.K});
  check_between("into_width", l.into_width, l.channels() + l.HV * (l.V + 2), l.channels() + l.HV * (l.V + 2));
  check_given("taps", l.taps.data);
  check_given("gain", l.gain.data);
  check_given("past", l.past, l.W > 1);
  check_given("last", l.last, l.W > 1);
  check_given("state", l.state);
}

void check_form(Form form) {
  check_between("form", static_cast<int64_t>(form), 0, 2);
  if (form == Form::bfloat16 && !multiplies_pairs()) {
    refuse("form", "bfloat16", "plain or winograd with this instruction set");
  }
}

void check(const Blocks& b) {
  check_at_least("B", b.B, 1);
  check_at_least("L", b.L, 1);
  check_at_least("d", b.d, 1);
  check_between("passes", b.passes, 1, PASSES_LIMIT);
  check_product("B, L, d", {b.B, b.L, b.d});
  check_product("B, passes", {b.B, b.passes});
  check_form(b.form);
  check_given("h", b.h);
  check_given("changes", b.changes);
  for (const Layer& one : b.layers) check(one, b);
}

void check_matrix(int64_t n, int64_t depth, Form form) {
  check_at_least("n", n, 1);
  check_at_least("depth", depth, 1);
  check_product("n, depth", {n, 128, depth});  // up to whole panels
  check_form(form);
}

void run_blocks(int64_t B, int64_t L, int64_t d, int64_t passes, bool reinject, bool carry, Form form,
                const std::vector<py::dict>& layers, Address h, Address changes) {
  Interrupt interrupt(signalled);
  Blocks b{B,
           L,
           d,
           passes,
           reinject,
           form,
           carry,
           {},
           reinterpret_cast<float*>(h),
           reinterpret_cast<double*>(changes),
           &interrupt};
  for (const py::dict& one : layers) b.layers.push_back(layer(one));
  check(b);
  {
    const py::gil_scoped_release unlocked;
    sleep_blocks(b);
  }
  if (interrupt.stop) throw py::error_already_set();
}

void run_pack(Address matrix, int64_t n, int64_t depth, Form form, Address packed) {
  check_matrix(n, depth, form);
  check_given("matrix", reinterpret_cast<const void*>(matrix));
  check_given("packed", reinterpret_cast<const void*>(packed));
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
  m.def("packed_size", [](int64_t n, int64_t depth, Form form) {
    check_matrix(n, depth, form);
    return packed_size(n, depth, form);
  });
  m.def(
      "prefer_huge_pages",
      [](Address memory, int64_t bytes) {
        check_at_least("bytes", bytes, 0);
        prefer_huge_pages(reinterpret_cast<void*>(memory), bytes);
      },
      "Advice for memory that is about to be written whole.");
  m.def("panel_width", &panel_width);
  m.def("adds_beside_products", &adds_beside_products, "Whether Form.winograd is the faster one here.");
  m.def("multiplies_pairs", &multiplies_pairs, "Whether products of the instruction set in use can take bfloat16.");
}

}  // namespace sleepkern
