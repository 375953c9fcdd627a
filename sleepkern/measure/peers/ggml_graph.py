"""ggml's fused op, ggml_gated_delta_net, through the package ggml-python: float32, on the CPU.

Its conventions, as found by trying (the bindings carry no text): q, k, v and o are
[B,T,heads,width] as here; g is a log decay [B,T,HV,1], or [B,T,HV,K] for a decay per channel; beta
[B,T,HV,1]; K = V; the scale is K ** -0.5; the state is transposed, [B,HV,V,K]; value head j reads
key head j % H (here j // (HV // H)). The result is one tensor, o followed by the state. The last
argument asks for that many snapshots of the state; 1 is the final one.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from typing import Any

import ggml
import torch
from torch import Tensor

from ..cases import Case, Result

_FLOAT = 4
_GRAPH_BYTES = 1 << 20


def built_with() -> str:
    """The instruction sets it was built with: a build without AVX2 would be no fair peer."""
    sets = ("avx2", "fma", "avx512", "avx512_vnni", "avx512_bf16")
    built = [isa for isa in sets if getattr(ggml, f"ggml_cpu_has_{isa}")()]
    return ", ".join(built) or "no AVX2"


def prepare(case: Case, inputs: dict[str, Any], threads: int) -> Callable[[], Result]:
    """Upload the inputs once; a call computes the graph and returns views of its result.

    The graph holds one op per pass, the state handed from op to op.
    """
    graph = _Graph(case, inputs, threads)
    return graph.compute


class _Graph:
    """A ggml graph with its memory; freed with the object."""

    def __init__(self, case: Case, inputs: dict[str, Any], threads: int) -> None:
        self.backend = ggml.ggml_backend_cpu_init()
        ggml.ggml_backend_cpu_set_n_threads(self.backend, threads)
        params = ggml.ggml_init_params(mem_size=_GRAPH_BYTES, mem_buffer=None, no_alloc=True)
        self.context = ggml.ggml_init(params)
        self.case = case
        arguments = _to_ggml(case, inputs)
        tensors = [self._tensor(x) for x in arguments]
        self.output = self._chain(tensors)
        self.graph = ggml.ggml_new_graph(self.context)
        ggml.ggml_build_forward_expand(self.graph, self.output)
        self.buffer = ggml.ggml_backend_alloc_ctx_tensors(self.context, self.backend)
        for tensor, x in zip(tensors, arguments, strict=True):
            ggml.ggml_backend_tensor_set(tensor, ctypes.c_void_p(x.data_ptr()), 0, x.numel() * _FLOAT)

    def __del__(self) -> None:
        ggml.ggml_backend_buffer_free(self.buffer)
        ggml.ggml_free(self.context)
        ggml.ggml_backend_free(self.backend)

    def compute(self) -> Result:
        """Run the graph; (o, state) are views of its memory, keep it alive, and are overwritten by
        the next call."""
        status = ggml.ggml_backend_graph_compute(self.backend, self.graph)
        if status != ggml.GGML_STATUS_SUCCESS:
            raise RuntimeError(f"ggml: computing the graph failed with status {status}")
        size = ggml.ggml_nelements(self.output)
        address = ggml.ggml_get_data(self.output)
        memory = (ctypes.c_float * size).from_address(address)
        memory.owner = self  # a tensor holds its buffer, the buffer must hold what frees it
        return _from_ggml(self.case, torch.frombuffer(memory, dtype=torch.float32))

    def _tensor(self, x: Tensor) -> Any:
        return ggml.ggml_new_tensor_4d(self.context, ggml.GGML_TYPE_F32, *reversed(x.shape))

    def _chain(self, tensors: list[Any]) -> Any:
        s = self.case.shape
        offset = s.B * s.T * s.HV * s.V * _FLOAT
        *rest, state = tensors
        for _ in range(self.case.passes):
            output = ggml.ggml_gated_delta_net(self.context, *rest, state, 1)
            flat = ggml.ggml_view_1d(self.context, output, s.B * s.HV * s.V * s.K, offset)
            state = ggml.ggml_reshape_4d(self.context, flat, s.K, s.V, s.HV, s.B)
        return output


def _to_ggml(case: Case, inputs: dict[str, Any]) -> list[Tensor]:
    """q, k, v, g, beta, state in ggml's layout and order of heads."""
    q, k, v, g, beta = (inputs[name] for name in ("q", "k", "v", "g", "beta"))
    g = torch.zeros_like(beta) if g is None else g
    g = g if case.rule.gate == "channel" else g[..., None]
    order = _head_order(case)
    state = inputs["initial_state"].transpose(-1, -2)[:, order]
    tensors = (q, k, v[:, :, order], g[:, :, order], beta[:, :, order, None], state)
    return [x.float().contiguous() for x in tensors]


def _from_ggml(case: Case, output: Tensor) -> Result:
    s = case.shape
    size = s.B * s.T * s.HV * s.V
    o = output[:size].view(s.B, s.T, s.HV, s.V)
    state = output[size:].view(s.B, s.HV, s.V, s.K).transpose(-1, -2)
    if s.HV == s.H:
        return o, state
    back = _head_order(case).argsort()
    return o[:, :, back], state[:, back]


def _head_order(case: Case) -> Tensor:
    """Our value head at each of ggml's places: there heads that share a key head lie H apart."""
    return torch.arange(case.shape.HV).view(case.shape.H, -1).T.reshape(-1)
