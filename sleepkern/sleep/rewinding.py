"""Positions that a session keeps on its way and can go back to, and the type in which it keeps fast weights."""

from __future__ import annotations

import operator
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from ..state import RecurrentState
from .protocols import LayerCache, ModelAdapter, copy_cache
from .window_buffer import WindowBuffer

Self = TypeVar("Self", bound="Rewinding")


class Kept(NamedTuple):
    """What a session has at a position: tensors that the session shares and does not write to."""

    memory: LayerCache
    kept_mask: Tensor | None
    batch: int


class Rewinding:
    """The part of a SleepSession that goes back; SleepSession documents the settings."""

    adapter: ModelAdapter
    memory: LayerCache
    window: int
    keep_every: int | None
    keep_last: int
    state_dtype: torch.dtype | None
    position: int
    batch: int
    buffer: WindowBuffer
    kept_mask: Tensor | None
    reports: list[Any]
    kept: dict[int, Kept]

    @property
    def kept_positions(self) -> list[int]:
        """The positions that `rewind` takes, in order."""
        return sorted(self.kept)

    def rewind(self: Self, position: int) -> Self:
        """Go back to a position that was kept: the session is as it was when it had slept over that many tokens.

        Pending tokens, later kept positions and reports of later sleeps are dropped. A fork made before still has them.

        Args:
            position: one of `kept_positions`.

        Returns:
            The session.

        Raises:
            TypeError: position is no whole number.
            ValueError: the session does not keep that position, and is as it was.
        """
        if isinstance(position, bool) or not hasattr(position, "__index__"):
            raise TypeError(f"position: got {position!r}; expected a whole number")
        at = operator.index(position)
        if at not in self.kept:
            known = ", ".join(map(str, self.kept_positions)) or "none, for keep_every is not set"
            raise ValueError(f"position: got {at}; expected one that the session keeps: {known}")
        found = self.kept[at]
        self.memory = copy_cache(self.adapter, found.memory)
        self.position, self.kept_mask, self.batch, self.buffer = at, found.kept_mask, found.batch, WindowBuffer()
        self.kept = {p: kept for p, kept in self.kept.items() if p <= at}
        self.reports = [report for report in self.reports if report.first < at]
        return self

    def _keep(self, before: int) -> None:
        """Keep the position that a sleep has reached from `before`, if a multiple of keep_every is between them."""
        if self.keep_every is None or self.position // self.keep_every == before // self.keep_every:
            return
        self._keep_here()
        for position in self.kept_positions[: -self.keep_last]:
            del self.kept[position]

    def _keep_here(self) -> None:
        if self.keep_every is not None:
            self.kept[self.position] = Kept(copy_cache(self.adapter, self.memory), self.kept_mask, self.batch)

    def _widened(self) -> LayerCache:
        """The memory with fast weights that a model can compute with: a copy where their type is another."""
        if self.state_dtype is None:
            return self.memory
        copy = copy_cache(self.adapter, self.memory)
        set_state_type(copy, torch.float32)
        return copy


def set_state_type(memory: LayerCache, dtype: torch.dtype | None) -> None:
    """Round the fast weights of a cache to a type, None for no change."""
    if dtype is not None:
        memory.set_fast({i: RecurrentState(x.conv, x.state.to(dtype)) for i, x in memory.fast().items()})


def check_keeping(keep_every: Any, keep_last: Any, window: int, state_dtype: Any) -> None:
    """Check the settings of a session that say what it keeps.

    Raises:
        TypeError, ValueError: the first of another type or out of range.
    """
    for name, count in (("keep_every", keep_every), ("keep_last", keep_last)):
        if count is None and name == "keep_every":
            continue
        if isinstance(count, bool) or not isinstance(count, int):
            raise TypeError(f"{name}: got {count!r}; expected a whole number of at least 1")
        if count < 1:
            raise ValueError(f"{name}: got {count}; expected at least 1")
    if keep_every is not None and keep_every % window:
        raise ValueError(f"keep_every: got {keep_every}; expected a multiple of window = {window}")
    if state_dtype not in (None, torch.float32, torch.bfloat16):
        raise ValueError(f"state_dtype: got {state_dtype!r}; expected torch.float32, torch.bfloat16 or None")
