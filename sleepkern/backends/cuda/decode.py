"""Decode by CUDA: a few tokens on states that are updated in place, or read while those after each token are stored.

Kernel: csrc/cuda/recurrence/decode.cuh. recurrence.py offers these functions to the rest of the package.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from ...problems.recurrence import Problem, Tensors
from .. import torch_common
from ..native.module import _C, GATE_CODES
from ..native.views import Rows, address, contiguous_heads, on_device_of, rows, stream_of

DECODE_LIMIT = 8
"""Most tokens of a decode, which takes them one after the other; more of them are faster in chunks."""
CudaProblem = Any
"""The struct of this name in sleepkern._C."""


def step(problem: Problem, x: Tensors) -> Tensor:
    """Compute the outputs [B,T,HV,V] of a few tokens; the state is updated in place."""
    return _decode_in_place(problem, x, None)


def step_in_pool(problem: Problem, x: Tensors, indices: Tensor) -> Tensor:
    """Do the same on the states at `indices` [B] of a pool x.state [n,HV,K,V]; an index below 0 has no state."""
    return _decode_in_place(problem, x, indices.to(torch.int64).contiguous())


def step_states(
    problem: Problem, x: Tensors, indices: Tensor | None, states_out: Tensor, out_indices: Tensor | None
) -> Tensor:
    """Do the same on a state that is only read, and store the state after each token (interface.py, StepsInStates)."""
    state = x.state
    assert state is not None
    if not (contiguous_heads(state) and contiguous_heads(states_out)):
        return torch_common.states_by_steps(problem, x, indices, states_out, out_indices, step)
    o = torch.empty_like(x.v, memory_format=torch.contiguous_format)
    if problem.T == 0:
        return o
    inputs, _alive = inputs_of(problem, x, True)
    indices, out_indices = (None if i is None else i.to(torch.int64).contiguous() for i in (indices, out_indices))
    token_stride = states_out.stride(1) if states_out.dim() == 5 else 0
    with on_device_of(x.k):
        _C.cuda_decode_states(
            sizes_of(problem), inputs=inputs, states=state.data_ptr(), bf16=problem.state_bf16, o=o.data_ptr(),
            indices=address(indices), stride=state.stride(0), head_stride=state.stride(1), out=states_out.data_ptr(),
            out_indices=address(out_indices), out_stride=states_out.stride(0), out_token_stride=token_stride,
            out_head_stride=states_out.stride(-3), stream=stream_of(x.k),
        )  # fmt: skip
    return o


def try_fast_decode(*arguments: Any) -> bool:
    """Launch a decode whose tensors say that it is plain, False for any other (csrc/bindings/cuda_fast_decode.cpp)."""
    return _C.try_fast_decode(*arguments)  # type: ignore[no-any-return]


def decode(problem: Problem, x: Tensors, state: Tensor, indices: Tensor | None) -> Tensor:
    """Compute the outputs of a few tokens and update `state`, each of whose [HV,K,V] is contiguous."""
    o = torch.empty_like(x.v, memory_format=torch.contiguous_format)
    if problem.T == 0:
        return o
    inputs, _alive = inputs_of(problem, x, True)
    bf16 = problem.state_bf16
    with on_device_of(x.k):
        at, stream = address(indices), stream_of(x.k)
        _C.cuda_decode(
            sizes_of(problem), inputs, state.data_ptr(), bf16, o.data_ptr(), at, state.stride(0), stream
        )  # fmt: skip
    return o


def inputs_of(p: Problem, x: Tensors, output: bool) -> tuple[tuple[Rows, ...], list[Tensor | None]]:
    """q, k, v, g, beta as _C takes them, and the tensors that must live while it runs; q only for an output."""
    widths = (p.H * p.K, p.H * p.K, p.HV * p.V, p.HV * p.K if p.rule.gate == "channel" else p.HV, p.HV)
    given = (x.q if output else None, x.k, x.v, x.g, x.beta)
    found = [rows(t, width) for t, width in zip(given, widths, strict=True)]
    return tuple(view for _, view in found), [t for t, _ in found]


@lru_cache(maxsize=1024)
def sizes_of(problem: Problem) -> CudaProblem:
    """Describe a problem for _C. A launch reads the result, which is kept: filling it takes longer than finding it."""
    sizes = _C.CudaProblem()
    sizes.gate = GATE_CODES[problem.rule.gate]
    sizes.delta = problem.rule.delta
    sizes.normalize = problem.normalize
    sizes.scale = problem.scale
    sizes.sequences = problem.sequences
    sizes.T = problem.T
    sizes.H = problem.H
    sizes.HV = problem.HV
    sizes.K = problem.K
    sizes.V = problem.V
    return sizes


def _decode_in_place(problem: Problem, x: Tensors, indices: Tensor | None) -> Tensor:
    """Decode on x.state, also where it is not contiguous; the states of a pool may have gaps between them."""
    assert x.state is not None
    state = x.state if _dense_states(x.state) else x.state.contiguous()
    o = decode(problem, x, state, indices)
    if state is not x.state:
        x.state.copy_(state)
    return o


def _dense_states(state: Tensor) -> bool:
    """Tells whether each state is contiguous and no two of them overlap."""
    n, HV, K, V = state.shape
    return n > 0 and state[0].is_contiguous() and (n == 1 or state.stride(0) >= HV * K * V)
