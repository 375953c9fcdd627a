"""Segments of a packed row that form trees: which one each goes on from."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .recurrence import check_packing


def read_parents(parents: Tensor | Sequence[int], cu_seqlens: Tensor | None) -> list[int]:
    """The parent of each segment, -1 for a root.

    Raises:
        TypeError: parents is no sequence of integers.
        ValueError: no cu_seqlens, a wrong number of parents, or a segment that does not come after its parent.
    """
    if cu_seqlens is None:
        raise ValueError("parents: got parents without cu_seqlens; expected the segments as a packed row")
    check_packing(cu_seqlens, 1)
    found, n = _numbers(parents), cu_seqlens.numel() - 1
    if len(found) != n:
        raise ValueError(f"parents: got {len(found)} parents; expected {n}, one for each segment of cu_seqlens")
    for i, parent in enumerate(found):
        if not -1 <= parent < i:
            raise ValueError(f"parents: got parents[{i}] = {parent}; expected -1, or a segment before {i}")
    return found


def _numbers(parents: Any) -> list[int]:
    if isinstance(parents, Tensor):
        if parents.dtype not in (torch.int32, torch.int64) or parents.dim() != 1:
            raise TypeError(f"parents: got {parents.dtype} {list(parents.shape)}; expected [n] of int32 or int64")
        numbers: list[int] = parents.tolist()
        return numbers
    if not isinstance(parents, Sequence) or isinstance(parents, (str, bytes)):
        raise TypeError(f"parents: got {type(parents).__name__}; expected a tensor or a list of integers")
    for parent in parents:
        if isinstance(parent, bool) or not hasattr(parent, "__index__"):
            raise TypeError(f"parents: got {type(parent).__name__} among them; expected integers")
    return [operator.index(parent) for parent in parents]


def levels_of(parents: Sequence[int]) -> list[list[int]]:
    """The segments by the number of their ancestors, those of one level in order."""
    depths: list[int] = []
    for parent in parents:
        depths.append(0 if parent < 0 else depths[parent] + 1)
    levels: list[list[int]] = [[] for _ in range(max(depths, default=-1) + 1)]
    for segment, depth in enumerate(depths):
        levels[depth].append(segment)
    return levels
