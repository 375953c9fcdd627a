"""Step 4 of a call, RECORD: the operators as torch knows them, one path for all rules and backends.

    sleepkern::ingest           forward of every rule, any number of passes
    sleepkern::ingest_backward  its gradients

states.py has these with the states along the way, steps.py the operators of decode. Each has a fake kernel, so that
torch.compile sees shapes without running anything; values are checked here, because a compiled graph has real tensors
here alone. The backend was chosen before and travels by name, so forward and backward always come from the same one.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import transforms
from ..addresses import check_memory
from ..backends.interface import RecurrenceBackend
from ..backends.native.views import on_device_of
from ..backends.torch_common import differentiable
from ..dispatch import choose, torch_form
from ..eager import plain, refuse_tangents, unrecorded
from ..problems.pools import check_indices, check_pool
from ..problems.recurrence import (
    Problem,
    RecurrenceResult,
    Tensors,
    check,
    check_dense,
    check_values,
    describe,
)
from ..problems.states import count_states
from ..rules import RULES, Rule, rule_named

INPUTS = "Tensor? q, Tensor k, Tensor v, Tensor? g, Tensor? beta, "
OPTIONS = "Tensor? cu_seqlens, str rule, str backend, float scale, bool normalize"
_REPLAYED = 7
"""The number of options of `ingest`; `ingest_with_states` has two more."""
REPLAY = ", int passes, float? tol, str method"

_library = torch.library.Library("sleepkern", "DEF")
_library.define(f"ingest({INPUTS}Tensor? state, {OPTIONS}{REPLAY}) -> (Tensor, Tensor, Tensor, Tensor)")
_library.define(
    f"ingest_backward({INPUTS}Tensor? state, {OPTIONS}{REPLAY}, Tensor? do, Tensor? dstate)"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)"
)


def ingest(problem: Problem, engine: RecurrenceBackend, x: Tensors) -> RecurrenceResult:
    """Readouts and final state: straight to the backend where nothing is to be recorded, else by the operator."""
    direct = past_dispatcher(problem, engine, x)
    if direct is not None:
        return direct
    o, state, residual, passes = torch.ops.sleepkern.ingest.default(*x, *options_of(problem, engine))
    if problem.tol is None:
        return RecurrenceResult(o if problem.output else None, state)
    return RecurrenceResult(o if problem.output else None, state, residual, passes)


def past_dispatcher(problem: Problem, engine: RecurrenceBackend, x: Tensors) -> RecurrenceResult | None:
    """The results of a call that torch's dispatcher need not see; None for any other.

    Under transforms that differentiate, `engine` is a torch form, whose own operators are recorded.
    """
    transformed = transforms.active()
    if not (transformed and transforms.reversing()):
        refuse_tangents(*x)
    if transformed and transforms.differentiating():
        return _by_torch(problem, engine, x)
    if unrecorded(*x):
        return checked_forward(problem, engine, x)
    if plain(*x):
        return RecurrenceResult._make(_Recorded.apply(problem, engine, *x))
    return None


def options_of(p: Problem, engine: RecurrenceBackend) -> tuple[Any, ...]:
    """The arguments of the operator `ingest` after the tensors."""
    return row_of(p.rule), engine.NAME, p.scale, p.normalize, p.passes, p.tol, p.method


def row_of(rule: Rule) -> str:
    """The name of the rule in RULES, by which it travels."""
    for name, known in RULES.items():
        if rule == known:
            return name
    raise ValueError(f"rule: got {rule} where a call is recorded; expected one of {', '.join(RULES)}")


row_of._dynamo_marked_constant = True  # type: ignore[attr-defined]  # Dynamo compares objects by identity


def checked_forward(problem: Problem, engine: RecurrenceBackend, x: Tensors) -> RecurrenceResult:
    check_values(problem, x)
    if problem.B == 0:
        return of_no_sequence(problem, x)
    if not x.k.is_cuda:  # entering nothing costs as much as a check
        return engine.forward(problem, x)
    with on_device_of(x.k):
        return engine.forward(problem, x)


def of_no_sequence(problem: Problem, x: Tensors) -> RecurrenceResult:
    heads = (0, problem.HV)
    state = x.k.new_empty((*heads, problem.K, problem.V), dtype=problem.state_dtype)
    o = torch.empty_like(x.v, memory_format=torch.contiguous_format) if problem.output else None
    if problem.state_every is not None:
        size = (0, count_states(problem, x.cu_seqlens), *state.shape[1:])
        return RecurrenceResult(o, state, states=state.new_empty(size))
    if problem.tol is None:
        return RecurrenceResult(o, state)
    return RecurrenceResult(
        o, state, x.k.new_empty(heads, dtype=torch.float32), x.k.new_empty(heads, dtype=torch.int32)
    )


def _by_torch(problem: Problem, engine: RecurrenceBackend, x: Tensors) -> RecurrenceResult:
    if not torch.compiler.is_compiling():
        check_values(problem, x)
    return engine.forward(problem, x)


def wants_grad(x: Tensors) -> bool:
    """Tells whether autograd would record a call with these tensors."""
    if not torch.is_grad_enabled():
        return False
    for t in x:  # a generator takes as long again
        if t is None:
            continue
        if t.requires_grad:
            return True
    return False


def checked(
    x: Tensors,
    rule: str,
    backend: str,
    scale: float,
    normalize: bool,
    passes: int = 1,
    tol: float | None = None,
    method: str = "auto",
    places: Tensor | None = None,
    state_name: str = "initial_state",
    state_every: int | None = None,
) -> tuple[Problem, RecurrenceBackend]:
    """The problem and the backend of an operator's call, which may be anybody's: all that `ops` checks.

    Raises:
        TypeError, ValueError: as `check`; or the backend cannot do the problem.
    """
    shared = x if places is None else x._replace(state=None)
    outputs, known = x.q is not None, rule_named(rule)
    problem = check(known, shared, scale, normalize, passes, tol, method, outputs, state_name, state_every)
    if places is not None:
        problem = check_pool(problem, x.state)
        check_indices(problem, places, (problem.B,))
    with on_device_of(x.k):
        return problem, choose(problem, backend)


class _Recorded(torch.autograd.Function):
    """The operators `ingest` and `ingest_backward` for plain tensors, past torch's dispatcher.

    The dispatcher costs more than the checks and the launches of a call, and nobody but autograd looks at it here.
    """

    @staticmethod
    def forward(
        ctx: Any, problem: Problem, engine: RecurrenceBackend, *tensors: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        p = problem
        ctx.problem, ctx.engine = p, engine
        every = () if p.state_every is None else (p.state_every, 0)
        save(ctx, (*tensors, *options_of(p, engine), *every), None)
        return tuple(checked_forward(p, engine, Tensors._make(tensors)))

    @staticmethod
    def backward(
        ctx: Any, do: Tensor | None, dstate: Tensor | None, residual: Any, passes: Any, dstates: Tensor | None
    ) -> tuple[Any, ...]:
        do = do if ctx.has_output else None
        if torch.is_grad_enabled() or not plain(do, dstate, dstates):
            return (None, None, *differentiate(ctx, do, dstate, dstates)[:7])
        if do is None and dstate is None and dstates is None:
            return (None,) * 9
        x = Tensors._make(ctx.saved_tensors)
        grads = checked_backward(ctx.problem, ctx.engine, x, do, dstate, dstates)
        return (None, None, *(None if t is None else d for t, d in zip(x, grads, strict=False)), None)


def _ingest(
    q: Tensor | None,
    k: Tensor,
    v: Tensor,
    g: Tensor | None,
    beta: Tensor | None,
    state: Tensor | None,
    cu_seqlens: Tensor | None,
    rule: str,
    backend: str,
    scale: float,
    normalize: bool,
    passes: int,
    tol: float | None,
    method: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    x = Tensors(q, k, v, g, beta, state, cu_seqlens)
    problem, engine = checked(x, rule, backend, scale, normalize, passes, tol, method)
    out = checked_forward(problem, engine, x)
    empty = k.new_empty(0)
    residual = k.new_empty(0, dtype=torch.float32) if out.residual is None else out.residual.float()
    made = k.new_empty(0, dtype=torch.int32) if out.passes is None else out.passes
    return empty if out.o is None else out.o, out.state, residual, made


def _ingest_fake(
    q: Tensor | None, k: Tensor, v: Tensor, g: Any, beta: Any, state: Any, cu_seqlens: Tensor | None,
    rule: str, backend: str, scale: float, normalize: bool, passes: int, tol: float | None, method: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    x = Tensors(q, k, v, g, beta, state, cu_seqlens)
    problem = describe(RULES[rule], x, scale, normalize, passes, tol, method)
    heads = (problem.sequences, problem.HV)
    o = k.new_empty(0) if q is None else torch.empty_like(v, memory_format=torch.contiguous_format)
    final = k.new_empty((*heads, problem.K, problem.V), dtype=problem.state_dtype)
    stopped: Any = 0 if tol is None else heads
    return o, final, k.new_empty(stopped, dtype=torch.float32), k.new_empty(stopped, dtype=torch.int32)


def _ingest_backward(
    q: Tensor | None,
    k: Tensor,
    v: Tensor,
    g: Tensor | None,
    beta: Tensor | None,
    state: Tensor | None,
    cu_seqlens: Tensor | None,
    rule: str,
    backend: str,
    scale: float,
    normalize: bool,
    passes: int,
    tol: float | None,
    method: str,
    do: Tensor | None,
    dstate: Tensor | None,
) -> tuple[Tensor, ...]:
    x = Tensors(q, k, v, g, beta, state, cu_seqlens)
    problem, engine = checked(x, rule, backend, scale, normalize, passes, tol, method)
    check_upstream(problem, x, do, dstate)
    grads = checked_backward(problem, engine, x, do, dstate)
    return tuple(k.new_empty(0) if d is None else d for d in grads)


def checked_backward(
    problem: Problem,
    engine: RecurrenceBackend,
    x: Tensors,
    do: Tensor | None,
    dstate: Tensor | None,
    dstates: Tensor | None = None,
) -> list[Tensor | None]:
    """Contiguous gradients of q, k, v, g, beta and the state; None where there is no such tensor."""
    check_values(problem, x)
    if problem.B == 0:
        return [None if t is None else torch.zeros_like(t) for t in x[:6]]
    along = () if problem.state_every is None else (dstates,)
    with on_device_of(x.k):
        grads = engine.backward(problem, x, do, dstate, *along)
    return [None if d is None else d.contiguous() for d in grads]


def check_upstream(problem: Problem, x: Tensors, do: Tensor | None, dstate: Tensor | None) -> None:
    size = (problem.sequences, problem.HV, problem.K, problem.V)
    for name, t, shape, dtype in (("do", do, x.v.shape, x.v.dtype), ("dstate", dstate, size, problem.state_dtype)):
        if t is not None:
            check_dense(name, t)
            check_gradient(name, t, tuple(shape), dtype, x.k.device)
    check_memory(("do", "dstate"), (do, dstate))


def check_gradient(name: str, t: Tensor, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> None:
    """Refuse a gradient from above that does not fit the result that it belongs to.

    Raises:
        ValueError: a wrong shape, type or device.
    """
    if t.shape != shape or t.dtype != dtype or t.device != device:
        raise ValueError(
            f"{name}: got {t.dtype} {list(t.shape)} on {t.device}; expected {dtype} {list(shape)} on {device}"
        )


def ingest_backward_fake(*args: Any) -> tuple[Tensor, ...]:
    k = args[1]
    return tuple(
        k.new_empty(0) if t is None else torch.empty_like(t, memory_format=torch.contiguous_format) for t in args[:6]
    )


def save(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    """Keep what the gradients of the operators `ingest` and `ingest_with_states` need."""
    # A copy of cu_seqlens: by numpy it may change before the backward, and torch would not see it.
    offsets = None if inputs[6] is None else inputs[6].clone()
    ctx.save_for_backward(*inputs[:6], offsets)
    ctx.options = inputs[7:]
    ctx.set_materialize_grads(False)
    ctx.has_output = inputs[0] is not None


def differentiate(ctx: Any, do: Tensor | None, dstate: Tensor | None, dstates: Tensor | None = None) -> tuple[Any, ...]:
    """The gradients of what `save` kept, None for the options."""
    tensors, do = ctx.saved_tensors, do if ctx.has_output else None
    nothing = (None,) * (7 + len(ctx.options))
    if do is None and dstate is None and dstates is None:
        return nothing
    if torch.is_grad_enabled():
        grads = _differentiable(ctx, Tensors(*tensors), do, dstate, dstates)
        return (*grads, None, *(None for _ in ctx.options))
    if len(ctx.options) == _REPLAYED:
        grads = torch.ops.sleepkern.ingest_backward.default(*tensors, *ctx.options, do, dstate)
    else:
        options, every = ctx.options[:_REPLAYED], ctx.options[_REPLAYED]
        operator = torch.ops.sleepkern.ingest_with_states_backward.default
        grads = operator(*tensors, *options, every, do, dstate, dstates)
    wanted = [d if t is not None else None for t, d in zip(tensors, grads, strict=False)]
    return (*wanted, None, *(None for _ in ctx.options))


def _differentiate(ctx: Any, do: Tensor | None, dstate: Tensor | None, *unused: Any) -> tuple[Any, ...]:
    return differentiate(ctx, do, dstate)


def _differentiable(
    ctx: Any, x: Tensors, do: Tensor | None, dstate: Tensor | None, dstates: Tensor | None
) -> list[Tensor | None]:
    """Gradients of q, k, v, g, beta, state for create_graph=True: by torch's own operators, so that they have some."""
    rule, _, scale, normalize, passes, tol, method, *along = ctx.options
    problem = describe(RULES[rule], x, scale, normalize, passes, tol, method, along[0] if along else None)
    engine = torch_form(problem)

    def by_torch(*inputs: Tensor | None) -> list[Tensor | None]:
        out = engine.forward(problem, Tensors._make([*inputs, x.cu_seqlens]))
        return [out.o, out.state, out.states]

    return differentiable(by_torch, x[:6], [do, dstate, dstates])


for _key in ("CPU", "CUDA"):
    _library.impl("ingest", _ingest, _key)
    _library.impl("ingest_backward", _ingest_backward, _key)
torch.library.register_fake("sleepkern::ingest", _ingest_fake, lib=_library)
torch.library.register_fake("sleepkern::ingest_backward", ingest_backward_fake, lib=_library)
torch.library.register_autograd("sleepkern::ingest", _differentiate, setup_context=save, lib=_library)
