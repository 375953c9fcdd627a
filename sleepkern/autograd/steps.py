"""Step 4 of a decode, RECORD: its operators as torch knows them. None is differentiable: callers take `ingest` then.

sleepkern::step         a few tokens, state updated in place
sleepkern::step_states  a few tokens, state read, and the state after each token stored
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from ..addresses import check_written, mark_written
from ..backends.interface import RecurrenceBackend, StepsInPool, StepsInStates
from ..backends.native.views import on_device_of
from ..backends.torch_common import states_by_steps, step_in_pool
from ..eager import refuse_tangents, unrecorded, untraced
from ..problems.pools import check_indices, check_rows, check_states_out
from ..problems.recurrence import Problem, Tensors, check_values
from .recurrence import INPUTS, OPTIONS, checked, row_of

_READ = ("q", "k", "v", "g", "beta", "state_indices")

_library = torch.library.Library("sleepkern", "FRAGMENT")
_library.define(f"step({INPUTS}Tensor(a!) state, {OPTIONS}, Tensor? places=None) -> Tensor")
_library.define(
    f"step_states({INPUTS}Tensor state, {OPTIONS}, Tensor? indices, Tensor(a!) states_out, Tensor? out_indices)"
    " -> Tensor"
)


def step(problem: Problem, engine: RecurrenceBackend, x: Tensors, places: Tensor | None = None) -> Tensor:
    """Readouts [B,T,HV,V]; x.state is updated in place, with places [B] where they say that the states of a pool lie.

    Not differentiable: callers take `ingest` then.
    """
    refuse_tangents(*x)
    if unrecorded(*x, places):
        return _checked_step(problem, engine, x, places)
    return torch.ops.sleepkern.step.default(  # type: ignore[no-any-return]
        *x, row_of(problem.rule), engine.NAME, problem.scale, problem.normalize, places
    )


def check_update(x: Tensors, places: Tensor | None = None) -> None:
    """Refuse a state that cannot be updated in place, where it is no one else's to say so.

    Raises:
        ValueError: it overlaps itself or another tensor of the call, or was made in inference mode.
    """
    if untraced(*x, places) and x.state is not None and not x.state.is_meta:
        check_written("state", x.state, (*_READ, "cu_seqlens"), (*x[:5], places, x.cu_seqlens))


def _checked_step(problem: Problem, engine: RecurrenceBackend, x: Tensors, places: Tensor | None) -> Tensor:
    check_values(problem, x, "state")
    assert x.state is not None
    if not x.state.is_meta:
        check_written("state", x.state, _READ, (*x[:5], places))
    if places is not None:
        check_rows(x.state.shape[0], places)
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


def step_states(
    problem: Problem,
    engine: RecurrenceBackend,
    x: Tensors,
    indices: Tensor | None,
    states_out: Tensor,
    out_indices: Tensor | None,
) -> Tensor:
    """Outputs [B,T,HV,V]; x.state is read, and the state after each token is written to states_out."""
    refuse_tangents(*x)
    if unrecorded(*x, indices, states_out, out_indices):
        return _checked_step_states(problem, engine, x, indices, states_out, out_indices)
    return torch.ops.sleepkern.step_states.default(  # type: ignore[no-any-return]
        *x, row_of(problem.rule), engine.NAME, problem.scale, problem.normalize, indices, states_out, out_indices
    )


def _checked_step_states(
    problem: Problem,
    engine: RecurrenceBackend,
    x: Tensors,
    indices: Tensor | None,
    states_out: Tensor,
    out_indices: Tensor | None,
) -> Tensor:
    check_values(problem, x, "state")
    assert x.state is not None
    if not states_out.is_meta:
        check_states_out(x.state, indices, states_out, out_indices)
        names = (*_READ, "states_out_indices", "state")
        pool = None if out_indices is not None and same_memory(x.state, states_out) else x.state
        check_written("states_out", states_out, names, (*x[:5], indices, out_indices, pool))
    if problem.B == 0 or problem.T == 0:
        return torch.empty_like(x.v, memory_format=torch.contiguous_format)
    mark_written(states_out)
    with on_device_of(x.k):
        native = _states_stepper(engine)  # type: ignore[arg-type]  # as _pool_stepper
        if native is None:
            return states_by_steps(problem, x, indices, states_out, out_indices, engine.step)
        return native.step_states(problem, x, indices, states_out, out_indices)


def same_memory(a: Tensor, b: Tensor) -> bool:
    """Tells whether two tensors are the same numbers by the same sizes, strides and type."""
    return a.data_ptr() == b.data_ptr() and a.shape == b.shape and a.stride() == b.stride() and a.dtype == b.dtype


@lru_cache(16)
def _states_stepper(engine: RecurrenceBackend) -> StepsInStates | None:
    """The backend if it stores the states after each token by itself."""
    return engine if isinstance(engine, StepsInStates) else None


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
    problem, engine = checked(x, *options, places=places, state_name="state")
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


def _step_states(
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
    indices: Tensor | None,
    states_out: Tensor,
    out_indices: Tensor | None,
) -> Tensor:
    x = Tensors(q, k, v, g, beta, state, cu_seqlens)
    problem, engine = checked(x, rule, backend, scale, normalize, places=indices, state_name="state")
    if out_indices is not None:
        check_indices(problem, out_indices, (problem.B, problem.T), "states_out_indices")
    return _checked_step_states(problem, engine, x, indices, states_out, out_indices)


for _key in ("CPU", "CUDA"):
    _library.impl("step", _step, _key)
    _library.impl("step_states", _step_states, _key)
_library.impl("step", _step_of_negative, "Negative")
torch.library.register_fake("sleepkern::step", _step_fake, lib=_library)
torch.library.register_fake("sleepkern::step_states", _step_fake, lib=_library)
