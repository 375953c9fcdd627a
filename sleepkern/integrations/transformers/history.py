"""The states and inputs from which a layer's recurrent state can be made again after any of its last tokens.

A layer keeps few states and all inputs since the first of them. A state takes K V numbers a head. A token's inputs take
2 (K + V) in Qwen3-Next, which is 32 times less for K = V = 128. A state between two that are kept is made by running
the recurrence over the inputs since the kept state before it.
"""

from __future__ import annotations

import copy
from typing import NamedTuple

import torch
from torch import Tensor

from .recording import Inputs, Record, joined


class Snapshot(NamedTuple):
    """What a layer carries after `position` tokens, as the model holds it. Nobody writes to these tensors.

    conv   [B,D,W] the last inputs of the short convolution; None where no token came before
    state  S [B,HV,K,V], or S^T in Mamba-2; None where no token came before
    """

    position: int
    conv: Tensor | None = None
    state: Tensor | None = None


class _Piece(NamedTuple):
    """The inputs of one call: of its convolution [B,D,T], and of its recurrence."""

    position: int
    conv: Tensor
    inputs: Inputs

    @property
    def end(self) -> int:
        return self.position + self.inputs.tokens

    def part(self, first: int, end: int, copy: bool = False) -> _Piece:
        """The tokens at positions first to end."""
        first, end = max(first, self.position), min(end, self.end)
        a, b = first - self.position, end - self.position
        conv = self.conv[..., a:b]
        return _Piece(first, conv.clone() if copy else conv, self.inputs.part(a, b, copy))


class History:
    """Snapshots at rising positions, and the inputs of all tokens after one of them, the base.

    Args:
        base: what the layer carries before the first recorded token.
        keep: how many of the last tokens can be taken back at any time.
        every: the states after each multiple of so many tokens stay until `take_marks`; None for no such states.
    """

    def __init__(self, base: Snapshot, keep: int, every: int | None = None) -> None:
        self.keep, self.every = keep, every
        self.first = self.end = base.position
        self.width = 0
        self._snapshots = {base.position: base}
        self._pieces: list[_Piece] = []

    def copy(self) -> History:
        """The same history, which goes on by itself; tensors are shared."""
        other = copy.copy(self)
        other._snapshots, other._pieces = dict(self._snapshots), list(self._pieces)
        return other

    def cuts(self, tokens: int) -> tuple[int, ...]:
        """The numbers of the next tokens after which a call of so many has to keep its state."""
        found = {tokens - self.keep} if tokens > 2 * self.keep else set()
        if self.every is not None:
            found |= set(range(self.every - self.end % self.every, tokens, self.every))
        return tuple(sorted(found - {tokens}))

    def extend(self, record: Record, before: Tensor | None, x: Tensor, after: Snapshot, cuts: tuple[int, ...]) -> None:
        """Add a call.

        Args:
            record: what its recurrence recorded.
            before: [B,D,W] the convolution's state before the call, None for zeros.
            x: [B,D,T] the inputs of its convolution.
            after: what the layer carries after the call; nobody may write to the tensors where `marks` says so.
            cuts: what `cuts` said.
        """
        assert after.conv is not None
        self.width = after.conv.shape[-1]
        for cut, state in zip(cuts, record.at_cuts, strict=True):
            position = self.end + cut
            self._snapshots[position] = Snapshot(position, _last_columns(before, x[..., :cut], self.width), state)
        self._pieces.append(_Piece(self.end, x, record.inputs))
        self.end = after.position
        if self.marks(self.end):
            self._snapshots[self.end] = after
        if self.end - self.first > 2 * self.keep:
            self._advance(self.end - self.keep)

    def marks(self, position: int) -> bool:
        """Tells whether the state after so many tokens stays."""
        return self.every is not None and position % self.every == 0 and position > 0

    def check(self, position: int) -> None:
        """Check that `back` can go to a position.

        Raises:
            ValueError: the state after so many tokens cannot be made.
        """
        if position > self.end:
            raise ValueError(
                f"tokens_to_remove: got {position - self.end}; expected 0 or less, minus the number of tokens to remove"
            )
        if position < self.first:
            raise ValueError(
                f"tokens_to_remove: got {position - self.end}; expected at least {self.first - self.end}, for inputs "
                "of earlier tokens are not kept (RollbackCache(model, keep=...))"
            )

    def back(self, position: int) -> Snapshot:
        """What the layer carries after so many tokens; the tokens after it are taken back.

        Raises:
            ValueError: a position whose state cannot be made.
        """
        self.check(position)
        found = self._at(position)
        self._pieces = [p.part(0, position) for p in self._pieces if p.position < position]
        self._snapshots = {at: s for at, s in self._snapshots.items() if at <= position}
        self.end = position
        self.commit(found)
        return found

    def commit(self, after: Snapshot) -> None:
        """Keep what the layer carries at the end, and nothing else between the base and there but marks."""
        self._snapshots = {at: s for at, s in self._snapshots.items() if at <= self.first or self.marks(at)}
        self._snapshots[self.end] = after

    def take_marks(self) -> list[Snapshot]:
        """The states after each multiple of `every`; those that `back` does not need are forgotten."""
        found = [s for at, s in self._snapshots.items() if self.marks(at)]
        self._snapshots = {at: s for at, s in self._snapshots.items() if at >= self.first}
        return found

    def _at(self, position: int) -> Snapshot:
        start = self._snapshots[max(at for at in self._snapshots if self.first <= at <= position)]
        if start.position == position:
            return start
        between = [p for p in self._pieces if p.position < position and p.end > start.position]
        parts = [p.part(start.position, position) for p in between]
        state = joined([p.inputs for p in parts]).state_after(start.state)
        x = torch.cat([p.conv for p in parts], dim=-1)
        return Snapshot(position, _last_columns(start.conv, x, self.width), state)

    def _advance(self, base: int) -> None:
        """Move the base, and free the inputs before it."""
        self._snapshots[base] = self._at(base)
        self._pieces = [p.part(base, p.end, copy=p.position < base) for p in self._pieces if p.end > base]
        self.first = base
        self._snapshots = {at: s for at, s in self._snapshots.items() if at >= base or self.marks(at)}


def _last_columns(before: Tensor | None, x: Tensor, width: int) -> Tensor:
    """The last `width` columns of `before` and x [B,D,T], with zeros before the first token."""
    if x.shape[-1] < width:
        before = x.new_zeros(*x.shape[:-1], width) if before is None else before
        x = torch.cat([before, x], dim=-1)
    return x[..., -width:].clone()
