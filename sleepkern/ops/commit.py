"""Step 1 of a call, PUBLIC: which of the states after each token of a draft a pool keeps."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import settings
from ..addresses import check_memory, check_written
from ..backends.torch_common import read_rows, write_rows
from ..eager import untraced
from ..problems.pools import check_rows
from ..problems.recurrence import check_dense, wrong_shape, wrong_type


def commit(pool: Tensor, slots: Tensor, accepted: Tensor, state_indices: Tensor) -> Tensor:
    """Keep the state after the accepted tokens of a draft: row state_indices[b] becomes row slots[b, accepted[b] - 1].

    A call with `states_out=pool` and `states_out_indices=slots` has stored the state after each token of the draft.

    Args:
        pool: [rows,...] states of any type and shape, of a recurrence or a short convolution; updated in place.
        slots: [B,T] int32 or int64, the rows that have the states after each token.
        accepted: [B] int32 or int64, the number of tokens, from 0 to T, that each sequence keeps; 0 leaves its row.
        state_indices: [B] int32 or int64, the rows that sequences go on from, each at most once; negative: none.

    Returns:
        The pool.

    Raises:
        TypeError: an argument that is no tensor, or of another type.
        ValueError: a shape or device that does not fit; and on the CPU, or on a GPU with SLEEPKERN_DEBUG=1, a row
            beyond the pool, one that is written twice, an accepted slot that is negative, or accepted beyond 0 to T.
            The pool is then as it was.
    """
    _check(pool, slots, accepted, state_indices)
    if not slots.shape[0] or not slots.shape[1]:
        return pool
    slot = slots.gather(1, (accepted.long() - 1).clamp_min(0)[:, None])[:, 0]
    values = read_rows(pool, slot)
    write_rows(pool, values, torch.where(accepted > 0, state_indices, -1))
    return pool


def _check(pool: Tensor, slots: Tensor, accepted: Tensor, state_indices: Tensor) -> None:
    names, indices = ("slots", "accepted", "state_indices"), (slots, accepted, state_indices)
    check_dense("pool", pool)
    if pool.dim() < 2:
        raise ValueError(f"pool: got shape {list(pool.shape)}; expected [rows,...] of states")
    for name, t in zip(names, indices, strict=True):
        check_dense(name, t)
        if t.dtype not in (torch.int32, torch.int64):
            raise wrong_type(name, t, "torch.int32 or torch.int64")
        if t.device != pool.device:
            raise ValueError(f"{name}: got device {t.device}; expected {pool.device}, where the pool is")
    if slots.dim() != 2:
        raise ValueError(f"slots: got shape {list(slots.shape)}; expected [B,T]")
    for name, t in zip(names[1:], indices[1:], strict=True):
        if t.shape != slots.shape[:1]:
            raise wrong_shape(name, t, tuple(slots.shape[:1]))
    if untraced(pool, *indices) and not pool.is_meta:
        check_memory(("pool", *names), (pool, *indices))
        check_written("pool", pool, names, indices)
        _check_values(pool.shape[0], slots, accepted, state_indices)


def _check_values(rows: int, slots: Tensor, accepted: Tensor, state_indices: Tensor) -> None:
    if slots.device.type != "cpu" and not settings.DEBUG:
        return
    T = slots.shape[1]
    check_rows(rows, slots, "slots", repeats=True)
    check_rows(rows, state_indices)
    for b, count in enumerate(accepted.tolist()):
        if not 0 <= count <= T:
            raise ValueError(f"accepted: got {count} for sequence {b}; expected 0 to T = {T}")
        slot = int(slots[b, count - 1]) if count else 0
        if slot < 0:
            raise ValueError(f"slots: got {slot} for token {count} of sequence {b}, which is accepted; expected a row")
