"""Fused Triton kernels on a GPU, forward and backward, for the whole family. Stages: prepare, ingest, adjoint,
gradients, each a file; launch.py strings them together, plan.py says how they are cut.

Deterministic: every number is summed by one program in a fixed order, there are no atomics.
"""

from __future__ import annotations

import importlib.util
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from ...problem import Problem, Tensors
from .. import replay_backward
from ..tensors import Ingested

NAME = "triton"
WIDEST = 256
_TYPES = (torch.float32, torch.bfloat16, torch.float16)


def why_not(problem: Problem) -> str | None:
    """None for tensors on a GPU of compute capability 8.0 or more, of at most 32 bits, with heads of at most 256."""
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed"
    if problem.device != "cuda" and not _interpreted():
        return f"runs on a GPU, the tensors are on {problem.device}"
    if problem.device == "cuda" and _capability() < (8, 0):
        return f"needs compute capability 8.0, got {'.'.join(map(str, _capability()))}"
    if problem.dtype not in _TYPES:
        return f"no kernel for {problem.dtype}, only float32, bfloat16 and float16"
    if max(problem.K, problem.V) > WIDEST:
        return f"heads of at most {WIDEST}, got K = {problem.K}, V = {problem.V}"
    if problem.method in ("affine", "rank"):
        return f"replays by wy or in closed form, not by {problem.method}"
    if problem.tol is not None:
        return "makes all passes in one launch and cannot stop heads early, as tol asks"
    return None


def kernel(problem: Problem) -> str:
    """One line on the code that runs."""
    replay = f", replay by {method_of(problem)}" if problem.passes > 1 else ""
    return f"Triton, chunks of {_plan(problem).chunk}{replay}"


def method_of(problem: Problem) -> str:
    """The replay method: factors made once and `passes` walks in one launch, closed form without delta."""
    return "wy" if problem.rule.delta else "closed"


def forward(problem: Problem, x: Tensors) -> Ingested:
    """Readouts and final state of `problem.passes` passes."""
    if problem.T == 0:
        return _no_tokens(problem, x)
    return Ingested(*_launch().forward(problem, x, x.state, problem.output, _precision(problem)))


def backward(problem: Problem, x: Tensors, do: Tensor | None, dstate: Tensor | None) -> list[Tensor | None]:
    """Gradients of q, k, v, g, beta, state."""
    if problem.passes > 1 and problem.T:
        return replay_backward.backward(problem, x, do, dstate, None, _state_after, _one_backward)
    return _one_backward(problem, x, x.state, do, dstate)


def step(problem: Problem, x: Tensors) -> Tensor:
    """Readouts [B,T,HV,V]; the state is updated in place, also where it is not contiguous."""
    assert x.state is not None
    if problem.T == 0:
        return torch.empty_like(x.v)
    state = x.state.contiguous()
    o, _ = _launch().forward(problem, x, state, True, _precision(problem), final=state)
    if state is not x.state:
        x.state.copy_(state)
    out: Tensor = o
    return out


def _state_after(problem: Problem, x: Tensors, state: Tensor | None) -> Tensor:
    final: Tensor = _launch().forward(problem._replace(passes=1), x, state, False, _precision(problem))[1]
    return final


def _one_backward(
    problem: Problem, x: Tensors, state: Tensor | None, do: Tensor | None, dstate: Tensor | None
) -> list[Tensor | None]:
    if problem.T == 0:
        grads = [None if t is None else torch.zeros_like(t) for t in x[:6]]
        return [*grads[:5], grads[5] if dstate is None or x.state is None else dstate.clone()]
    grads = _launch().backward(problem, x._replace(state=state), state, do, dstate, _precision(problem))
    return grads


def _no_tokens(problem: Problem, x: Tensors) -> Ingested:
    size = (problem.sequences, problem.HV, problem.K, problem.V)
    state = x.k.new_zeros(size, dtype=torch.float32) if x.state is None else x.state.clone()
    return Ingested(torch.empty_like(x.v) if problem.output else None, state)


def _precision(problem: Problem) -> str:
    """How float32 operands are multiplied. 16-bit inputs carry no more than tf32 does, and float32 ones are multiplied

    as torch multiplies matrices: exactly, unless torch.set_float32_matmul_precision allows tf32.
    """
    if problem.dtype != torch.float32 or torch.get_float32_matmul_precision() != "highest":
        return "tf32"
    return "ieee"


def _plan(problem: Problem) -> Any:
    from .plan import plan_for

    bits = 16 if problem.dtype == torch.bfloat16 else 32
    return plan_for(problem.K, problem.V, bits, problem.rule.gate == "channel", problem.T, False)


def _launch() -> Any:
    """The kernels, imported on the first call: the package needs no Triton to be imported."""
    from . import launch

    return launch


@lru_cache(maxsize=1)
def _interpreted() -> bool:
    """Whether TRITON_INTERPRET makes kernels run on the CPU, for tests."""
    from triton import knobs

    return bool(knobs.runtime.interpret)


def _capability() -> tuple[int, int]:
    return torch.cuda.get_device_capability() if torch.cuda.is_available() else (9, 0)
