"""Step 4 of a call, RECORD: the operators as torch knows them, one path for all rules and backends.

    sleepkern::ingest           forward of every rule, any number of passes
    sleepkern::ingest_backward  its gradients
    sleepkern::step             a few tokens, state updated in place

Each has a fake kernel, so that torch.compile sees shapes without running anything; values are checked here, where
real tensors are at hand even in a compiled graph. The backend was chosen before and travels by name, so forward and
backward always come from the same one.
"""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from .backends import chunked, reference
from .backends.tensors import Ingested, differentiable, on_device_of, refuse_tangents, step_in_pool
from .dispatch import backend_named
from .problem import Problem, Tensors, check_places, check_values, describe
from .rules import RULES

_INPUTS = "Tensor? q, Tensor k, Tensor v, Tensor? g, Tensor? beta, "
_OPTIONS = "Tensor? cu_seqlens, str rule, str backend, float scale, bool normalize"
_REPLAY = ", int passes, float? tol, str method"

_library = torch.library.Library("sleepkern", "DEF")
_library.define(f"ingest({_INPUTS}Tensor? state, {_OPTIONS}{_REPLAY}) -> (Tensor, Tensor, Tensor, Tensor)")
_library.define(
    f"ingest_backward({_INPUTS}Tensor? state, {_OPTIONS}{_REPLAY}, Tensor? do, Tensor? dstate)"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)"
)
_library.define(f"step({_INPUTS}Tensor(a!) state, {_OPTIONS}, Tensor? places=None) -> Tensor")


def ingest(problem: Problem, engine: ModuleType, x: Tensors) -> Ingested:
    """Readouts and final state: straight to the backend where nothing is to be recorded, else by the operator."""
    refuse_tangents(*x)
    if unrecorded(x):
        check_values(problem, x)
        with on_device_of(x.k):
            out: Ingested = engine.forward(problem, x)
        return out
    o, state, residual, passes = torch.ops.sleepkern.ingest.default(
        *x,
        problem.rule.name,
        engine.NAME,
        problem.scale,
        problem.normalize,
        problem.passes,
        problem.tol,
        problem.method,
    )
    if problem.tol is None:
        return Ingested(o if problem.output else None, state)
    return Ingested(o if problem.output else None, state, residual, passes)


def step(problem: Problem, engine: ModuleType, x: Tensors, places: Tensor | None = None) -> Tensor:
    """Readouts [B,T,HV,V]; x.state is updated in place, with places [B] where they say that the states of a pool lie.

    Not differentiable: callers take `ingest` then.
    """
    refuse_tangents(*x)
    if unrecorded(x):
        return _checked_step(problem, engine, x, places)
    return torch.ops.sleepkern.step.default(  # type: ignore[no-any-return]
        *x, problem.rule.name, engine.NAME, problem.scale, problem.normalize, places
    )


def _checked_step(problem: Problem, engine: ModuleType, x: Tensors, places: Tensor | None) -> Tensor:
    check_values(problem, x)
    with on_device_of(x.k):
        if places is None:
            o: Tensor = engine.step(problem, x)
            return o
        assert x.state is not None
        check_places(x.state, places)
        own: Callable[[Problem, Tensors, Tensor], Tensor] | None = getattr(engine, "step_in_pool", None)
        return step_in_pool(problem, x, places, engine.step) if own is None else own(problem, x, places)


def wants_grad(x: Tensors) -> bool:
    """Whether autograd would record a call with these tensors."""
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in x)


def unrecorded(x: Tensors) -> bool:
    """Nobody looks at the operator: no graph capture, mode, subclass, transform or gradient.

    Passing torch's dispatcher by way of Python costs more than the rest of a call.
    """
    return (
        not torch.compiler.is_compiling()
        and type(x.k) is Tensor
        and torch._C._len_torch_dispatch_stack() == 0
        and torch._C._functorch.peek_interpreter_stack() is None
        and not wants_grad(x)
    )


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
    problem = describe(RULES[rule], x, scale, normalize, passes, tol, method)
    check_values(problem, x)
    with on_device_of(k):
        out = backend_named(backend).forward(problem, x)
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
    problem = describe(RULES[rule], x, scale, normalize, passes, tol, method)
    with on_device_of(k):
        grads = backend_named(backend).backward(problem, x, do, dstate)
    return tuple(k.new_empty(0) if d is None else d.contiguous() for d in grads)


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
    problem = describe(RULES[rule], x, scale, normalize)
    return _checked_step(problem, backend_named(backend), x, places)


def _step_fake(q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> Tensor:
    return torch.empty_like(v, memory_format=torch.contiguous_format)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    ctx.save_for_backward(*inputs[:7])
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
    engine = next(backend for backend in (chunked, reference) if backend.why_not(problem) is None)

    def by_torch(*inputs: Tensor | None) -> list[Tensor | None]:
        out = engine.forward(problem, Tensors._make([*inputs, x.cu_seqlens]))
        return [out.o, out.state]

    return differentiable(by_torch, x[:6], [do, dstate])


for _key in ("CPU", "CUDA"):
    _library.impl("ingest", _ingest, _key)
    _library.impl("ingest_backward", _ingest_backward, _key)
    _library.impl("step", _step, _key)
torch.library.register_fake("sleepkern::ingest", _ingest_fake, lib=_library)
torch.library.register_fake("sleepkern::ingest_backward", _ingest_backward_fake, lib=_library)
torch.library.register_fake("sleepkern::step", _step_fake, lib=_library)
torch.library.register_autograd("sleepkern::ingest", _differentiate, setup_context=_save, lib=_library)
