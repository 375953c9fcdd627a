// Short convolution and gated norm; sleepkern/backends/cpu/mixer.py holds the other side of each signature.
#include "common/mixer_ops.h"

#include "bindings/arguments.h"

namespace py = pybind11;

namespace sleepkern {
namespace {

using Address = uintptr_t;
using Typed = std::tuple<Address, int>;

void* at(Address address) { return reinterpret_cast<void*>(address); }

Array array(const char* name, const Typed& typed) {
  return {at(std::get<0>(typed)), check_type(name, std::get<1>(typed))};
}

Convolution describe(int64_t sequences, int64_t T, int64_t D, int64_t W, Address offsets, bool silu, View x,
                     Typed weight, Typed bias, Address past) {
  Convolution c{};
  c.sequences = sequences;
  c.T = T;
  c.D = D;
  c.W = W;
  c.offsets = static_cast<const int64_t*>(at(offsets));
  c.silu = silu;
  c.x = rows("x", x);
  c.weight = array("weight", weight);
  c.bias = array("bias", bias);
  c.past = at(past);
  check_at_least("sequences", sequences, 0);
  check_at_least("T", T, 0);
  check_at_least("D", D, 1);
  check_between("W", W, 1, CONVOLUTION_LIMIT);
  check_product("sequences, T, D, W", {sequences, T, D, W});
  check_product("sequences, D, W", {sequences, D, W});
  check_offsets(c.offsets, sequences, T);
  check_rows("x", c.x, c.tokens(), true);
  check_given("weight", c.weight.data);
  return c;
}

void run_convolve(int64_t sequences, int64_t T, int64_t D, int64_t W, Address offsets, bool silu, View x, Typed weight,
                  Typed bias, Address past, Address y, Address last) {
  Convolution c = describe(sequences, T, D, W, offsets, silu, x, weight, bias, past);
  c.y = at(y);
  c.last = at(last);
  check_given("y", c.y, c.tokens() > 0);
  check_given("last", c.last, sequences > 0 && W > 1);
  py::gil_scoped_release unlocked;
  convolve(c);
}

void run_convolve_backward(int64_t sequences, int64_t T, int64_t D, int64_t W, Address offsets, bool silu, View x,
                           Typed weight, Typed bias, Address past, View dy, Address dlast, Address dx, Address dpast,
                           Address dweight, Address dbias) {
  const Convolution c = describe(sequences, T, D, W, offsets, silu, x, weight, bias, past);
  const ConvolutionGradients g{
      rows("dy", dy), at(dlast), at(dx), at(dpast), static_cast<float*>(at(dweight)), static_cast<float*>(at(dbias))};
  check_rows("dy", g.dy, c.tokens(), true);
  check_given("dx", g.dx, c.tokens() > 0);
  check_given("dweight", g.dweight);
  py::gil_scoped_release unlocked;
  convolve_backward(c, g);
}

void run_convolve_step(int64_t B, int64_t D, int64_t W, bool silu, View x, Typed weight, Typed bias, Address state,
                       Address y) {
  const ConvolutionStep s{B, D, W, silu, rows("x", x), array("weight", weight), array("bias", bias), at(state), at(y)};
  check_at_least("B", B, 0);
  check_at_least("D", D, 1);
  check_between("W", W, 1, CONVOLUTION_LIMIT);
  check_product("B, D, W", {B, D, W});
  check_rows("x", s.x, B, true);
  check_given("weight", s.weight.data);
  check_given("state", s.state, B > 0);
  check_given("y", s.y, B > 0);
  py::gil_scoped_release unlocked;
  convolve_step(s);
}

GatedNorm describe(int64_t tokens, int64_t heads, int64_t V, bool silu, bool gate_first, float eps, View x, View gate,
                   Typed weight, bool weight_heads) {
  check_at_least("tokens", tokens, 0);
  check_at_least("heads", heads, 1);
  check_at_least("V", V, 1);
  check_product("tokens, heads, V", {tokens, heads, V});
  const GatedNorm p{
      tokens,       heads,  V, silu, gate_first, eps, rows("x", x), rows("gate", gate), array("weight", weight),
      weight_heads, nullptr};
  check_rows("x", p.x, tokens, true);
  check_rows("gate", p.gate, tokens, true);
  check_given("weight", p.weight.data);
  return p;
}

void run_gated_norm(int64_t tokens, int64_t heads, int64_t V, bool silu, bool gate_first, float eps, View x, View gate,
                    Typed weight, bool weight_heads, Address y) {
  GatedNorm p = describe(tokens, heads, V, silu, gate_first, eps, x, gate, weight, weight_heads);
  p.y = at(y);
  check_given("y", p.y, tokens > 0);
  py::gil_scoped_release unlocked;
  gated_norm(p);
}

void run_gated_norm_backward(int64_t tokens, int64_t heads, int64_t V, bool silu, bool gate_first, float eps, View x,
                             View gate, Typed weight, bool weight_heads, View dy, Address dx, Address dgate,
                             int64_t parts, Address dweight) {
  const GatedNorm p = describe(tokens, heads, V, silu, gate_first, eps, x, gate, weight, weight_heads);
  const GatedNormGradients g{rows("dy", dy), at(dx), at(dgate), parts, static_cast<float*>(at(dweight))};
  check_at_least("parts", parts, 1);
  check_product("parts, heads, V", {parts, heads, V});
  check_rows("dy", g.dy, tokens, true);
  check_given("dx", g.dx, tokens > 0);
  check_given("dgate", g.dgate, tokens > 0);
  check_given("dweight", g.dweight);
  py::gil_scoped_release unlocked;
  gated_norm_backward(p, g);
}

}  // namespace

void bind_mixer(py::module_& m) {
  m.attr("convolution_limit") = CONVOLUTION_LIMIT;
  m.def("convolve", &run_convolve);
  m.def("convolve_backward", &run_convolve_backward);
  m.def("convolve_step", &run_convolve_step);
  m.def("gated_norm", &run_gated_norm);
  m.def("gated_norm_backward", &run_gated_norm_backward);
}

}  // namespace sleepkern
