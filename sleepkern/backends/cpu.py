"""Native C++ on the CPU: hands pointers to sleepkern._C. Gradients take the chunk form in torch."""

from __future__ import annotations

import importlib

import torch
from torch import Tensor

from ..problem import Problem, Tensors
from . import chunked
from .replay import repeat
from .tensors import Ingested

try:
    _C = importlib.import_module("sleepkern._C")
except ImportError as error:
    _C = None  # type: ignore[assignment]
    _missing = f"the compiled module sleepkern._C is not there ({error})"

NAME = "cpu"
_GATES = {"none": 0, "head": 1, "channel": 2}
_TYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}


def why_not(problem: Problem) -> str | None:
    """None for CPU tensors of at most 32 bits and heads of at most 256."""
    if _C is None:
        return _missing
    if problem.device != "cpu":
        return f"runs on the CPU, the tensors are on {problem.device}"
    if problem.dtype not in _TYPES:
        return f"no kernel for {problem.dtype}, only float32, bfloat16 and float16"
    if problem.K > 256 or problem.V > 256:
        return f"heads of at most 256, got K = {problem.K}, V = {problem.V}"
    if problem.method not in ("auto", "repeat"):
        return f"replays by plain repetition only, not by method {problem.method!r}"
    return None


def kernel(problem: Problem) -> str:
    """One line on the code that runs."""
    form = "token by token" if problem.T <= _C.step_limit() else "chunked"
    return f"C++ {_C.isa()}, {form}" + (", passes repeated" if problem.passes > 1 else "")


def method_of(problem: Problem) -> str:
    """Plain repetition."""
    return "repeat"


def forward(problem: Problem, x: Tensors) -> Ingested:
    """Readouts and final state of `problem.passes` passes."""
    if problem.passes == 1 and problem.tol is None:
        return Ingested(*_one_pass(problem, x, x.state, problem.output))
    state = x.state
    if state is None:
        shape = (problem.sequences, problem.HV, problem.K, problem.V)
        state = x.k.new_zeros(shape, dtype=torch.float32)

    def one_pass(state: Tensor, output: bool) -> tuple[Tensor | None, Tensor]:
        return _one_pass(problem, x, state, output)

    return repeat(one_pass, state, problem.passes, problem.tol, problem.output)


def backward(problem: Problem, x: Tensors, do: Tensor | None, dstate: Tensor | None) -> list[Tensor | None]:
    """Gradients of q, k, v, g, beta, state by the chunk form in torch, which recomputes the forward."""
    return chunked.backward(problem, x, do, dstate)


def step(problem: Problem, x: Tensors) -> Tensor:
    """Readouts [B,T,HV,V]; the state is updated in place, also where it is not contiguous."""
    assert x.state is not None
    state = x.state.contiguous()
    o, _ = _one_pass(problem, x, state, True, final=state)
    assert o is not None
    if state is not x.state:
        x.state.copy_(state)
    return o


def _one_pass(
    problem: Problem, x: Tensors, state: Tensor | None, output: bool, final: Tensor | None = None
) -> tuple[Tensor | None, Tensor]:
    k, v = x.k, x.v
    o = k.new_empty((problem.B, problem.T, problem.HV, problem.V)) if output else None
    if final is None:
        shape = (problem.sequences, problem.HV, problem.K, problem.V)
        final = k.new_empty(shape, dtype=torch.float32)
        state = None if state is None else state.contiguous()
    offsets = None if x.cu_seqlens is None else x.cu_seqlens.to("cpu", torch.int64).contiguous()
    q, k, v, g, beta = (_rows(t) if t is not None else None for t in (x.q if output else None, k, v, x.g, x.beta))
    _C.forward(
        _GATES[problem.rule.gate], problem.rule.delta, problem.normalize, problem.scale,
        problem.sequences, problem.T, problem.H, problem.HV, problem.K, problem.V,
        0 if offsets is None else offsets.data_ptr(),
        _view(q), _view(k), _view(v), _view(g), _view(beta),
        0 if state is None else state.data_ptr(),
        0 if o is None else o.data_ptr(), final.data_ptr(),
    )  # fmt: skip
    return o, final


def _rows(t: Tensor) -> Tensor:
    """t itself where all its tokens lie one row stride apart, also inside a wider projection; else a copy."""
    if t.is_contiguous():
        return t
    stride, inner = t.stride(), 1
    for size, step in zip(reversed(t.shape[2:]), reversed(stride[2:]), strict=True):
        if size != 1 and step != inner:
            return t.contiguous()
        inner *= size
    return t if t.shape[0] == 1 or stride[0] == t.shape[1] * stride[1] else t.contiguous()


def _view(t: Tensor | None) -> tuple[int, int, int]:
    """(address, row stride in elements, type code) as _C takes a tensor of rows; zeros for None."""
    if t is None:
        return 0, 0, 0
    row = t.stride(1) if t.shape[1] > 1 else t.stride(0)
    return t.data_ptr(), row, _TYPES[t.dtype]
