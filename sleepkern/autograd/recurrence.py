"""Step 4 of a call, RECORD: the operators as torch knows them, one path for all rules and backends.

    sleepkern::ingest           forward of every rule, any number of passes
    sleepkern::ingest_backward  its gradients
    sleepkern::step             a few tokens, state updated in place

Each has a fake kernel, so that torch.compile sees shapes without running anything; values are checked here, where
real tensors are at hand even in a compiled graph. The backend was chosen before and travels by name, so forward and
backward always come from the same one.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from .. import transforms
from ..addresses import check_memory, check_written, mark_written
from ..backends.interface import RecurrenceBackend, StepsInPool
from ..backends.native.views import on_device_of
from ..backends.torch_common import differentiable, step_in_pool
from ..dispatch import choose, torch_form
from ..eager import plain, refuse_tangents, unrecorded, untraced
from ..problems.recurrence import (
    Problem,
    RecurrenceResult,
    Tensors,
    check,
    check_dense,
    check_places,
    check_pool,
    check_values,
    describe,
)
from ..rules import RULES, Rule, rule_named

_INPUTS = "Tensor? q, Tensor k, Tensor v, Tensor? g, Tensor? beta, "
_OPTIONS = "Tensor? cu_seqlens, str rule, str backend, float scale, bool normalize"
_READ = ("q", "k", "v", "g", "beta", "state_indices")
_REPLAY = ", int passes, float? tol, str method"

_library = torch.library.Library("sleepkern", "DEF")
_library.define(f"ingest({_INPUTS}Tensor? state, {_OPTIONS}{_REPLAY}) -> (Tensor, Tensor, Tensor, Tensor)")
_library.define(
    f"ingest_backward({_INPUTS}Tensor? state, {_OPTIONS}{_REPLAY}, Tensor? do, Tensor? dstate)"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)"
)
_library.define(f"step({_INPUTS}Tensor(a!) state, {_OPTIONS}, Tensor? places=None) -> Tensor")


def ingest(problem: Problem, engine: RecurrenceBackend, x: Tensors) -> RecurrenceResult:
    """Readouts and final state: straight to the backend where nothing is to be recorded, else by the operator.

    Under transforms that differentiate, `engine` is a torch form, whose own operators are recorded.
    """
    transformed = transforms.active()
    if not (transformed and transforms.reversing()):
        refuse_tangents(*x)
    if transformed and transforms.differentiating():
        return _by_torch(problem, engine, x)
    if unrecorded(*x):
        return _checked_forward(problem, engine, x)
    if plain(*x):
        return RecurrenceResult._make(_Recorded.apply(problem, engine, *x))
    o, state, residual, passes = torch.ops.sleepkern.ingest.default(*x, *_options(problem, engine))
    if problem.tol is None:
        return RecurrenceResult(o if problem.output else None, state)
    return RecurrenceResult(o if problem.output else None, state, residual, passes)


def step(problem: Problem, engine: RecurrenceBackend, x: Tensors, places: Tensor | None = None) -> Tensor:
    """Readouts [B,T,HV,V]; x.state is updated in place, with places [B] where they say that the states of a pool lie.

    Not differentiable: callers take `ingest` then.
    """
    refuse_tangents(*x)
    if unrecorded(*x, places):
        return _checked_step(problem, engine, x, places)
    return torch.ops.sleepkern.step.default(  # type: ignore[no-any-return]
        *x, _row(problem.rule), engine.NAME, problem.scale, problem.normalize, places
    )


def _options(p: Problem, engine: RecurrenceBackend) -> tuple[Any, ...]:
    """The arguments of the operator `ingest` after the tensors."""
    return _row(p.rule), engine.NAME, p.scale, p.normalize, p.passes, p.tol, p.method


def check_update(x: Tensors, places: Tensor | None = None) -> None:
    """Refuse a state that cannot be updated in place, where it is no one else's to say so.

    Raises:
        ValueError: it overlaps itself or another tensor of the call, or was made in inference mode.
    """
    if untraced(*x, places) and x.state is not None and not x.state.is_meta:
        check_written("state", x.state, _READ, (*x[:5], places))


def _row(rule: Rule) -> str:
    """The name of the rule in RULES, by which it travels."""
    for name, known in RULES.items():
        if rule == known:
            return name
    raise ValueError(f"rule: got {rule} where a call is recorded; expected one of {', '.join(RULES)}")


_row._dynamo_marked_constant = True  # type: ignore[attr-defined]  # Dynamo compares objects by identity


def _checked_forward(problem: Problem, engine: RecurrenceBackend, x: Tensors) -> RecurrenceResult:
    check_values(problem, x)
    if problem.B == 0:
        return _of_no_sequence(problem, x)
    if not x.k.is_cuda:  # entering nothing costs as much as a check
        return engine.forward(problem, x)
    with on_device_of(x.k):
        return engine.forward(problem, x)


def _of_no_sequence(problem: Problem, x: Tensors) -> RecurrenceResult:
    heads = (0, problem.HV)
    state = x.k.new_empty((*heads, problem.K, problem.V), dtype=problem.state_dtype)
    o = torch.empty_like(x.v, memory_format=torch.contiguous_format) if problem.output else None
    if problem.tol is None:
        return RecurrenceResult(o, state)
    return RecurrenceResult(
        o, state, x.k.new_empty(heads, dtype=torch.float32), x.k.new_empty(heads, dtype=torch.int32)
    )


def _checked_step(problem: Problem, engine: RecurrenceBackend, x: Tensors, places: Tensor | None) -> Tensor:
    check_values(problem, x, "state")
    assert x.state is not None
    if not x.state.is_meta:
        check_written("state", x.state, _READ, (*x[:5], places))
    if places is not None:
        check_places(x.state, places)
    if problem.B == 0:
        return torch.empty_like(x.v, memory_format=torch.contiguous_format)
    mark_written(x.state)
    if places is None and not x.k.is_cuda:
        return engine.step(problem, x)
    with on_device_of(x.k):
        if places is None:
            return engine.step(problem, x)
        own = _pool_stepper(engine)  # type: ignore[arg-type]  # a module is hashable; the protocol does not say so
        return step_in_pool(problem, x, places, engine.step) if own is None else own.step_in_pool(problem, x, places)


@lru_cache(16)
def _pool_stepper(engine: RecurrenceBackend) -> StepsInPool | None:
    """The backend if it steps in a pool by itself; kept, because to compare with a protocol takes microseconds."""
    return engine if isinstance(engine, StepsInPool) else None


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


def _checked(
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
) -> tuple[Problem, RecurrenceBackend]:
    """The problem and the backend of an operator's call, which may be anybody's: all that `ops` checks.

    Raises:
        TypeError, ValueError: as `check`; or the backend cannot do the problem.
    """
    shared = x if places is None else x._replace(state=None)
    problem = check(rule_named(rule), shared, scale, normalize, passes, tol, method, x.q is not None, state_name)
    if places is not None:
        check_pool(problem, x.state, places)
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
        _save(ctx, (*tensors, *_options(p, engine)), None)
        return tuple(_checked_forward(p, engine, Tensors._make(tensors)))

    @staticmethod
    def backward(ctx: Any, do: Tensor | None, dstate: Tensor | None, *unused: Any) -> tuple[Any, ...]:
        do = do if ctx.has_output else None
        if torch.is_grad_enabled() or not plain(do, dstate):
            return (None, None, *_differentiate(ctx, do, dstate)[:7])
        if do is None and dstate is None:
            return (None,) * 9
        x = Tensors._make(ctx.saved_tensors)
        grads = _checked_backward(ctx.problem, ctx.engine, x, do, dstate)
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
    problem, engine = _checked(x, rule, backend, scale, normalize, passes, tol, method)
    out = _checked_forward(problem, engine, x)
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
    problem, engine = _checked(x, rule, backend, scale, normalize, passes, tol, method)
    _check_upstream(problem, x, do, dstate)
    grads = _checked_backward(problem, engine, x, do, dstate)
    return tuple(k.new_empty(0) if d is None else d for d in grads)


def _checked_backward(
    problem: Problem, engine: RecurrenceBackend, x: Tensors, do: Tensor | None, dstate: Tensor | None
) -> list[Tensor | None]:
    """Contiguous gradients of q, k, v, g, beta and the state; None where there is no such tensor."""
    check_values(problem, x)
    if problem.B == 0:
        return [None if t is None else torch.zeros_like(t) for t in x[:6]]
    with on_device_of(x.k):
        grads = engine.backward(problem, x, do, dstate)
    return [None if d is None else d.contiguous() for d in grads]


def _check_upstream(problem: Problem, x: Tensors, do: Tensor | None, dstate: Tensor | None) -> None:
    size = (problem.sequences, problem.HV, problem.K, problem.V)
    for name, t, shape, dtype in (("do", do, x.v.shape, x.v.dtype), ("dstate", dstate, size, problem.state_dtype)):
        if t is None:
            continue
        check_dense(name, t)
        if t.shape != shape or t.dtype != dtype or t.device != x.k.device:
            raise ValueError(
                f"{name}: got {t.dtype} {list(t.shape)} on {t.device}; expected {dtype} {list(shape)} on {x.k.device}"
            )
    check_memory(("do", "dstate"), (do, dstate))


def _ingest_backward_fake(*args: Any) -> tuple[Tensor, ...]:
    k = args[1]
    return tuple(
        k.new_empty(0) if t is None else torch.empty_like(t, memory_format=torch.contiguous_format) for t in args[:6]
    )


def _step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None,
    beta: Tensor | None,
    state: Tensor,
    cu_seqlens: Tensor | None,
    rule: str,
    backend: str,
    scale: float,
    normalize: bool,
    places: Tensor | None = None,
) -> Tensor:
    x = Tensors(q, k, v, g, beta, state, cu_seqlens)
    options = (rule, backend, scale, normalize)
    problem, engine = _checked(x, *options, places=places, state_name="state")
    return _checked_step(problem, engine, x, places)


def _step_of_negative(q: Tensor, k: Tensor, v: Tensor, g: Any, beta: Any, state: Tensor, *rest: Any) -> Tensor:
    """The kernel for tensors with torch's negative bit, which says that memory holds the opposites of the values."""
    read = [t.resolve_neg() if isinstance(t, Tensor) else t for t in (q, k, v, g, beta, state, *rest)]
    o: Tensor = torch.ops.sleepkern.step.default(*read)
    if read[5] is not state:
        state.copy_(read[5])
    return o


def _step_fake(q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> Tensor:
    return torch.empty_like(v, memory_format=torch.contiguous_format)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    # A copy of cu_seqlens: by numpy it may change before the backward, and torch would not see it.
    offsets = None if inputs[6] is None else inputs[6].clone()
    ctx.save_for_backward(*inputs[:6], offsets)
    ctx.options = inputs[7:]
    ctx.set_materialize_grads(False)
    ctx.has_output = inputs[0] is not None


def _differentiate(ctx: Any, do: Tensor | None, dstate: Tensor | None, *unused: Any) -> tuple[Any, ...]:
    tensors = ctx.saved_tensors
    nothing = (None,) * (7 + len(ctx.options))
    if (do is None or not ctx.has_output) and dstate is None:
        return nothing
    if torch.is_grad_enabled():
        grads = _differentiable(ctx, Tensors(*tensors), do, dstate)
        return (*grads, None, *(None for _ in ctx.options))
    grads = torch.ops.sleepkern.ingest_backward.default(*tensors, *ctx.options, do if ctx.has_output else None, dstate)
    wanted = [d if t is not None else None for t, d in zip(tensors, grads, strict=False)]
    return (*wanted, None, *(None for _ in ctx.options))


def _differentiable(ctx: Any, x: Tensors, do: Tensor | None, dstate: Tensor | None) -> list[Tensor | None]:
    """Gradients of q, k, v, g, beta, state for create_graph=True: by torch's own operators, so that they have some."""
    rule, _, scale, normalize, passes, tol, method = ctx.options
    problem = describe(RULES[rule], x, scale, normalize, passes, tol, method)
    engine = torch_form(problem)

    def by_torch(*inputs: Tensor | None) -> list[Tensor | None]:
        out = engine.forward(problem, Tensors._make([*inputs, x.cu_seqlens]))
        return [out.o, out.state]

    return differentiable(by_torch, x[:6], [do, dstate])


for _key in ("CPU", "CUDA"):
    _library.impl("ingest", _ingest, _key)
    _library.impl("ingest_backward", _ingest_backward, _key)
    _library.impl("step", _step, _key)
_library.impl("step", _step_of_negative, "Negative")
torch.library.register_fake("sleepkern::ingest", _ingest_fake, lib=_library)
torch.library.register_fake("sleepkern::ingest_backward", _ingest_backward_fake, lib=_library)
torch.library.register_fake("sleepkern::step", _step_fake, lib=_library)
torch.library.register_autograd("sleepkern::ingest", _differentiate, setup_context=_save, lib=_library)
