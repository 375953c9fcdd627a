"""The states after every n tokens of each sequence: how many there are, and in which order they are stored."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import transforms
from .recurrence import Problem, check_packing, check_state_every


def state_offsets(cu_seqlens: Tensor, state_every: int) -> Tensor:
    """Say where the states of each packed sequence start among those that `state_every` returns.

    A sequence of L tokens has ceil(L / state_every) states, the last one after its last token.

    Args:
        cu_seqlens: [n+1] int32 or int64, where each packed sequence starts, and the end of the last.
        state_every: the number of tokens from one state to the next, at least 1.

    Returns:
        [n+1] int64 on the device of cu_seqlens: sequence i has states[:, offsets[i]:offsets[i + 1]].

    Raises:
        TypeError: cu_seqlens is no tensor of integers, or state_every no integer.
        ValueError: cu_seqlens is not [n+1] with n >= 1, or state_every is below 1.
    """
    every = check_state_every(state_every)
    check_packing(cu_seqlens, 1)
    lengths = cu_seqlens.long().diff()
    counts = -torch.div(-lengths, every, rounding_mode="floor")
    return torch.cat([counts.new_zeros(1), counts.cumsum(0)])


def count_states(problem: Problem, cu_seqlens: Tensor | None) -> int:
    """The number of states along the way in a row of the batch; offsets on a GPU are waited for."""
    every = problem.state_every
    if every is None:
        return 0
    if cu_seqlens is None:
        return -(-problem.T // every)
    offsets = transforms.offsets_of(cu_seqlens)
    return sum(-((a - b) // every) for a, b in zip(offsets, offsets[1:], strict=False))
