// A stack of blocks; sleepkern/backends/cpu/blocks.py fills the fields of the call and of its layers.
#include "common/blocks.h"

#include "bindings/named.h"
#include "common/interrupt.h"
#include "cpu/runtime/huge_pages.h"

namespace py = pybind11;

namespace sleepkern {
namespace {

using Address = uintptr_t;

// Checks sizes against each other; the size of the memory at an address is the caller's responsibility.
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
  if (form == Form::bfloat16 && !multiplies_bf16()) {
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

void run_blocks(Blocks& b) {
  Interrupt interrupt(signalled);
  b.interrupt = &interrupt;
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

// Binds a field that is a number or a bool.
template <auto member>
void number(py::class_<Layer>& layer, const char* name) {
  layer.def_readwrite(name, member);
}

// Binds a field that is a pointer, as an attribute that holds its address.
template <auto member>
void pointer(py::class_<Layer>& layer, const char* name) {
  using Pointer = std::decay_t<decltype(std::declval<Layer&>().*member)>;
  layer.def_property(
      name, [](const Layer& l) { return reinterpret_cast<Address>(l.*member); },
      [](Layer& l, Address address) { l.*member = reinterpret_cast<Pointer>(address); });
}

// Binds a packed matrix, as an attribute (address, balance).
template <auto member>
void weights(py::class_<Layer>& layer, const char* name) {
  layer.def_property(
      name,
      [](const Layer& l) { return std::pair(reinterpret_cast<Address>((l.*member).packed), (l.*member).balance); },
      [](Layer& l, const std::pair<Address, float>& given) {
        l.*member = {reinterpret_cast<const void*>(given.first), given.second};
      });
}

// Binds an array of float32, as an attribute that holds its address.
template <auto member>
void floats(py::class_<Layer>& layer, const char* name) {
  layer.def_property(
      name, [](const Layer& l) { return reinterpret_cast<Address>((l.*member).data); },
      [](Layer& l, Address address) { l.*member = {reinterpret_cast<const void*>(address), Type::float32}; });
}

void bind_layer(py::module_& m) {
  py::class_<Layer> layer(m, "Layer", py::module_local(),
                          "Sizes and addresses of one block; csrc/common/blocks.h says what each is.");
  layer.def(py::init([] { return Layer{}; }));
  layer.def("copy", [](const Layer& l) { return l; });
  number<&Layer::recurrent>(layer, "recurrent");
  weights<&Layer::into>(layer, "into");
  number<&Layer::into_width>(layer, "into_width");
  weights<&Layer::out>(layer, "out");
  weights<&Layer::up>(layer, "up");
  pointer<&Layer::down>(layer, "down");
  number<&Layer::hidden>(layer, "hidden");
  number<&Layer::mixer_eps>(layer, "mixer_eps");
  number<&Layer::mlp_eps>(layer, "mlp_eps");
  number<&Layer::H>(layer, "H");

  number<&Layer::HV>(layer, "HV");
  number<&Layer::K>(layer, "K");
  number<&Layer::V>(layer, "V");
  number<&Layer::W>(layer, "W");
  number<&Layer::decay_bias>(layer, "decay_bias");
  number<&Layer::strength>(layer, "strength");
  floats<&Layer::taps>(layer, "taps");
  floats<&Layer::gain>(layer, "gain");
  number<&Layer::gain_eps>(layer, "gain_eps");
  pointer<&Layer::past>(layer, "past");
  pointer<&Layer::last>(layer, "last");
  pointer<&Layer::state>(layer, "state");

  pointer<&Layer::q_gain>(layer, "q_gain");
  pointer<&Layer::k_gain>(layer, "k_gain");
  number<&Layer::q_eps>(layer, "q_eps");
  number<&Layer::k_eps>(layer, "k_eps");
  number<&Layer::kept>(layer, "kept");
  pointer<&Layer::keys>(layer, "keys");
  pointer<&Layer::values>(layer, "values");
  pointer<&Layer::all_keys>(layer, "all_keys");
  pointer<&Layer::all_values>(layer, "all_values");
}

}  // namespace

void bind_blocks(py::module_& m) {
  py::enum_<Form>(m, "Form", "How the operands of products with weights are taken.")
      .value("plain", Form::plain)
      .value("winograd", Form::winograd)
      .value("bfloat16", Form::bfloat16);
  bind_layer(m);
  NamedFunction<Blocks, run_blocks>::bind(
      m, "sleep_blocks",
      {field<Blocks, &Blocks::B>("B"), field<Blocks, &Blocks::L>("L"), field<Blocks, &Blocks::d>("d"),
       field<Blocks, &Blocks::passes>("passes"), field<Blocks, &Blocks::reinject>("reinject"),
       field<Blocks, &Blocks::carry>("carry"), field<Blocks, &Blocks::form>("form"),
       field<Blocks, &Blocks::layers>("layers"), field<Blocks, &Blocks::h>("h"),
       field<Blocks, &Blocks::changes>("changes")});
  m.def("pack_weight", &run_pack, py::arg("matrix"), py::arg("n"), py::arg("depth"), py::arg("form"),
        py::arg("packed"));
  m.def(
      "packed_size",
      [](int64_t n, int64_t depth, Form form) {
        check_matrix(n, depth, form);
        return packed_size(n, depth, form);
      },
      py::arg("n"), py::arg("depth"), py::arg("form"), "Floats that a packed matrix [n, depth] takes.");
  m.def(
      "prefer_huge_pages",
      [](Address memory, int64_t bytes) {
        check_at_least("bytes", bytes, 0);
        prefer_huge_pages(reinterpret_cast<void*>(memory), bytes);
      },
      py::arg("memory"), py::arg("bytes"), "Advice for memory that is about to be written whole.");
  m.def("panel_width", &panel_width);
  m.def("adds_beside_products", &adds_beside_products, "Whether Form.winograd is the faster one here.");
  m.def("multiplies_bf16", &multiplies_bf16, "Whether products of the instruction set in use can take bfloat16.");
}

}  // namespace sleepkern
