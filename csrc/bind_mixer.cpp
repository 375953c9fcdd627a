// Short convolution and gated norm; sleepkern/nn/native.py holds the other side of each signature.
#include "bind.h"
#include "mixer.h"

namespace py = pybind11;

namespace sleepkern {
namespace {

using Address = uintptr_t;
using Typed = std::tuple<Address, int>;

void* at(Address address) { return reinterpret_cast<void*>(address); }

Array array(const Typed& typed) { return {at(std::get<0>(typed)), static_cast<Type>(std::get<1>(typed))}; }

Convolution describe(int64_t sequences, int64_t T, int64_t D, int64_t W, Address offsets, bool silu, View x,
                     Typed weight, Typed bias, Address past) {
  Convolution c{};
  c.sequences = sequences;
  c.T = T;
  c.D = D;
  c.W = W;
  c.offsets = static_cast<const int64_t*>(at(offsets));
  c.silu = silu;
  c.x = rows(x);
  c.weight = array(weight);
  c.bias = array(bias);
  c.past = at(past);
  return c;
}

void run_convolve(int64_t sequences, int64_t T, int64_t D, int64_t W, Address offsets, bool silu, View x, Typed weight,
                  Typed bias, Address past, Address y, Address last) {
  Convolution c = describe(sequences, T, D, W, offsets, silu, x, weight, bias, past);
  c.y = at(y);
  c.last = at(last);
  py::gil_scoped_release unlocked;
  convolve(c);
}

void run_convolve_backward(int64_t sequences, int64_t T, int64_t D, int64_t W, Address offsets, bool silu, View x,
                           Typed weight, Typed bias, Address past, View dy, Address dlast, Address dx, Address dpast,
                           Address dweight, Address dbias) {
  const Convolution c = describe(sequences, T, D, W, offsets, silu, x, weight, bias, past);
  const ConvolutionGradients g{
      rows(dy), at(dlast), at(dx), at(dpast), static_cast<float*>(at(dweight)), static_cast<float*>(at(dbias))};
  py::gil_scoped_release unlocked;
  convolve_backward(c, g);
}

void run_convolve_step(int64_t B, int64_t D, int64_t W, bool silu, View x, Typed weight, Typed bias, Address state,
                       Address y) {
  const ConvolutionStep s{B, D, W, silu, rows(x), array(weight), array(bias), at(state), at(y)};
  py::gil_scoped_release unlocked;
  convolve_step(s);
}

GatedNorm describe(int64_t tokens, int64_t heads, int64_t V, bool silu, bool gate_first, float eps, View x, View gate,
                   Typed weight, bool weight_heads) {
  return {tokens, heads, V, silu, gate_first, eps, rows(x), rows(gate), array(weight), weight_heads, nullptr};
}

void run_gated_norm(int64_t tokens, int64_t heads, int64_t V, bool silu, bool gate_first, float eps, View x, View gate,
                    Typed weight, bool weight_heads, Address y) {
  GatedNorm p = describe(tokens, heads, V, silu, gate_first, eps, x, gate, weight, weight_heads);
  p.y = at(y);
  py::gil_scoped_release unlocked;
  gated_norm(p);
}

void run_gated_norm_backward(int64_t tokens, int64_t heads, int64_t V, bool silu, bool gate_first, float eps, View x,
                             View gate, Typed weight, bool weight_heads, View dy, Address dx, Address dgate,
                             int64_t parts, Address dweight) {
  const GatedNorm p = describe(tokens, heads, V, silu, gate_first, eps, x, gate, weight, weight_heads);
  const GatedNormGradients g{rows(dy), at(dx), at(dgate), parts, static_cast<float*>(at(dweight))};
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
