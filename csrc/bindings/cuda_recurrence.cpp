// The launches of csrc/cuda; sleepkern/backends/cuda/recurrence.py holds the other side of each signature. A stream is the address
// of a cudaStream_t, on the device that is current.
#include "bindings/arguments.h"
#include "cuda/recurrence/api.h"

namespace py = pybind11;

namespace sleepkern {
namespace {

using Address = uintptr_t;

template <class T>
T* at(Address address) {
  return reinterpret_cast<T*>(address);
}

// One launch for a window of at most one chunk, else prepare and replay. factors: (tiles, gamma, U, queries).
void run_replay(int gate, bool delta, bool normalize, float scale, int64_t sequences, int64_t T, int64_t H, int64_t HV,
                int64_t K, int64_t V, Address offsets, View q, View k, View v, View g, View beta, Address state,
                Address o, Address final_state, int mode, int passes, float tol, Address residual, Address made,
                bool affine, bool rank, Address before, int block, int slots,
                std::tuple<Address, Address, Address, Address> factors, bool window, Address stream) {
  cuda::Call call{};
  call.p = describe(gate, delta, normalize, scale, sequences, T, H, HV, K, V, offsets, q, k, v, g, beta, state);
  call.p.o = at<void>(o);
  call.p.final_state = at<float>(final_state);
  call.mode = mode;
  call.passes = passes;
  call.tol = tol;
  call.residual = at<float>(residual);
  call.made = at<int32_t>(made);
  call.affine = affine;
  call.rank = rank;
  call.before = at<float>(before);
  call.block = block;
  call.value_blocks = static_cast<int>((V + block - 1) / block);
  call.slots = slots;
  const auto& [tiles, gamma, U, queries] = factors;
  call.factors = {at<void>(tiles), at<float>(gamma), at<float>(U), at<void>(queries)};
  py::gil_scoped_release unlocked;
  if (window) {
    cuda::window(call, at<void>(stream));
  } else {
    cuda::prepare(call, at<void>(stream));
    cuda::replay(call, at<void>(stream));
  }
}

cuda::Chain chain(int64_t heads, int K, int V, int passes, int block, Address A, Address states) {
  cuda::Chain c{};
  c.heads = heads;
  c.K = K;
  c.V = V;
  c.passes = passes;
  c.block = block;
  c.value_blocks = (V + block - 1) / block;
  c.A = at<float>(A);
  c.states = at<float>(states);
  return c;
}

void run_powers(int64_t heads, int K, int V, int passes, int block, Address A, Address states, Address start,
                Address after, Address stream) {
  cuda::Chain c = chain(heads, K, V, passes, block, A, states);
  c.start = at<float>(start);
  c.after = at<float>(after);
  py::gil_scoped_release unlocked;
  cuda::powers(c, at<void>(stream));
}

void run_adjoint(int64_t heads, int K, int V, int passes, int block, Address A, Address states, Address made,
                 Address last, Address dA, Address dB, Address dstart, Address stream) {
  cuda::Chain c = chain(heads, K, V, passes, block, A, states);
  c.made = at<int32_t>(made);
  c.last = at<float>(last);
  c.dA = at<float>(dA);
  c.dB = at<float>(dB);
  c.dstart = at<float>(dstart);
  py::gil_scoped_release unlocked;
  cuda::adjoint(c, at<void>(stream));
}

void run_step(int gate, bool delta, bool normalize, float scale, int64_t sequences, int64_t T, int64_t H, int64_t HV,
              int64_t K, int64_t V, View q, View k, View v, View g, View beta, Address state, Address final_state,
              Address o, Address places, int64_t stride, Address stream) {
  cuda::Steps steps{};
  steps.p = describe(gate, delta, normalize, scale, sequences, T, H, HV, K, V, 0, q, k, v, g, beta, state);
  steps.p.o = at<void>(o);
  steps.p.final_state = at<float>(final_state);
  steps.places = at<int64_t>(places);
  steps.stride = stride;
  py::gil_scoped_release unlocked;
  cuda::step(steps, at<void>(stream));
}

}  // namespace

void bind_cuda(py::module_& m) {
  bind_cuda_blocks(m);
  m.def("cuda_replay", &run_replay);
  m.def("cuda_powers", &run_powers);
  m.def("cuda_adjoint", &run_adjoint);
  m.def("cuda_step", &run_step);
  m.def("cuda_window_memory", &cuda::window_memory, "Bytes of shared memory of a block, also of prepare's.");
  m.def("cuda_replay_memory", &cuda::replay_memory);
  m.def("cuda_chain_memory", &cuda::chain_memory);
  m.attr("cuda_chunk") = cuda::CHUNK;
  m.attr("cuda_widest_key") = cuda::WIDEST_KEY;
  m.attr("cuda_widest_block") = cuda::WIDEST_BLOCK;
  m.attr("cuda_value_tile") = cuda::VALUES;
}

}  // namespace sleepkern
