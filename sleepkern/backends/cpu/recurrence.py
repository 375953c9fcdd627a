"""Native C++ on the CPU: hands pointers to sleepkern._C."""

from __future__ import annotations

from typing import Any, TypedDict

import torch
from torch import Tensor

from ...problems.gates import RawGates
from ...problems.recurrence import Problem, RecurrenceResult, Tensors
from ...rules import DELTA_RULE, GATED_DELTA_RULE, GLA, KDA, SIMPLE_GLA
from ..interface import REPLAY
from ..native.module import _C, GATE_CODES, MISSING, TYPE_CODES
from ..native.views import ABSENT, Array, Rows, address, array, rows
from ..replay import backward as replay_backward
from ..replay import costs
from ..replay.methods import affine, closed, repeat, window_decay

NAME = "cpu"
SUPPORTS = frozenset({GATED_DELTA_RULE, KDA, DELTA_RULE, SIMPLE_GLA, GLA})
OPTIONS = REPLAY


def why_not(problem: Problem) -> str | None:
    """None for CPU tensors of at most 32 bits and heads of at most 256."""
    if _C is None:
        return MISSING
    if problem.device != "cpu":
        return f"runs on the CPU, the tensors are on {problem.device}"
    if problem.dtype not in TYPE_CODES:
        return f"no kernel for {problem.dtype}, only float32, bfloat16 and float16"
    if max(problem.K, problem.V) > _C.head_limit:
        return f"heads of at most {_C.head_limit}, got K = {problem.K}, V = {problem.V}"
    return costs.refuse(problem, _C.rank_limit)


def kernel(problem: Problem) -> str:
    """One line on the code that runs."""
    if problem.passes > 1:
        return f"C++ {_C.isa()}, replay {method_of(problem)}"
    if _C.decode_limit >= problem.T:
        return f"C++ {_C.isa()}, token by token"
    rounded = _C.multiplies_bf16() and problem.dtype == torch.bfloat16 and problem.rule.gate == "head"
    return f"C++ {_C.isa()}, chunked" + (", products of bfloat16, of float32 where errors add up" if rounded else "")


def method_of(problem: Problem) -> str:
    """The replay method for this problem: 'auto' takes the one that costs the fewest flop."""
    if problem.method != "auto":
        return problem.method
    T, K, V = problem.T, problem.K, problem.V
    fits = costs.refuse(problem._replace(method="rank"), _C.rank_limit) is None
    affine = costs.affine(6 * T * K * (K + V), K, V)
    return costs.cheapest(problem, wy=costs.wy(T, K, V), affine=affine, rank=costs.rank(T, K, V) if fits else None)


def forward(problem: Problem, x: Tensors) -> RecurrenceResult:
    """Compute the output of the last of `problem.passes` passes and the final state."""
    if problem.passes == 1 and problem.tol is None:
        return RecurrenceResult(*_one_pass(problem, x, x.state, problem.output))
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


def _replay(problem: Problem, x: Tensors, method: str) -> RecurrenceResult:
    """Run passes over factors that are made once; outputs by an ordinary pass from the state before the last."""
    size = (problem.sequences, problem.HV, problem.K, problem.V)
    final = x.k.new_empty(size, dtype=torch.float32)
    state = None if x.state is None else x.state.contiguous()
    before = residual = passes_done = None
    passes = problem.passes - 1 if problem.output and problem.tol is None else problem.passes
    if problem.tol is not None:
        residual = x.k.new_empty(size[:2], dtype=torch.float32)
        passes_done = x.k.new_empty(size[:2], dtype=torch.int32)
        before = torch.empty_like(final) if problem.output else None
    fields, _alive = _fields(problem, x, state, False)
    _C.replay(
        **fields,
        final_state=final.data_ptr(),
        rank=method == "rank",
        passes=passes,
        tol=problem.tol or 0.0,
        before=address(before),
        residual=address(residual),
        passes_done=address(passes_done),
    )
    if not problem.output:
        return RecurrenceResult(None, final, residual, passes_done)
    o, last = _one_pass(problem, x, final if before is None else before, True)
    return RecurrenceResult(o, last if before is None else final, residual, passes_done)


def backward(
    problem: Problem, x: Tensors, do: Tensor | None, dstate: Tensor | None, dstates: Tensor | None = None
) -> list[Tensor | None]:
    """Compute the gradients of q, k, v, g, beta and state."""
    if problem.passes == 1:
        return _one_backward(problem, x, x.state, do, dstate)
    passes_done = None
    if problem.tol is not None:
        passes_done = forward(problem._replace(output=False), x._replace(q=None)).passes
    return replay_backward.backward(problem, x, do, dstate, passes_done, *pieces(problem))


def pieces(problem: Problem) -> tuple[replay_backward.OnePass, replay_backward.OneBackward]:
    """The two functions that a replay's gradients need: the state after one pass, and the backward of one pass."""
    return _state_after, _one_backward


def _state_after(problem: Problem, x: Tensors, state: Tensor | None) -> Tensor:
    return _one_pass(problem, x, state, False)[1]


def step(problem: Problem, x: Tensors, gates: RawGates | None = None) -> Tensor:
    """Compute the outputs [B,T,HV,V]; the state is updated in place, also where it is not contiguous."""
    assert x.state is not None
    state = x.state.contiguous()
    o, _ = _one_pass(problem, x, state, True, final=state, gates=gates)
    assert o is not None
    if state is not x.state:
        x.state.copy_(state)
    return o


def why_not_gates(problem: Problem) -> str | None:
    """None for one pass: its kernels make the gates of raw projections."""
    return None if problem.passes == 1 and problem.tol is None else "a replay takes gates that were made before"


def forward_of_raw(problem: Problem, x: Tensors, gates: RawGates) -> RecurrenceResult:
    """Compute the output and the final state of one pass whose gates are raw."""
    return RecurrenceResult(*_one_pass(problem, x, x.state, problem.output, gates=gates))


def backward_of_raw(
    problem: Problem, x: Tensors, gates: RawGates, do: Tensor | None, dstate: Tensor | None
) -> list[Tensor | None]:
    """Compute the gradients of q, k, v, raw g, raw beta, state, A_log and dt_bias."""
    channels = problem.K if problem.rule.gate == "channel" else 1
    size = (max(problem.sequences, 1), problem.HV, 1 + channels)
    sums = torch.zeros(size, dtype=torch.float64, device="cpu") if gates.decay else None
    grads = _one_backward(problem, x, x.state, do, dstate, gates, sums)
    A_log, dt_bias = gates.A_log, gates.dt_bias
    dA_log = None if sums is None or A_log is None else sums[0, :, 0].to(A_log.dtype)
    ddt_bias = None if sums is None or dt_bias is None else sums[0, :, 1:].to(dt_bias.dtype).reshape(dt_bias.shape)
    return [*grads, dA_log, ddt_bias]


def step_of_raw(problem: Problem, x: Tensors, gates: RawGates) -> Tensor:
    """Do the same as `step` with raw gates."""
    return step(problem, x, gates)


def _transition(problem: Problem, x: Tensors) -> Tensor:
    """A [sequences,HV,K,K] of the window: a pass from the identity with values of width K that are zero."""
    K = problem.K
    identity = torch.eye(K, dtype=torch.float32, device=x.k.device).expand(problem.sequences, problem.HV, K, K)
    zero = x.k.new_zeros((problem.B, problem.T, problem.HV, K))
    return _one_pass(problem._replace(V=K), x._replace(v=zero), identity, False)[1]


def _one_pass(
    problem: Problem,
    x: Tensors,
    state: Tensor | None,
    output: bool,
    final: Tensor | None = None,
    gates: RawGates | None = None,
) -> tuple[Tensor | None, Tensor]:
    o = torch.empty_like(x.v, memory_format=torch.contiguous_format) if output else None
    if final is None:
        final = x.k.new_empty((problem.sequences, problem.HV, problem.K, problem.V), dtype=torch.float32)
        state = None if state is None else state.contiguous()
    fields, _alive = _fields(problem, x, state, output)
    if gates is None:
        _C.forward(**fields, o=address(o), final_state=final.data_ptr())
    else:
        more, _alive_too = _gate_fields(gates)
        _C.forward_of_raw(**fields, **more, o=address(o), final_state=final.data_ptr())
    return o, final


def _one_backward(
    problem: Problem,
    x: Tensors,
    state: Tensor | None,
    do: Tensor | None,
    dstate: Tensor | None,
    gates: RawGates | None = None,
    sums: Tensor | None = None,
) -> list[Tensor | None]:
    """Gradients of q, k, v, g, beta and of the state that one pass starts from, None where there is no such tensor.

    With raw gates, the gradients of A_log and dt_bias are added to sums [sequences,HV,2] or [sequences,HV,1+K].
    """
    want_output = do is not None and x.q is not None
    state = None if state is None else state.contiguous()
    dstate = None if dstate is None else dstate.contiguous()
    key_type = x.k.dtype if problem.H == problem.HV else torch.float32
    fields, _alive = _fields(problem, x, state, want_output)
    do, do_view = rows(do if want_output else None, problem.HV * problem.V)

    def like(t: Tensor | None, dtype: torch.dtype | None = None) -> Tensor | None:
        return None if t is None else torch.empty_like(t, dtype=dtype, memory_format=torch.contiguous_format)

    dq, dk, dv = like(x.q if want_output else None, key_type), like(x.k, key_type), like(x.v)
    dg, dbeta, dinitial = (like(t, _gate_type(t)) for t in (x.g, x.beta, state))
    above = {"do": do_view, "dfinal": address(dstate)}
    made = {"dq": dq, "dk": dk, "dv": dv, "dg": dg, "dbeta": dbeta, "dstate": dinitial}
    written: dict[str, Any] = {**above, "key_type": TYPE_CODES[key_type], **{n: address(t) for n, t in made.items()}}
    if gates is None:
        _C.backward(**fields, **written)
    else:
        more, _alive_too = _gate_fields(gates)
        _C.backward_of_raw(**fields, **more, **written, gate_sums=address(sums))
    if dq is None and x.q is not None:
        dq = torch.zeros_like(x.q)
    grads = [dq, dk, dv, dg, dbeta, dinitial]
    return [d if d is None or t is None else d.to(t.dtype) for d, t in zip(grads, x, strict=False)]


class _Fields(TypedDict):
    """The fields that every entry point of _C takes: csrc/common/recurrence.h says what each is."""

    gate: int
    delta: bool
    normalize: bool
    scale: float
    sequences: int
    T: int
    H: int
    HV: int
    K: int
    V: int
    offsets: int
    q: Rows
    k: Rows
    v: Rows
    g: Rows
    beta: Rows
    state: int


def _fields(
    problem: Problem, x: Tensors, state: Tensor | None, want_output: bool
) -> tuple[_Fields, list[Tensor | None]]:
    """The fields of a call, and the tensors that must live while it runs."""
    H, HV, K, V = problem.H, problem.HV, problem.K, problem.V
    offsets = x.cu_seqlens
    if offsets is not None and not (offsets.is_cpu and offsets.dtype == torch.int64 and offsets.is_contiguous()):
        offsets = offsets.to("cpu", torch.int64).contiguous()
    q, q_view = rows(x.q, H * K) if want_output else (None, ABSENT)
    k, k_view = rows(x.k, H * K)
    v, v_view = rows(x.v, HV * V)
    g, g_view = rows(x.g, HV * K if problem.rule.gate == "channel" else HV)
    beta, beta_view = rows(x.beta, HV)
    fields: _Fields = {
        "gate": GATE_CODES[problem.rule.gate],
        "delta": problem.rule.delta,
        "normalize": problem.normalize,
        "scale": problem.scale,
        "sequences": problem.sequences,
        "T": problem.T,
        "H": H,
        "HV": HV,
        "K": K,
        "V": V,
        "offsets": address(offsets),
        "q": q_view,
        "k": k_view,
        "v": v_view,
        "g": g_view,
        "beta": beta_view,
        "state": address(state),
    }
    return fields, [offsets, q, k, v, g, beta, state]


class _GateFields(TypedDict):
    """The fields that say which gates are raw (RawGates of csrc/common/recurrence.h)."""

    raw_decay: bool
    lower_bound: float
    beta_scale: float
    A_log: Array
    dt_bias: Array


def _gate_fields(gates: RawGates) -> tuple[_GateFields, list[Tensor | None]]:
    """The fields of raw gates, and the tensors that must live while a call reads them."""
    narrow = [None if t is None or t.dtype in TYPE_CODES else t.float() for t in (gates.A_log, gates.dt_bias)]
    given = [t if n is None else n for t, n in zip((gates.A_log, gates.dt_bias), narrow, strict=True)]
    (A_log, A_log_view), (dt_bias, dt_bias_view) = (array(t) for t in given)
    fields: _GateFields = {
        "raw_decay": gates.decay,
        "lower_bound": gates.lower_bound or 0.0,
        "beta_scale": gates.beta_scale,
        "A_log": A_log_view,
        "dt_bias": dt_bias_view,
    }
    return fields, [A_log, dt_bias]


def _gate_type(t: Tensor | None) -> torch.dtype | None:
    """Type the kernel writes the gradient of a gate in: float32 for a float64 gate, which it reads as float32."""
    return None if t is None or t.dtype in TYPE_CODES else torch.float32
