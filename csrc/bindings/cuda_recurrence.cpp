// The launches of the recurrence in csrc/cuda; sleepkern/backends/cuda/recurrence.py fills their arguments. The values
// that a problem and its plan fix are in a struct, which Python makes once for a problem. Addresses are arguments of a
// call, because setting a field of a struct takes a third of a microsecond. They are keywords, so that no two can be
// swapped, but those of decode are positional: its launch is short, and keywords take another 0.8 us.
// A stream is the address of a cudaStream_t on the current device.
#include "bindings/cuda_replay.h"
#include "bindings/struct_fields.h"
#include "cuda/recurrence/decode_states.h"

namespace py = pybind11;

namespace sleepkern {
namespace {

// One launch for windows of one chunk, else chunk_factors and the passes.
void run_replay(const CudaReplay& replay, const Inputs& inputs, Address offsets, Address state, Address o,
                Address final_state, Address residual, Address passes_done, Address before_last, Address tiles,
                Address chunk_decay, Address U, Address queries, Address stream) {
  cuda::ReplayParams call{};
  call.problem = replay.problem.with(inputs, offsets, state, o, final_state);
  call.residual = at<float>(residual);
  call.passes_done = at<int32_t>(passes_done);
  call.before = at<float>(before_last);
  call.factors = {at<void>(tiles), at<float>(chunk_decay), at<float>(U), at<void>(queries)};
  replay.launch(call, stream);
}

cuda::PowersParams powers_of(int64_t heads, int K, int V, int passes, int block, Address A, Address states) {
  check_at_least("block", block, 1);
  cuda::PowersParams c{};
  c.heads = heads;
  c.K = K;
  c.V = V;
  c.passes = passes;
  c.v_tile = block;
  c.v_tiles = (V + block - 1) / block;
  c.A = at<float>(A);
  c.states = at<float>(states);
  return c;
}

void run_powers(int64_t heads, int K, int V, int passes, int block, Address A, Address states, Address start,
                Address after, Address stream) {
  cuda::PowersParams c = powers_of(heads, K, V, passes, block, A, states);
  c.start = at<float>(start);
  c.after = at<float>(after);
  py::gil_scoped_release unlocked;
  cuda::powers(c, at<void>(stream));
}

void run_powers_backward(int64_t heads, int K, int V, int passes, int block, Address A, Address states,
                         Address passes_done, Address last, Address dA, Address dB, Address dstart, Address stream) {
  cuda::PowersParams c = powers_of(heads, K, V, passes, block, A, states);
  c.passes_done = at<int32_t>(passes_done);
  c.last = at<float>(last);
  c.dA = at<float>(dA);
  c.dB = at<float>(dB);
  c.dstart = at<float>(dstart);
  py::gil_scoped_release unlocked;
  cuda::powers_backward(c, at<void>(stream));
}

cuda::DecodeStates decode_of(const CudaProblem& problem, const Inputs& inputs, Address states, bool bf16, Address o,
                             Address indices, int64_t stride) {
  cuda::DecodeStates params{};
  params.problem = problem.with(inputs, 0, states, o, states);
  params.bf16 = bf16;
  params.states = at<void>(states);
  params.indices = at<int64_t>(indices);
  params.stride = stride;
  params.head_stride = problem.K * problem.V;
  return params;
}

// The states are updated in place.
void run_decode(const CudaProblem& problem, const Inputs& inputs, Address states, bool bf16, Address o, Address indices,
                int64_t stride, Address stream) {
  const cuda::DecodeStates params = decode_of(problem, inputs, states, bf16, o, indices, stride);
  py::gil_scoped_release unlocked;
  cuda::decode_states(params, at<void>(stream));
}

// The states are read, and those after each token go to `out`.
void run_decode_states(const CudaProblem& problem, const Inputs& inputs, Address states, bool bf16, Address o,
                       Address indices, int64_t stride, int64_t head_stride, Address out, Address out_indices,
                       int64_t out_stride, int64_t out_token_stride, int64_t out_head_stride, Address stream) {
  cuda::DecodeStates params = decode_of(problem, inputs, states, bf16, o, indices, stride);
  check_given("out", at<void>(out), problem.sequences > 0);
  params.head_stride = head_stride;
  params.out = at<void>(out);
  params.out_indices = at<int64_t>(out_indices);
  params.out_stride = out_stride;
  params.out_token_stride = out_token_stride;
  params.out_head_stride = out_head_stride;
  py::gil_scoped_release unlocked;
  cuda::decode_states(params, at<void>(stream));
}

#define SLEEPKERN_FIELD(name) bind_field(type, #name, &Struct::name)

void bind_problem(py::module_& m) {
  using Struct = CudaProblem;
  py::class_<Struct> type(m, "CudaProblem", py::module_local());
  type.def(py::init([] { return Struct{}; }));
  SLEEPKERN_FIELD(gate);
  SLEEPKERN_FIELD(delta);
  SLEEPKERN_FIELD(normalize);
  SLEEPKERN_FIELD(scale);
  SLEEPKERN_FIELD(sequences);
  SLEEPKERN_FIELD(T);
  SLEEPKERN_FIELD(H);
  SLEEPKERN_FIELD(HV);
  SLEEPKERN_FIELD(K);
  SLEEPKERN_FIELD(V);
}

void bind_replay(py::module_& m) {
  using Struct = CudaReplay;
  py::class_<Struct> type(m, "CudaReplay", py::module_local());
  type.def(py::init([] { return Struct{}; }));
  SLEEPKERN_FIELD(problem);
  SLEEPKERN_FIELD(mode);
  SLEEPKERN_FIELD(passes);
  SLEEPKERN_FIELD(tol);
  SLEEPKERN_FIELD(affine);
  SLEEPKERN_FIELD(token_space);
  SLEEPKERN_FIELD(single_chunk);
  SLEEPKERN_FIELD(block);
  SLEEPKERN_FIELD(slots);
}

}  // namespace

void bind_cuda(py::module_& m) {
  using py::arg;
  bind_cuda_blocks(m);
  bind_problem(m);
  bind_replay(m);
  bind_cuda_fast_decode(m);
  bind_cuda_fast_replay(m);
  m.def("cuda_replay", &run_replay, arg("replay"), py::kw_only(), arg("inputs"), arg("offsets"), arg("state"), arg("o"),
        arg("final_state"), arg("residual"), arg("passes_done"), arg("before_last"), arg("tiles"), arg("chunk_decay"),
        arg("U"), arg("queries"), arg("stream"));
  m.def("cuda_powers", &run_powers, py::kw_only(), arg("heads"), arg("K"), arg("V"), arg("passes"), arg("block"),
        arg("A"), arg("states"), arg("start"), arg("after"), arg("stream"));
  m.def("cuda_powers_backward", &run_powers_backward, py::kw_only(), arg("heads"), arg("K"), arg("V"), arg("passes"),
        arg("block"), arg("A"), arg("states"), arg("passes_done"), arg("last"), arg("dA"), arg("dB"), arg("dstart"),
        arg("stream"));
  m.def("cuda_decode", &run_decode, arg("problem"), arg("inputs"), arg("states"), arg("bf16"), arg("o"), arg("indices"),
        arg("stride"), arg("stream"));
  m.def("cuda_decode_states", &run_decode_states, arg("problem"), py::kw_only(), arg("inputs"), arg("states"),
        arg("bf16"), arg("o"), arg("indices"), arg("stride"), arg("head_stride"), arg("out"), arg("out_indices"),
        arg("out_stride"), arg("out_token_stride"), arg("out_head_stride"), arg("stream"));
  m.def("cuda_single_chunk_memory", &cuda::single_chunk_memory, py::kw_only(), arg("mode"), arg("K"), arg("output"),
        arg("channel"), "Bytes of shared memory of a CTA; chunk_factors needs the same.");
  m.def("cuda_multi_chunk_memory", &cuda::multi_chunk_memory, py::kw_only(), arg("mode"), arg("K"), arg("output"),
        arg("block"), arg("slots"), "Bytes of shared memory of a CTA.");
  m.def("cuda_powers_memory", &cuda::powers_memory, py::kw_only(), arg("K"), arg("backward"),
        "Bytes of shared memory of a CTA.");
  m.attr("cuda_chunk") = cuda::CHUNK;
  m.attr("cuda_widest_key") = cuda::WIDEST_KEY;
  m.attr("cuda_widest_block") = cuda::WIDEST_V_TILE;
  m.attr("cuda_value_tile") = cuda::VALUES;
}

}  // namespace sleepkern
