"""Decode on states where they are: rows of a pool, of float32 or bfloat16, updated in place or stored per token."""

from __future__ import annotations

import torch
from torch import Tensor

from ...problems.gates import RawGates
from ...problems.recurrence import Problem, Tensors
from ..native.module import _C, TYPE_CODES
from .fields import fields_of, gate_fields_of

_States = tuple[int, int, int, int, int]
"""Address, distances of two rows and of two heads in elements, number of rows, address of the entries' rows or 0."""
_NONE: _States = (0, 0, 0, 0, 0)
_FINISHED = RawGates(None, None, None, False, 0.0)


def has_matrices(states: Tensor) -> bool:
    """Tell whether each state [K,V] is contiguous, and those after the tokens of a batch are rows of one tensor."""
    K, V = states.shape[-2:]
    step = states.stride()
    if (V != 1 and step[-1] != 1) or (K != 1 and step[-2] != V):
        return False
    return states.dim() == 4 or states.shape[0] <= 1 or (step[1] > 0 and step[0] % step[1] == 0)


def run(
    problem: Problem,
    x: Tensors,
    indices: Tensor | None = None,
    states_out: Tensor | None = None,
    out_indices: Tensor | None = None,
    gates: RawGates | None = None,
) -> Tensor:
    """Compute the outputs [B,T,HV,V]; x.state is updated, or read where states_out takes the states after each token.

    Arguments are those of `step_states`. A row with a negative index has outputs of 0 and writes nothing.
    """
    assert x.state is not None
    o = torch.empty_like(x.v, memory_format=torch.contiguous_format)
    fields, _alive = fields_of(problem, x, None, True)
    more, _alive_too = gate_fields_of(gates or _FINISHED)
    given = {name: value for name, value in fields.items() if name != "state"}
    states, _rows = _table(x.state, indices)
    out, _out_rows = (_NONE, None) if states_out is None else _table(*_per_token(states_out, out_indices))
    _C.decode(
        **given,  # type: ignore[arg-type]  # all fields but one
        **more,
        o=o.data_ptr(),
        state_type=TYPE_CODES[x.state.dtype],
        states=states,
        each_token=states_out is not None,
        states_out=out,
    )
    return o


def _per_token(states: Tensor, indices: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """The states after each token of a batch [B,T,HV,K,V] as rows, and the row of each token; a pool as it is."""
    if indices is not None:
        return states, indices
    B, T = states.shape[:2]
    if B == 1 or T == 0:
        return states.flatten(0, 1) if T == 0 else states[0], None
    apart = states.stride(0) // states.stride(1)
    rows = states.as_strided(((B - 1) * apart + T, *states.shape[2:]), states.stride()[1:])
    row, token = (torch.arange(n, dtype=torch.int64, device="cpu") for n in (B, T))
    return rows, row[:, None] * apart + token


def _table(states: Tensor, indices: Tensor | None) -> tuple[_States, Tensor | None]:
    """Rows of states as _C takes them, and the indices that must live while it reads them."""
    if indices is None:
        return (states.data_ptr(), states.stride(0), states.stride(1), states.shape[0], 0), None
    indices = indices.to(torch.int64).contiguous()
    return (states.data_ptr(), states.stride(0), states.stride(1), states.shape[0], indices.data_ptr()), indices
