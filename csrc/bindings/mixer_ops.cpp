// Short convolution and gated norm; sleepkern/backends/cpu/mixer.py fills the fields.
#include "common/mixer_ops.h"

#include "bindings/named.h"

namespace py = pybind11;

namespace sleepkern {
namespace {

struct ConvolutionBackward : Convolution, ConvolutionGradients {};
struct GatedNormBackward : GatedNorm, GatedNormGradients {};

template <class Call>
std::vector<Field<Call>> convolution_fields() {
  return {field<Call, &Convolution::sequences>("sequences"),
          field<Call, &Convolution::T>("T"),
          field<Call, &Convolution::D>("D"),
          field<Call, &Convolution::W>("W"),
          field<Call, &Convolution::offsets>("offsets"),
          field<Call, &Convolution::silu>("silu"),
          field<Call, &Convolution::x>("x"),
          field<Call, &Convolution::weight>("weight"),
          field<Call, &Convolution::bias>("bias"),
          field<Call, &Convolution::past>("past")};
}

void check(const Convolution& c) {
  check_at_least("sequences", c.sequences, 0);
  check_at_least("T", c.T, 0);
  check_at_least("D", c.D, 1);
  check_between("W", c.W, 1, CONVOLUTION_LIMIT);
  check_product("sequences, T, D, W", {c.sequences, c.T, c.D, c.W});
  check_product("sequences, D, W", {c.sequences, c.D, c.W});
  check_offsets(c.offsets, c.sequences, c.T);
  check_rows("x", c.x, c.tokens(), true);
  check_given("weight", c.weight.data);
}

void run_convolve(Convolution& c) {
  check(c);
  check_given("y", c.y, c.tokens() > 0);
  check_given("last", c.last, c.sequences > 0 && c.W > 1);
  py::gil_scoped_release unlocked;
  convolve(c);
}

void run_convolve_backward(ConvolutionBackward& call) {
  check(call);
  check_rows("dy", call.dy, call.tokens(), true);
  check_given("dx", call.dx, call.tokens() > 0);
  check_given("dweight", call.dweight);
  py::gil_scoped_release unlocked;
  convolve_backward(call, call);
}

void run_convolve_step(ConvolutionStep& s) {
  check_at_least("B", s.B, 0);
  check_at_least("D", s.D, 1);
  check_between("W", s.W, 1, CONVOLUTION_LIMIT);
  check_product("B, D, W", {s.B, s.D, s.W});
  check_rows("x", s.x, s.B, true);
  check_given("weight", s.weight.data);
  check_given("state", s.state, s.B > 0);
  check_given("y", s.y, s.B > 0);
  py::gil_scoped_release unlocked;
  convolve_step(s);
}

template <class Call>
std::vector<Field<Call>> gated_norm_fields() {
  return {field<Call, &GatedNorm::tokens>("tokens"),
          field<Call, &GatedNorm::heads>("heads"),
          field<Call, &GatedNorm::V>("V"),
          field<Call, &GatedNorm::silu>("silu"),
          field<Call, &GatedNorm::gate_first>("gate_first"),
          field<Call, &GatedNorm::eps>("eps"),
          field<Call, &GatedNorm::x>("x"),
          field<Call, &GatedNorm::gate>("gate"),
          field<Call, &GatedNorm::weight>("weight"),
          field<Call, &GatedNorm::weight_heads>("weight_heads")};
}

void check(const GatedNorm& p) {
  check_at_least("tokens", p.tokens, 0);
  check_at_least("heads", p.heads, 1);
  check_at_least("V", p.V, 1);
  check_product("tokens, heads, V", {p.tokens, p.heads, p.V});
  check_rows("x", p.x, p.tokens, true);
  check_rows("gate", p.gate, p.tokens, true);
  check_given("weight", p.weight.data);
}

void run_gated_norm(GatedNorm& p) {
  check(p);
  check_given("y", p.y, p.tokens > 0);
  py::gil_scoped_release unlocked;
  gated_norm(p);
}

void run_gated_norm_backward(GatedNormBackward& call) {
  check(call);
  check_at_least("parts", call.parts, 1);
  check_product("parts, heads, V", {call.parts, call.heads, call.V});
  check_rows("dy", call.dy, call.tokens, true);
  check_given("dx", call.dx, call.tokens > 0);
  check_given("dgate", call.dgate, call.tokens > 0);
  check_given("dweight", call.dweight);
  py::gil_scoped_release unlocked;
  gated_norm_backward(call, call);
}

void bind_convolution(py::module_& m) {
  auto fields = convolution_fields<Convolution>();
  append(fields, {field<Convolution, &Convolution::y>("y"), field<Convolution, &Convolution::last>("last")});
  NamedFunction<Convolution, run_convolve>::bind(m, "convolve", std::move(fields));

  using Backward = ConvolutionBackward;
  auto backward_fields = convolution_fields<Backward>();
  append(backward_fields,
         {field<Backward, &ConvolutionGradients::dy>("dy"), field<Backward, &ConvolutionGradients::dlast>("dlast"),
          field<Backward, &ConvolutionGradients::dx>("dx"), field<Backward, &ConvolutionGradients::dpast>("dpast"),
          field<Backward, &ConvolutionGradients::dweight>("dweight"),
          field<Backward, &ConvolutionGradients::dbias>("dbias")});
  NamedFunction<Backward, run_convolve_backward>::bind(m, "convolve_backward", std::move(backward_fields));

  using Step = ConvolutionStep;
  NamedFunction<Step, run_convolve_step>::bind(
      m, "convolve_step",
      {field<Step, &Step::B>("B"), field<Step, &Step::D>("D"), field<Step, &Step::W>("W"),
       field<Step, &Step::silu>("silu"), field<Step, &Step::x>("x"), field<Step, &Step::weight>("weight"),
       field<Step, &Step::bias>("bias"), field<Step, &Step::state>("state"), field<Step, &Step::y>("y")});
}

void bind_gated_norm(py::module_& m) {
  auto fields = gated_norm_fields<GatedNorm>();
  append(fields, {field<GatedNorm, &GatedNorm::y>("y")});
  NamedFunction<GatedNorm, run_gated_norm>::bind(m, "gated_norm", std::move(fields));

  using Backward = GatedNormBackward;
  auto backward_fields = gated_norm_fields<Backward>();
  append(backward_fields,
         {field<Backward, &GatedNormGradients::dy>("dy"), field<Backward, &GatedNormGradients::dx>("dx"),
          field<Backward, &GatedNormGradients::dgate>("dgate"), field<Backward, &GatedNormGradients::parts>("parts"),
          field<Backward, &GatedNormGradients::dweight>("dweight")});
  NamedFunction<Backward, run_gated_norm_backward>::bind(m, "gated_norm_backward", std::move(backward_fields));
}

}  // namespace

void bind_mixer(py::module_& m) {
  bind_convolution(m);
  bind_gated_norm(m);
}

}  // namespace sleepkern
