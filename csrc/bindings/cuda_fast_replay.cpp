// A plain replay on a GPU (sleepkern/ops/fast_replay.py): recognised from its tensors as on the CPU, then launched.
#include "bindings/cuda_replay.h"
#include "bindings/fast_path.h"
#include "bindings/named.h"

namespace py = pybind11;

namespace sleepkern {
namespace {

// Whether the problem of these tensors is the one that the replay was planned for.
bool is_planned(const CudaReplay& replay, const Problem& p) {
  const CudaProblem& planned = replay.problem;
  const bool bf16 = p.k.type == Type::bfloat16;
  return replay.mode == (bf16 ? 0 : 1) && replay.passes >= 1 && planned.sequences == p.sequences && planned.T == p.T &&
         planned.H == p.H && planned.HV == p.HV && planned.K == p.K && planned.V == p.V;
}

Address address_of(PyObject* number) { return static_cast<Address>(PyLong_AsUnsignedLongLong(number)); }

// try_fast_replay(replay, q, k, v, g, beta, state, o, final_state, before_last, tiles, chunk_decay, U, queries,
// stream): launches the replay of a window and returns true if the call is plain. q and o are None for the state alone;
// what follows final_state are addresses of scratch, 0 for none. The tensors have to be on the current device.
PyObject* try_fast_replay(PyObject*, PyObject* const* given, Py_ssize_t count) {
  if (count != 15) return wrong_count("try_fast_replay", 15, count);
  return guarded([&]() -> PyObject* {
    const auto& replay = py::handle(given[0]).cast<const CudaReplay&>();
    const CudaProblem& planned = replay.problem;
    cuda::ReplayParams call{};
    call.before = at<float>(address_of(given[9]));
    call.factors = {at<void>(address_of(given[10])), at<float>(address_of(given[11])), at<float>(address_of(given[12])),
                    at<void>(address_of(given[13]))};
    const Address stream = address_of(given[14]);
    if (PyErr_Occurred()) return nullptr;
    TensorViews views;
    if (replay.tol != 0 || !views.read(given + 1, 8, given[1] != Py_None)) Py_RETURN_FALSE;
    const Gate gate = check_gate(planned.gate);
    const PlainCall plain = views.call(gate, planned.delta, planned.normalize, planned.scale, {});
    if (!is_plain(plain, FAST_DEVICE, call.problem) || !is_planned(replay, call.problem)) Py_RETURN_FALSE;
    replay.launch(call, stream);
    Py_RETURN_TRUE;
  });
}

PyMethodDef functions[] = {
    {"try_fast_replay", fast(try_fast_replay), METH_FASTCALL,
     "try_fast_replay(replay: CudaReplay, q: object, k: object, v: object, g: object, beta: object, state: object, "
     "o: object, final_state: object, before_last: int, tiles: int, chunk_decay: int, U: int, queries: int, "
     "stream: int, /) -> bool"},
    {nullptr, nullptr, 0, nullptr},
};

}  // namespace

void bind_cuda_fast_replay(py::module_& m) {
  if (PyModule_AddFunctions(m.ptr(), functions) != 0) throw py::error_already_set();
}

}  // namespace sleepkern
