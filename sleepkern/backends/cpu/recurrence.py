"""Native C++ on the CPU: hands pointers to sleepkern._C."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ...problems.gates import RawGates
from ...problems.recurrence import Problem, RecurrenceResult, Tensors
from ...problems.states import count_states
from ...rules import DELTA_RULE, GATED_DELTA_RULE, GLA, KDA, SIMPLE_GLA
from ..interface import REPLAY, STATES, refuse_states
from ..native.module import _C, MISSING, TYPE_CODES
from ..native.views import address, rows
from ..replay import backward as replay_backward
from ..replay import costs
from ..replay.methods import affine, closed, repeat, window_decay
from ..torch_common import states_by_steps
from ..torch_common import step_in_pool as step_on_copies
from . import decode
from .fields import fields_of, gate_fields_of, gate_type

NAME = "cpu"
SUPPORTS = frozenset({GATED_DELTA_RULE, KDA, DELTA_RULE, SIMPLE_GLA, GLA})
OPTIONS = REPLAY | STATES


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
    return refuse_states(problem) or costs.refuse(problem, _C.rank_limit)


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
    if problem.state_every is not None:
        return _keeping_states(problem, x, problem.state_every)
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


def _keeping_states(problem: Problem, x: Tensors, every: int) -> RecurrenceResult:
    """One pass that stores the states along the way."""
    o = torch.empty_like(x.v, memory_format=torch.contiguous_format) if problem.output else None
    heads = (problem.HV, problem.K, problem.V)
    final = x.k.new_empty((problem.sequences, *heads), dtype=torch.float32)
    states = x.k.new_empty((problem.B, count_states(problem, x.cu_seqlens), *heads), dtype=torch.float32)
    state = None if x.state is None else x.state.contiguous()
    fields, _alive = fields_of(problem, x, state, problem.output)
    kept = {"state_every": every, "state_count": problem.B * states.shape[1], "states": states.data_ptr()}
    _C.forward_keeping_states(**fields, o=address(o), final_state=final.data_ptr(), **kept)
    return RecurrenceResult(o, final, states=states)


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
    fields, _alive = fields_of(problem, x, state, False)
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
        return _one_backward(problem, x, x.state, do, dstate, dstates=dstates)
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
    """Compute the outputs [B,T,HV,V]; the state is updated in place, also where it is bfloat16 or not contiguous."""
    assert x.state is not None
    state = x.state
    if problem.state_bf16 or not state.is_contiguous():
        if problem.T <= _C.decode_limit and decode.has_matrices(state):
            return decode.run(problem, x, None, None, None, gates)
        state = state.float().contiguous()
    o, _ = _one_pass(problem, x, state, True, final=state, gates=gates)
    assert o is not None
    if state is not x.state:
        x.state.copy_(state)
    return o


def step_in_pool(problem: Problem, x: Tensors, indices: Tensor) -> Tensor:
    """Compute the outputs [B,T,HV,V]; row b updates x.state[indices[b]] in place, and none where the index is negative.

    The states of calls too long for decode are copied out and back, to be computed in chunks.
    """
    assert x.state is not None
    if problem.T <= _C.decode_limit and decode.has_matrices(x.state):
        return decode.run(problem, x, indices)
    return step_on_copies(problem, x, indices, step)


def step_states(
    problem: Problem, x: Tensors, indices: Tensor | None, states_out: Tensor, out_indices: Tensor | None
) -> Tensor:
    """Compute the outputs [B,T,HV,V] of states that are read, and store the state after each token."""
    assert x.state is not None
    if decode.has_matrices(x.state) and decode.has_matrices(states_out):
        return decode.run(problem, x, indices, states_out, out_indices)
    return states_by_steps(problem, x, indices, states_out, out_indices, step)


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
    fields, _alive = fields_of(problem, x, state, output)
    if gates is None:
        _C.forward(**fields, o=address(o), final_state=final.data_ptr())
    else:
        more, _alive_too = gate_fields_of(gates)
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
    dstates: Tensor | None = None,
) -> list[Tensor | None]:
    """Gradients of q, k, v, g, beta and of the state that one pass starts from, None where there is no such tensor.

    With raw gates, the gradients of A_log and dt_bias are added to sums [sequences,HV,2] or [sequences,HV,1+K].
    """
    want_output = do is not None and x.q is not None
    state = None if state is None else state.contiguous()
    dstate = None if dstate is None else dstate.contiguous()
    key_type = x.k.dtype if problem.H == problem.HV else torch.float32
    fields, _alive = fields_of(problem, x, state, want_output)
    do, do_view = rows(do if want_output else None, problem.HV * problem.V)

    def like(t: Tensor | None, dtype: torch.dtype | None = None) -> Tensor | None:
        return None if t is None else torch.empty_like(t, dtype=dtype, memory_format=torch.contiguous_format)

    dq, dk, dv = like(x.q if want_output else None, key_type), like(x.k, key_type), like(x.v)
    dg, dbeta, dinitial = (like(t, gate_type(t)) for t in (x.g, x.beta, state))
    above = {"do": do_view, "dfinal": address(dstate)}
    made = {"dq": dq, "dk": dk, "dv": dv, "dg": dg, "dbeta": dbeta, "dstate": dinitial}
    written: dict[str, Any] = {**above, "key_type": TYPE_CODES[key_type], **{n: address(t) for n, t in made.items()}}
    if dstates is not None:
        dstates, count = dstates.contiguous(), dstates.shape[0] * dstates.shape[1]
        written |= {"state_every": problem.state_every or 1, "state_count": count, "dstates": address(dstates)}
        _C.backward_keeping_states(**fields, **written)
    elif gates is None:
        _C.backward(**fields, **written)
    else:
        more, _alive_too = gate_fields_of(gates)
        _C.backward_of_raw(**fields, **more, **written, gate_sums=address(sums))
    if dq is None and x.q is not None:
        dq = torch.zeros_like(x.q)
    grads = [dq, dk, dv, dg, dbeta, dinitial]
    return [d if d is None or t is None else d.to(t.dtype) for d, t in zip(grads, x, strict=False)]
