"""Native C++ on the CPU: hands pointers to sleepkern._C."""

from __future__ import annotations

import importlib

import torch
from torch import Tensor

from ..problem import Problem, Tensors
from ..rules import DELTA_RULE, GATED_DELTA_RULE, GLA, KDA, SIMPLE_GLA
from . import replay_backward
from .interface import REPLAY
from .replay import Cost, affine, cheapest, closed, repeat, window_decay
from .tensors import Ingested, in_rows

try:
    _C = importlib.import_module("sleepkern._C")
except ImportError as error:
    _C = None  # type: ignore[assignment]
    _missing = f"the compiled module sleepkern._C is not there ({error})"

NAME = "cpu"
SUPPORTS = frozenset({GATED_DELTA_RULE, KDA, DELTA_RULE, SIMPLE_GLA, GLA})
OPTIONS = REPLAY
GATES = {"none": 0, "head": 1, "channel": 2}
_TYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
_ABSENT = (0, 0, 0)


def why_not(problem: Problem) -> str | None:
    """None for CPU tensors of at most 32 bits and heads of at most 256."""
    if _C is None:
        return _missing
    if problem.device != "cpu":
        return f"runs on the CPU, the tensors are on {problem.device}"
    if problem.dtype not in _TYPES:
        return f"no kernel for {problem.dtype}, only float32, bfloat16 and float16"
    if max(problem.K, problem.V) > _C.head_limit:
        return f"heads of at most {_C.head_limit}, got K = {problem.K}, V = {problem.V}"
    if problem.method == "rank" and not _one_block(problem):
        return f"method 'rank' needs one block (T <= {_C.rank_limit}) and no channel decay"
    if problem.method == "rank" and problem.tol is not None:
        return "method 'rank' never forms the state of a pass, which tol looks at"
    return None


def kernel(problem: Problem) -> str:
    """One line on the code that runs."""
    if problem.passes > 1:
        return f"C++ {_C.isa()}, replay {method_of(problem)}"
    if _C.step_limit() >= problem.T:
        return f"C++ {_C.isa()}, token by token"
    rounded = _C.multiplies_pairs() and problem.dtype == torch.bfloat16 and problem.rule.gate == "head"
    return f"C++ {_C.isa()}, chunked" + (", products of bfloat16, of float32 where errors add up" if rounded else "")


def method_of(problem: Problem) -> str:
    """The replay method for this problem: 'auto' takes the one that costs the fewest flop."""
    if problem.method != "auto":
        return problem.method
    T, K, V = problem.T, problem.K, problem.V
    wy, rank = 4 * T * K * V, None
    if _one_block(problem) and problem.tol is None:
        rank = Cost(setup=2 * T * K * (T + 2 * V) + T * T * (3 * K + V), a_pass=2 * T * T * V)
    return cheapest(problem, wy=Cost(0, wy), affine=Cost(6 * T * K * (K + V), 2 * K * K * V), rank=rank)


def _one_block(problem: Problem) -> bool:
    limit: int = _C.rank_limit
    return problem.rule.gate != "channel" and problem.T <= limit


def forward(problem: Problem, x: Tensors) -> Ingested:
    """Readouts and final state of `problem.passes` passes."""
    if problem.passes == 1 and problem.tol is None:
        return Ingested(*_one_pass(problem, x, x.state, problem.output))
    passes, method = problem.passes, method_of(problem)
    if passes > 1 and method in ("wy", "rank"):
        return _replay(problem, x, method)
    zero = x.k.new_zeros((problem.sequences, problem.HV, problem.K, problem.V), dtype=torch.float32)
    state = zero if x.state is None else x.state

    exact = x if passes == 1 else x._replace(k=x.k.float(), v=x.v.float())  # passes multiply errors of bfloat16

    def one_pass(state: Tensor, output: bool) -> tuple[Tensor | None, Tensor]:
        return _one_pass(problem, x if output else exact, state, output)

    if passes > 1 and method == "closed":
        state, passes = closed(window_decay(problem, x), one_pass(zero, False)[1], state, passes - 1), 1
    elif passes > 1 and method == "affine":
        A, B = _transition(problem, exact), one_pass(zero, False)[1]
        return repeat(affine(A, B, one_pass), state, passes, problem.tol, problem.output)
    return repeat(one_pass, state, passes, problem.tol, problem.output)


def _replay(problem: Problem, x: Tensors, method: str) -> Ingested:
    """Passes over factors that are made once; readouts by an ordinary pass from the state before the last."""
    size = (problem.sequences, problem.HV, problem.K, problem.V)
    final = x.k.new_empty(size, dtype=torch.float32)
    state = None if x.state is None else x.state.contiguous()
    before = residual = made = None
    passes = problem.passes - 1 if problem.output and problem.tol is None else problem.passes
    if problem.tol is not None:
        residual = x.k.new_empty(size[:2], dtype=torch.float32)
        made = x.k.new_empty(size[:2], dtype=torch.int32)
        before = torch.empty_like(final) if problem.output else None
    arguments, _alive = _arguments(problem, x, state, False)
    _C.replay(
        *arguments, final.data_ptr(), method == "rank", passes, problem.tol or 0.0,
        _address(before), _address(residual), _address(made),
    )  # fmt: skip
    if not problem.output:
        return Ingested(None, final, residual, made)
    o, last = _one_pass(problem, x, final if before is None else before, True)
    return Ingested(o, last if before is None else final, residual, made)


def backward(problem: Problem, x: Tensors, do: Tensor | None, dstate: Tensor | None) -> list[Tensor | None]:
    """Gradients of q, k, v, g, beta, state."""
    if problem.passes == 1:
        return _one_backward(problem, x, x.state, do, dstate)
    made = None if problem.tol is None else forward(problem._replace(output=False), x._replace(q=None)).passes
    return replay_backward.backward(problem, x, do, dstate, made, *pieces(problem))


def pieces(problem: Problem) -> tuple[replay_backward.OnePass, replay_backward.OneBackward]:
    """What the gradients of a replay are put together from."""
    return _state_after, _one_backward


def _state_after(problem: Problem, x: Tensors, state: Tensor | None) -> Tensor:
    return _one_pass(problem, x, state, False)[1]


def step(problem: Problem, x: Tensors) -> Tensor:
    """Readouts [B,T,HV,V]; the state is updated in place, also where it is not contiguous."""
    assert x.state is not None
    state = x.state.contiguous()
    o, _ = _one_pass(problem, x, state, True, final=state)
    assert o is not None
    if state is not x.state:
        x.state.copy_(state)
    return o


def _transition(problem: Problem, x: Tensors) -> Tensor:
    """A [sequences,HV,K,K] of the window: a pass from the identity with values of width K that are zero."""
    K = problem.K
    identity = torch.eye(K, dtype=torch.float32, device=x.k.device).expand(problem.sequences, problem.HV, K, K)
    zero = x.k.new_zeros((problem.B, problem.T, problem.HV, K))
    return _one_pass(problem._replace(V=K), x._replace(v=zero), identity, False)[1]


def _one_pass(
    problem: Problem, x: Tensors, state: Tensor | None, output: bool, final: Tensor | None = None
) -> tuple[Tensor | None, Tensor]:
    o = torch.empty_like(x.v, memory_format=torch.contiguous_format) if output else None
    if final is None:
        final = x.k.new_empty((problem.sequences, problem.HV, problem.K, problem.V), dtype=torch.float32)
        state = None if state is None else state.contiguous()
    arguments, _alive = _arguments(problem, x, state, output)
    _C.forward(*arguments, _address(o), final.data_ptr())
    return o, final


def _one_backward(
    problem: Problem, x: Tensors, state: Tensor | None, do: Tensor | None, dstate: Tensor | None
) -> list[Tensor | None]:
    """Gradients of q, k, v, g, beta and of the state that one pass starts from, None where there is no such tensor."""
    reads = do is not None and x.q is not None
    state = None if state is None else state.contiguous()
    dstate = None if dstate is None else dstate.contiguous()
    key_type = x.k.dtype if problem.H == problem.HV else torch.float32
    arguments, _alive = _arguments(problem, x, state, reads)
    do, do_view = _rows(do if reads else None, problem.HV * problem.V)

    def like(t: Tensor | None, dtype: torch.dtype | None = None) -> Tensor | None:
        return None if t is None else torch.empty_like(t, dtype=dtype, memory_format=torch.contiguous_format)

    dq, dk, dv = like(x.q if reads else None, key_type), like(x.k, key_type), like(x.v)
    dg, dbeta, dinitial = (like(t, _gate_type(t)) for t in (x.g, x.beta, state))
    _C.backward(
        *arguments, do_view, _address(dstate), _address(dq), _address(dk), _TYPES[key_type], _address(dv),
        _address(dg), _address(dbeta), _address(dinitial),
    )  # fmt: skip
    if dq is None and x.q is not None:
        dq = torch.zeros_like(x.q)
    grads = [dq, dk, dv, dg, dbeta, dinitial]
    return [d if d is None or t is None else d.to(t.dtype) for d, t in zip(grads, x, strict=False)]


def _arguments(
    problem: Problem, x: Tensors, state: Tensor | None, reads: bool
) -> tuple[tuple[object, ...], list[Tensor | None]]:
    """What every entry point of _C takes first, and the tensors that must live while it runs."""
    H, HV, K, V = problem.H, problem.HV, problem.K, problem.V
    offsets = x.cu_seqlens
    if offsets is not None and not (offsets.is_cpu and offsets.dtype == torch.int64 and offsets.is_contiguous()):
        offsets = offsets.to("cpu", torch.int64).contiguous()
    q, q_view = _rows(x.q, H * K) if reads else (None, _ABSENT)
    k, k_view = _rows(x.k, H * K)
    v, v_view = _rows(x.v, HV * V)
    g, g_view = _rows(x.g, HV * K if problem.rule.gate == "channel" else HV)
    beta, beta_view = _rows(x.beta, HV)
    arguments = (
        GATES[problem.rule.gate], problem.rule.delta, problem.normalize, problem.scale,
        problem.sequences, problem.T, H, HV, K, V,
        _address(offsets), q_view, k_view, v_view, g_view, beta_view, _address(state),
    )  # fmt: skip
    return arguments, [offsets, q, k, v, g, beta, state]


def _address(t: Tensor | None) -> int:
    return 0 if t is None else t.data_ptr()


def _gate_type(t: Tensor | None) -> torch.dtype | None:
    """Type the kernel writes the gradient of a gate in: float32 for a float64 gate, which it reads as float32."""
    return None if t is None or t.dtype in _TYPES else torch.float32


def _rows(t: Tensor | None, width: int) -> tuple[Tensor | None, tuple[int, int, int]]:
    """A tensor of tokens as _C takes it, (address, row stride, type code), and what keeps it alive."""
    if t is None:
        return None, _ABSENT
    if t.dtype not in _TYPES:  # float64 gates beside float32 inputs
        t = t.float()
    if t.is_contiguous():  # the most frequent answer of in_rows
        return t, (t.data_ptr(), width, _TYPES[t.dtype])
    t, stride = in_rows(t, width)
    return t, (t.data_ptr(), stride, _TYPES[t.dtype])
