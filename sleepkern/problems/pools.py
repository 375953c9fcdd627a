"""What a call checks of states that are stored in a pool [n,HV,K,V], of which each sequence reads and writes a row."""

from __future__ import annotations

from collections import Counter

import torch
from torch import Tensor

from .. import settings
from .recurrence import Problem, check_dense, check_state_type, sizes_of, wrong_shape, wrong_type


def check_pool(problem: Problem, pool: Tensor | None, name: str = "state") -> Problem:
    """Check a pool; the problem with the type of its states.

    Raises:
        TypeError, ValueError: a wrong type, shape or device.
    """
    pool = check_dense(name, pool)
    shape = (problem.HV, problem.K, problem.V)
    if pool.dim() != 4 or pool.shape[1:] != shape:
        raise ValueError(f"{name}: got shape {list(pool.shape)}; expected {sizes_of('n', *shape)}, a pool of n states")
    problem = check_state_type(problem, pool, name, in_place=True)
    _check_device(problem, pool, name)
    return problem


def check_indices(problem: Problem, indices: Tensor, shape: tuple[int, ...], name: str = "state_indices") -> None:
    """Check what shape, type and device tell of the rows that sequences read or write.

    Raises:
        TypeError, ValueError: a wrong type, shape or device.
    """
    check_dense(name, indices)
    if indices.dtype not in (torch.int32, torch.int64):
        raise wrong_type(name, indices, "torch.int32 or torch.int64")
    if indices.shape != shape:
        raise wrong_shape(name, indices, shape)
    _check_device(problem, indices, name)


def check_rows(rows: int, indices: Tensor, name: str = "state_indices", repeats: bool = False) -> None:
    """Check what only the values of indices can tell: on the CPU always, on a GPU with SLEEPKERN_DEBUG=1.

    Args:
        rows: the number of states in the pool.
        repeats: whether an index may occur twice, as it may where rows are only read.

    Raises:
        ValueError: an index beyond the pool, or one that occurs twice.
    """
    if indices.device.type != "cpu" and not settings.DEBUG:
        return
    used = [i for i in indices.flatten().tolist() if i >= 0]
    if used and max(used) >= rows:
        raise ValueError(f"{name}: got {max(used)}; expected less than {rows}, the states of the pool")
    if not repeats and len(set(used)) < len(used):
        raise ValueError(f"{name}: got {indices.tolist()}; expected every state once")


def check_states_out(pool: Tensor, indices: Tensor | None, states_out: Tensor, out_indices: Tensor | None) -> None:
    """Check the values of the rows that a call reads and those that it writes a state to after each token.

    Raises:
        ValueError: a row beyond its pool, one that is written twice, or one that one sequence reads from and another
            writes to.
    """
    if indices is not None:
        check_rows(pool.shape[0], indices, repeats=True)
    if out_indices is None:
        return
    check_rows(states_out.shape[0], out_indices, "states_out_indices")
    if states_out.data_ptr() != pool.data_ptr() or (out_indices.device.type != "cpu" and not settings.DEBUG):
        return
    read = list(range(pool.shape[0])) if indices is None else indices.tolist()
    times_read = Counter(read)
    for b, row in enumerate(out_indices.tolist()):
        taken = [i for i in row if i >= 0 and times_read[i] > (read[b] == i)]
        if taken:
            raise ValueError(
                f"states_out_indices: got {taken[0]} for sequence {b}, a state that another sequence starts from; "
                "expected states that no other sequence reads"
            )


def _check_device(problem: Problem, t: Tensor, name: str) -> None:
    if t.device.type != problem.device:
        raise ValueError(f"{name}: got device {t.device}; expected {problem.device}, where k is")
