"""Step 4 of a call with states along the way, RECORD: the operators of recurrence.py with one more result.

    sleepkern::ingest_with_states           forward of one pass, and the states after every `state_every` tokens
    sleepkern::ingest_with_states_backward  its gradients

`count` is the number of states in a row of the batch. Offsets of packed sequences decide it, and their values are not
known where a graph is made.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..backends.interface import RecurrenceBackend
from ..problems.recurrence import Problem, RecurrenceResult, Tensors, check_dense, describe
from ..problems.states import count_states
from ..rules import RULES
from . import recurrence
from .recurrence import INPUTS, OPTIONS, REPLAY, checked

_library = torch.library.Library("sleepkern", "FRAGMENT")
_library.define(
    f"ingest_with_states({INPUTS}Tensor? state, {OPTIONS}{REPLAY}, int state_every, int count)"
    " -> (Tensor, Tensor, Tensor)"
)
_library.define(
    f"ingest_with_states_backward({INPUTS}Tensor? state, {OPTIONS}{REPLAY}, int state_every, Tensor? do,"
    " Tensor? dstate, Tensor? dstates) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)"
)


def ingest(problem: Problem, engine: RecurrenceBackend, x: Tensors) -> RecurrenceResult:
    """Outputs, final state and the states along the way; differentiable in every tensor."""
    direct = recurrence.past_dispatcher(problem, engine, x)
    if direct is not None:
        return direct
    options = (*recurrence.options_of(problem, engine), problem.state_every, count_states(problem, x.cu_seqlens))
    o, state, states = torch.ops.sleepkern.ingest_with_states.default(*x, *options)
    return RecurrenceResult(o if problem.output else None, state, states=states)


def _ingest(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    x = Tensors._make(arguments[:7])
    rule, backend, scale, normalize, passes, tol, method, every, count = arguments[7:]
    replay = (passes, tol, method)
    problem, engine = checked(x, rule, backend, scale, normalize, *replay, state_every=every)
    if count != count_states(problem, x.cu_seqlens):
        raise ValueError(f"count: got {count} states a row; expected {count_states(problem, x.cu_seqlens)}")
    out = recurrence.checked_forward(problem, engine, x)
    assert out.states is not None
    return x.k.new_empty(0) if out.o is None else out.o, out.state, out.states


def _ingest_fake(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    x = Tensors._make(arguments[:7])
    rule, _, scale, normalize, passes, tol, method, every, count = arguments[7:]
    p = describe(RULES[rule], x, scale, normalize, passes, tol, method, every)
    o = x.k.new_empty(0) if x.q is None else torch.empty_like(x.v, memory_format=torch.contiguous_format)
    heads = (p.HV, p.K, p.V)
    final = x.k.new_empty((p.sequences, *heads), dtype=p.state_dtype)
    return o, final, x.k.new_empty((p.B, count, *heads), dtype=p.state_dtype)


def _ingest_backward(*arguments: Any) -> tuple[Tensor, ...]:
    x = Tensors._make(arguments[:7])
    rule, backend, scale, normalize, passes, tol, method, every, do, dstate, dstates = arguments[7:]
    replay = (passes, tol, method)
    problem, engine = checked(x, rule, backend, scale, normalize, *replay, state_every=every)
    recurrence.check_upstream(problem, x, do, dstate)
    if dstates is not None:
        size = (problem.B, count_states(problem, x.cu_seqlens), problem.HV, problem.K, problem.V)
        check_dense("dstates", dstates)
        recurrence.check_gradient("dstates", dstates, size, problem.state_dtype, x.k.device)
    grads = recurrence.checked_backward(problem, engine, x, do, dstate, dstates)
    return tuple(x.k.new_empty(0) if d is None else d for d in grads)


def _differentiate(ctx: Any, do: Tensor | None, dstate: Tensor | None, dstates: Tensor | None) -> tuple[Any, ...]:
    return recurrence.differentiate(ctx, do, dstate, dstates)


for _key in ("CPU", "CUDA"):
    _library.impl("ingest_with_states", _ingest, _key)
    _library.impl("ingest_with_states_backward", _ingest_backward, _key)
torch.library.register_fake("sleepkern::ingest_with_states", _ingest_fake, lib=_library)
torch.library.register_fake("sleepkern::ingest_with_states_backward", recurrence.ingest_backward_fake, lib=_library)
torch.library.register_autograd(
    "sleepkern::ingest_with_states", _differentiate, setup_context=recurrence.save, lib=_library
)
