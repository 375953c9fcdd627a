"""Fused Triton kernels on a GPU, forward and backward, for all rules.

Each stage is one file: chunk_factors, state_pass, state_pass_backward, chunk_backward. launch.py launches them in
order, plan.py says how they are cut. Results are deterministic: one program computes each sum in a fixed order, and
there are no atomics.
"""

from __future__ import annotations

import importlib.util
from functools import lru_cache, partial
from typing import Any

import torch
from torch import Tensor

from ...problems.gates import RawGates
from ...problems.recurrence import Problem, RecurrenceResult, Tensors
from ...problems.states import count_states, state_offsets
from ...rules import DELTA_RULE, GATED_DELTA_RULE, GLA, KDA, SIMPLE_GLA
from .. import torch_common
from ..interface import REPLAY, STATES, refuse_states
from ..native.views import contiguous_heads
from ..replay import backward as replay_backward
from .plan import DECODE_LIMIT, dividing, plan_for
from .plan_table import Precision
from .ptxas import assembler_of, capability_of_plans, numbers

NAME = "triton"
SUPPORTS = frozenset({GATED_DELTA_RULE, KDA, DELTA_RULE, SIMPLE_GLA, GLA})
OPTIONS = REPLAY | STATES
WIDEST = 256
_TYPES = (torch.float32, torch.bfloat16, torch.float16)


def why_not(problem: Problem) -> str | None:
    """None for tensors on a GPU of compute capability 8.0 or more, of at most 32 bits, with heads of at most 256."""
    reason = why_not_on(problem.device)
    if reason is not None:
        return reason
    if problem.dtype not in _TYPES:
        return f"no kernel for {problem.dtype}, only float32, bfloat16 and float16"
    if max(problem.K, problem.V) > WIDEST:
        return f"heads of at most {WIDEST}, got K = {problem.K}, V = {problem.V}"
    if problem.method in ("affine", "rank"):
        return f"replays by wy or in closed form, not by {problem.method}"
    if problem.tol is not None:
        return "makes all passes in one launch and cannot stop heads early, as tol asks"
    return refuse_states(problem)


def why_not_on(device: str) -> str | None:
    """None, or the sentence why nothing can run on a type of device."""
    if not installed():
        return "Triton is not installed"
    if device != "cuda":
        return None if _interpreted() else f"runs on a GPU, the tensors are on {device}"
    if _capability() < (8, 0):
        return f"needs compute capability 8.0, got {'.'.join(map(str, _capability()))}"
    return None


# Dynamo cannot trace Triton's switches and takes the answer for a constant. torch.compiler's assume_constant_result
# sets the same attribute, but imports Dynamo first, which takes seconds.
why_not_on._dynamo_marked_constant = True  # type: ignore[attr-defined]


def known_fault(version: str, capability: tuple[int, int]) -> str | None:
    """A sentence where a version of Triton is known to compile some kernels wrong for a device, else None."""
    if capability[0] == 9 and (3, 4, 0) <= numbers(version) < (3, 7, 1):
        return (
            f"Triton {version} makes wrong code on Hopper where a product takes the transpose of another product. The "
            "kernels here avoid that; others may not. `sleepkern verify --device cuda` checks this machine"
        )
    return None


def kernel(problem: Problem) -> str:
    """One line on the code that runs."""
    if _decodes(problem):
        return "Triton, token by token"
    precision, channel = precision_of(problem), problem.rule.gate == "channel"
    found = capability_of_plans(_capability()) if problem.device == "cuda" else 0
    plan = plan_for(problem.K, problem.V, precision, channel, problem.T, "forward", found)
    chunk = dividing(plan, problem).chunk
    replay = f", replay by {method_of(problem)}" if problem.passes > 1 else ""
    return f"Triton, chunks of {chunk}, {precision} products{replay}{_assembled(problem.device)}"


def _assembled(device: str) -> str:
    """The assembler of a kernel on a Hopper, where two may be installed."""
    if device != "cuda" or _capability()[0] != 9:
        return ""
    chosen = assembler_of(_capability())
    return f", assembled by {chosen.source}'s ptxas {chosen.version}"


def method_of(problem: Problem) -> str:
    """The replay method: chunk factors computed once and `passes` state passes in one launch; closed without delta."""
    return "wy" if problem.rule.delta else "closed"


def forward(problem: Problem, x: Tensors) -> RecurrenceResult:
    """Outputs and final state of `problem.passes` passes."""
    if problem.T == 0:
        return _no_tokens(problem, x)
    if problem.state_every is not None:
        return _forward_with_states(problem, x)
    return RecurrenceResult(*_launch().forward(problem, x, x.state, problem.output, precision_of(problem)))


def _forward_with_states(problem: Problem, x: Tensors) -> RecurrenceResult:
    """The same with the states along the sequences. A sequence that ends before the second one has its final state."""
    p = problem
    if _one_state(p):
        result = forward(p._replace(state_every=None), x)
        return result._replace(states=result.state[:, None].clone())
    size = (p.B, count_states(p, x.cu_seqlens), p.HV, p.K, p.V)
    states = torch.empty(size, dtype=torch.float32, device=x.k.device)
    along = (states, _offsets(p, x))
    o, final = _launch().forward(p, x, x.state, p.output, precision_of(p), along=along)
    return RecurrenceResult(o, final, states=states)


def backward(
    problem: Problem, x: Tensors, do: Tensor | None, dstate: Tensor | None, dstates: Tensor | None = None
) -> list[Tensor | None]:
    """Gradients of q, k, v, g, beta, state."""
    if problem.state_every is not None:
        if dstates is not None and problem.T > 0 and not _one_state(problem):
            along = (dstates.contiguous(), _offsets(problem, x))
            grads: list[Tensor | None] = _launch().backward(
                problem, x, x.state, do, dstate, precision_of(problem), along=along
            )
            return grads
        if dstates is not None and problem.T > 0:
            dstate = dstates[:, 0] if dstate is None else dstate + dstates[:, 0]
        problem = problem._replace(state_every=None)
    if problem.passes == 1 or problem.T == 0:
        return _one_backward(precision_of(problem), problem, x, x.state, do, dstate)
    return replay_backward.backward(problem, x, do, dstate, None, *pieces(problem))


def pieces(problem: Problem) -> tuple[replay_backward.OnePass, replay_backward.OneBackward]:
    """The two functions that the gradients of a replay consist of; sums over passes are float32."""
    precision = precision_of(problem)
    precision = "tf32" if precision == "bf16" else precision
    return partial(_state_after, precision), partial(_one_backward, precision)


def why_not_gates(problem: Problem) -> str | None:
    """None for one pass: its kernels make the gates of raw projections."""
    return None if problem.passes == 1 else "a replay takes gates that were made before"


def forward_of_raw(problem: Problem, x: Tensors, gates: RawGates) -> RecurrenceResult:
    """Outputs and final state of one pass whose gates are raw."""
    if problem.T == 0:
        return _no_tokens(problem, x)
    precision = precision_of(problem)
    return RecurrenceResult(*_launch().forward(problem, x, x.state, problem.output, precision, gates=gates))


def backward_of_raw(
    problem: Problem, x: Tensors, gates: RawGates, do: Tensor | None, dstate: Tensor | None
) -> list[Tensor | None]:
    """Gradients of q, k, v, raw g, raw beta, state, A_log and dt_bias."""
    precision = precision_of(problem)
    if problem.T == 0:
        zeros = [None if t is None else torch.zeros_like(t) for t in gates[:2]]
        return [*_one_backward(precision, problem, x, x.state, do, dstate), *zeros]
    grads: list[Tensor | None] = _launch().backward(problem, x, x.state, do, dstate, precision, gates)
    return grads


def step_of_raw(problem: Problem, x: Tensors, gates: RawGates) -> Tensor:
    """The same as `step` with raw gates."""
    return step(problem, x, gates)


def step(problem: Problem, x: Tensors, gates: RawGates | None = None) -> Tensor:
    """Outputs [B,T,HV,V]; the state is updated in place, also where it is not contiguous."""
    assert x.state is not None
    if problem.T == 0:
        return torch.empty_like(x.v)
    state = x.state.contiguous()
    o: Tensor = _launch().forward(problem, x, state, True, precision_of(problem), state, gates)[0]
    if state is not x.state:
        x.state.copy_(state)
    return o


def step_in_pool(problem: Problem, x: Tensors, indices: Tensor) -> Tensor:
    """The same on the states at `indices` [B] of a pool x.state [n,HV,K,V]; a negative index has none and outputs 0."""
    assert x.state is not None
    if problem.T > DECODE_LIMIT or not contiguous_heads(x.state):
        return torch_common.step_in_pool(problem, x, indices, step)
    if problem.T == 0:
        return torch.empty_like(x.v)
    o: Tensor = _launch().decode(problem, x, precision_of(problem), indices)
    return o


def step_states(
    problem: Problem, x: Tensors, indices: Tensor | None, states_out: Tensor, out_indices: Tensor | None
) -> Tensor:
    """Outputs [B,T,HV,V]; x.state is read, and the state after each token stored (interface.py, StepsInStates)."""
    assert x.state is not None
    if not (contiguous_heads(x.state) and contiguous_heads(states_out)):
        return torch_common.states_by_steps(problem, x, indices, states_out, out_indices, step)
    if problem.T == 0:
        return torch.empty_like(x.v)
    o: Tensor = _launch().decode(problem, x, precision_of(problem), indices, states_out, out_indices)
    return o


def _state_after(precision: Precision, problem: Problem, x: Tensors, state: Tensor | None) -> Tensor:
    final: Tensor = _launch().forward(problem._replace(passes=1), x, state, False, precision)[1]
    return final


def _one_backward(
    precision: Precision, problem: Problem, x: Tensors, state: Tensor | None, do: Tensor | None, dstate: Tensor | None
) -> list[Tensor | None]:
    if problem.T == 0:
        zeros = [None if t is None else torch.zeros_like(t) for t in x[:6]]
        return [*zeros[:5], zeros[5] if dstate is None or x.state is None else dstate.clone()]
    grads: list[Tensor | None] = _launch().backward(problem, x._replace(state=state), state, do, dstate, precision)
    return grads


def _no_tokens(problem: Problem, x: Tensors) -> RecurrenceResult:
    size = (problem.sequences, problem.HV, problem.K, problem.V)
    state = x.k.new_zeros(size, dtype=torch.float32) if x.state is None else x.state.clone()
    states = None if problem.state_every is None else state.new_empty((problem.B, 0, *size[1:]))
    return RecurrenceResult(torch.empty_like(x.v) if problem.output else None, state, states=states)


def _one_state(problem: Problem) -> bool:
    """Tells whether the only state along each sequence is the final one."""
    return not problem.packed and problem.state_every is not None and problem.T <= problem.state_every


def _offsets(problem: Problem, x: Tensors) -> Tensor | None:
    """The index of the first state of each packed sequence, on the device of the kernels."""
    if x.cu_seqlens is None or problem.state_every is None:
        return None
    return state_offsets(x.cu_seqlens, problem.state_every).to(x.k.device, non_blocking=True)


def _decodes(problem: Problem) -> bool:
    return problem.T <= DECODE_LIMIT and problem.passes == 1 and not problem.packed


def precision_of(problem: Problem) -> Precision:
    """The precision of products.

    float32 inputs are multiplied as torch multiplies matrices: as IEEE float32, unless
    torch.set_float32_matmul_precision allows tf32. float16 inputs take tf32 too, which holds them exactly and has room
    for states that float16 lacks.
    """
    if problem.dtype == torch.bfloat16:
        return "bf16"
    ieee = problem.dtype == torch.float32 and torch.get_float32_matmul_precision() == "highest"
    return "ieee" if ieee else "tf32"


@lru_cache(maxsize=1)
def _launch() -> Any:
    """The kernels, imported on the first call: the package needs no Triton to be imported."""
    from . import launch

    return launch


@lru_cache(maxsize=1)
def installed() -> bool:
    """Tells whether Triton can be imported."""
    return importlib.util.find_spec("triton") is not None


@lru_cache(maxsize=1)
def _interpreted() -> bool:
    """Tells whether TRITON_INTERPRET makes kernels run on the CPU, for tests."""
    from triton import knobs

    return bool(knobs.runtime.interpret)


def _capability() -> tuple[int, int]:
    """The capability of the current device, or that of a recent device where there is none, for `explain`."""
    return torch.cuda.get_device_capability() if torch.cuda.is_available() else (9, 0)
