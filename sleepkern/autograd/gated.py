"""Step 4 of a call whose gates are raw: by the backend that was chosen, where it makes gates itself, else by torch.

    sleepkern::ingest_of_raw           forward of one pass
    sleepkern::ingest_of_raw_backward  its gradients, those of A_log and dt_bias among them

Where torch makes the gates, the operators of recurrence.py are recorded after torch's own.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import transforms
from ..addresses import check_written, mark_written
from ..backends.interface import MakesGates, RecurrenceBackend
from ..backends.native.views import on_device_of
from ..backends.torch_common import differentiable
from ..backends.torch_gates import with_gates
from ..dispatch import choose, torch_form
from ..eager import refuse_tangents, unrecorded
from ..problems.gates import RawGates, check_gates, check_raw_values
from ..problems.recurrence import Problem, RecurrenceResult, Tensors, check, describe
from ..rules import RULES, rule_named
from . import recurrence
from .recurrence import check_upstream, of_no_sequence, row_of

_INPUTS = (
    "Tensor? q, Tensor k, Tensor v, Tensor? g, Tensor? beta, Tensor? state, Tensor? A_log, Tensor? dt_bias, "
    "Tensor? cu_seqlens, str rule, str backend, float scale, bool normalize, float? lower_bound, bool decay, "
    "float beta_scale"
)
_READ = ("q", "k", "v", "g", "beta", "A_log", "dt_bias")

_library = torch.library.Library("sleepkern", "FRAGMENT")
_library.define(f"ingest_of_raw({_INPUTS}) -> (Tensor, Tensor)")
_library.define(
    f"ingest_of_raw_backward({_INPUTS}, Tensor? do, Tensor? dstate)"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)"
)


def ingest(problem: Problem, engine: RecurrenceBackend, x: Tensors, gates: RawGates) -> RecurrenceResult:
    """Outputs and final state, recorded by autograd in every tensor, A_log and dt_bias among them."""
    check_gates(problem, x, gates)
    maker = _gate_maker(engine)
    if maker is None or maker.why_not_gates(problem) is not None or transforms.active():
        return recurrence.ingest(problem, engine, with_gates(problem, x, gates))
    A_log, dt_bias, *options = gates
    refuse_tangents(*x, A_log, dt_bias)
    if unrecorded(*x, A_log, dt_bias):
        return _checked_forward(problem, maker, x, gates)
    o, state = torch.ops.sleepkern.ingest_of_raw.default(
        *x[:6], A_log, dt_bias, x.cu_seqlens,
        row_of(problem.rule), engine.NAME, problem.scale, problem.normalize, *options,
    )  # fmt: skip
    return RecurrenceResult(o if problem.output else None, state)


def made(problem: Problem, x: Tensors, gates: RawGates) -> Tensors:
    """The tensors of the same call with gates that torch's operators make.

    Raises:
        TypeError, ValueError: gates that do not fit the call.
    """
    check_gates(problem, x, gates)
    return with_gates(problem, x, gates)


def step(problem: Problem, engine: RecurrenceBackend, x: Tensors, gates: RawGates) -> Tensor | None:
    """Outputs [B,T,HV,V], x.state updated in place; None where torch has to make the gates, or to record the call."""
    maker = _gate_maker(engine)
    if maker is None or maker.why_not_gates(problem) is not None or transforms.active():
        return None
    refuse_tangents(*x, gates.A_log, gates.dt_bias)
    if not unrecorded(*x, gates.A_log, gates.dt_bias):
        return None
    check_gates(problem, x, gates)
    check_raw_values(problem, x, gates, "state")
    assert x.state is not None
    if not x.state.is_meta:
        check_written("state", x.state, _READ, (*x[:5], gates.A_log, gates.dt_bias))
    if problem.B == 0:
        return torch.empty_like(x.v, memory_format=torch.contiguous_format)
    mark_written(x.state)
    with on_device_of(x.k):
        return maker.step_of_raw(problem, x, gates)


def _gate_maker(engine: RecurrenceBackend) -> MakesGates | None:
    """The backend if its kernels make gates. One name tells; to compare protocols takes microseconds."""
    return engine if hasattr(engine, "why_not_gates") else None  # type: ignore[return-value]


def _checked_forward(problem: Problem, maker: MakesGates, x: Tensors, gates: RawGates) -> RecurrenceResult:
    check_raw_values(problem, x, gates)
    if problem.B == 0:
        return of_no_sequence(problem, x)
    with on_device_of(x.k):
        return maker.forward_of_raw(problem, x, gates)


class _Call:
    """An operator's call, which may be anybody's, with all that `ops` checks."""

    def __init__(self, *arguments: Any) -> None:
        q, k, v, g, beta, state, A_log, dt_bias, cu_seqlens, rule, backend, scale, normalize, *gates = arguments
        self.x = Tensors(q, k, v, g, beta, state, cu_seqlens)
        self.gates = RawGates(A_log, dt_bias, *gates)
        self.problem = check(rule_named(rule), self.x, scale, normalize, outputs=q is not None)
        check_gates(self.problem, self.x, self.gates)
        with on_device_of(k):
            self.engine = choose(self.problem, backend)
        maker = _gate_maker(self.engine)
        if maker is None or maker.why_not_gates(self.problem) is not None:
            raise ValueError(f"backend: got {backend!r}, whose kernels make no gates; expected cpu or triton")
        self.maker = maker


def _ingest(*arguments: Any) -> tuple[Tensor, Tensor]:
    call = _Call(*arguments)
    out = _checked_forward(call.problem, call.maker, call.x, call.gates)
    return call.x.k.new_empty(0) if out.o is None else out.o, out.state


def _ingest_fake(*arguments: Any) -> tuple[Tensor, Tensor]:
    x, options = Tensors._make([*arguments[:6], arguments[8]]), arguments[9:]
    problem = describe(RULES[options[0]], x, options[2], options[3])
    o = x.k.new_empty(0) if x.q is None else torch.empty_like(x.v, memory_format=torch.contiguous_format)
    size = (problem.sequences, problem.HV, problem.K, problem.V)
    return o, x.k.new_empty(size, dtype=problem.state_dtype)


def _ingest_backward(*arguments: Any) -> tuple[Tensor, ...]:
    *inputs, do, dstate = arguments
    call = _Call(*inputs)
    x, k = call.x, call.x.k
    check_raw_values(call.problem, x, call.gates)
    check_upstream(call.problem, x, do, dstate)
    if call.problem.B == 0:
        return tuple(k.new_empty(0) if t is None else torch.zeros_like(t) for t in inputs[:8])
    with on_device_of(k):
        grads = call.maker.backward_of_raw(call.problem, x, call.gates, do, dstate)
    return tuple(k.new_empty(0) if d is None else d.contiguous() for d in grads)


def _ingest_backward_fake(*arguments: Any) -> tuple[Tensor, ...]:
    k = arguments[1]
    return tuple(
        k.new_empty(0) if t is None else torch.empty_like(t, memory_format=torch.contiguous_format)
        for t in arguments[:8]
    )


def _save(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    # A copy of cu_seqlens: by numpy it may change before the backward, and torch would not see it.
    offsets = None if inputs[8] is None else inputs[8].clone()
    ctx.save_for_backward(*inputs[:8], offsets)
    ctx.options = inputs[9:]
    ctx.set_materialize_grads(False)
    ctx.has_output = inputs[0] is not None


def _differentiate(ctx: Any, do: Tensor | None, dstate: Tensor | None) -> tuple[Any, ...]:
    tensors, rest = ctx.saved_tensors, (None, *(None for _ in ctx.options))
    if (do is None or not ctx.has_output) and dstate is None:
        return (*(None for _ in tensors[:8]), *rest)
    if torch.is_grad_enabled():
        return (*_differentiable(ctx, tensors, do, dstate), *rest)
    grads = torch.ops.sleepkern.ingest_of_raw_backward.default(
        *tensors, *ctx.options, do if ctx.has_output else None, dstate
    )
    return (*(d if t is not None else None for t, d in zip(tensors, grads, strict=False)), *rest)


def _differentiable(
    ctx: Any, tensors: tuple[Tensor | None, ...], do: Tensor | None, dstate: Tensor | None
) -> list[Tensor | None]:
    """Gradients for create_graph=True: by torch's own operators, so that they have some."""
    rule, _, scale, normalize, *options = ctx.options
    offsets = tensors[8]

    def by_torch(*inputs: Tensor | None) -> list[Tensor | None]:
        x = Tensors._make([*inputs[:6], offsets])
        problem = describe(RULES[rule], x, scale, normalize)
        out = torch_form(problem).forward(problem, with_gates(problem, x, RawGates._make([*inputs[6:], *options])))
        return [out.o, out.state]

    return differentiable(by_torch, tensors[:8], [do, dstate])


for _key in ("CPU", "CUDA"):
    _library.impl("ingest_of_raw", _ingest, _key)
    _library.impl("ingest_of_raw_backward", _ingest_backward, _key)
torch.library.register_fake("sleepkern::ingest_of_raw", _ingest_fake, lib=_library)
torch.library.register_fake("sleepkern::ingest_of_raw_backward", _ingest_backward_fake, lib=_library)
torch.library.register_autograd("sleepkern::ingest_of_raw", _differentiate, setup_context=_save, lib=_library)
