"""Decode of packed sequences, and decode that stores the state after each token instead of an update."""

from __future__ import annotations

import torch
from torch import Tensor

from ..addresses import check_memory
from ..autograd import gated, steps
from ..backends.torch_common import read_rows, write_rows
from ..eager import untraced
from ..problems.gates import RawGates
from ..problems.pools import check_indices, check_pool, check_rows
from ..problems.recurrence import Problem, Tensors, check, check_dense, check_flag, wrong_shape, wrong_type
from ..rules import Rule
from .call import apply, cast, gradients_wanted
from .known_calls import engine_for

MOST_TOKENS = 16
"""The number of tokens that a call may store states after."""


def special_step(
    rule: Rule,
    x: Tensors,
    indices: Tensor | None,
    inplace: bool,
    scale: float | None,
    normalize: bool,
    backend: str | None,
    gates: RawGates | None,
    states_out: Tensor | None,
    out_indices: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """The results of `recurrent_step` with cu_seqlens, states_out or states_out_indices."""
    check_flag("inplace", inplace)
    x = cast(x)
    if states_out is None:
        if out_indices is not None:
            raise ValueError("states_out: got None; expected the pool that states_out_indices name rows of")
        return _packed_step(rule, x, indices, inplace, scale, normalize, backend, gates)
    if x.cu_seqlens is not None:
        raise ValueError("states_out: got it with cu_seqlens; expected one of the two")
    problem = check(rule, x._replace(state=None), scale, normalize)
    problem = _check_states(problem, x, indices, states_out, out_indices)
    if gradients_wanted(x, gates, states_out):
        raise ValueError("states_out: got it where gradients are wanted; expected a call under torch.no_grad()")
    if gates is not None:
        x = gated.made(problem, x, gates)
    engine = engine_for(problem, x, backend)
    return steps.step_states(problem, engine, x, indices, states_out, out_indices), states_out


def initial_states(problem: Problem, pool: Tensor, indices: Tensor) -> Tensor:
    """Copies of the rows of a pool, in the type of computation; 0 for a negative index."""
    state = read_rows(pool, indices).to(problem.state_dtype)
    return torch.where((indices >= 0)[:, None, None, None], state, 0)


def _check_states(
    problem: Problem, x: Tensors, indices: Tensor | None, states_out: Tensor, out_indices: Tensor | None
) -> Problem:
    """Check the states that are read and written; the problem with their type."""
    problem = check_pool(problem, x.state)
    assert x.state is not None
    heads, pools, names = tuple(x.state.shape[1:]), [x.state, states_out], ["state", "states_out"]
    if problem.T > MOST_TOKENS:
        raise ValueError(f"states_out: got T = {problem.T} tokens; expected at most {MOST_TOKENS}")
    if indices is not None:
        check_indices(problem, indices, (problem.B,))
    elif x.state.shape[0] != problem.B:
        raise wrong_shape("state", x.state, (problem.B, *heads))
    check_dense("states_out", states_out)
    if states_out.dtype != x.state.dtype:
        raise wrong_type("states_out", states_out, f"{x.state.dtype}, the type of state")
    if states_out.device != x.state.device:
        raise ValueError(f"states_out: got device {states_out.device}; expected {x.state.device}, where state is")
    if out_indices is not None:
        check_indices(problem, out_indices, (problem.B, problem.T), "states_out_indices")
    shape = (problem.B, problem.T, *heads) if out_indices is None else (*states_out.shape[:1], *heads)
    if states_out.shape != shape:
        raise wrong_shape("states_out", states_out, shape)
    if untraced(*pools, indices, out_indices):
        check_memory((*names, "state_indices", "states_out_indices"), (*pools, indices, out_indices))
    return problem


def _packed_step(
    rule: Rule,
    x: Tensors,
    indices: Tensor | None,
    inplace: bool,
    scale: float | None,
    normalize: bool,
    backend: str | None,
    gates: RawGates | None,
) -> tuple[Tensor, Tensor]:
    """recurrent_step on sequences of different lengths in one row."""
    pool = check_dense("state", x.state)
    problem = check_pool(check(rule, x._replace(state=None), scale, normalize), pool)
    if indices is not None:
        check_indices(problem, indices, (problem.sequences,))
        if gradients_wanted(x, gates):
            raise ValueError("state: got a pool where gradients are wanted; expected a call under torch.no_grad()")
        if untraced(pool, indices):
            check_memory(("state", "state_indices"), (pool, indices))
            check_rows(pool.shape[0], indices)
    elif pool.shape[0] != problem.sequences:
        raise wrong_shape("state", pool, (problem.sequences, *pool.shape[1:]))
    if inplace:
        steps.check_update(x, indices)
    state = pool.to(problem.state_dtype, copy=True) if indices is None else initial_states(problem, pool, indices)
    out = apply(rule, x._replace(state=state), scale, normalize, backend, gates=gates)[2]
    assert out.o is not None
    if indices is None:
        return out.o, pool.copy_(out.state) if inplace else out.state.to(pool.dtype)
    pool = pool if inplace else pool.clone()
    write_rows(pool, out.state, indices)
    return _without_padding(out.o, x, indices), pool


def _without_padding(o: Tensor, x: Tensors, indices: Tensor) -> Tensor:
    """Outputs that are 0 for the sequences with a negative index."""
    assert x.cu_seqlens is not None
    lengths = x.cu_seqlens.to(o.device).long().diff()
    present = torch.repeat_interleave(indices >= 0, lengths, output_size=o.shape[1])
    return torch.where(present[None, :, None, None], o, 0)
