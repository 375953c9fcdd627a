"""Padding among the tokens of a batch, for layers that must not see it."""

from __future__ import annotations

import torch
from torch import Tensor


class Padding:
    """The positions of padding: mask [B,T] has 0 for it.

    Raises:
        TypeError: a mask that is no tensor of real numbers.
        ValueError: a mask of another shape than that of tokens x [B,T,d].
    """

    def __init__(self, mask: Tensor, x: Tensor) -> None:
        _check(mask, *x.shape[:2])
        self._text = mask != 0

    def zeroed(self, x: Tensor) -> Tensor:
        """x [B,T,d] with 0 for padding, whatever stood there, nan too; so are its gradients."""
        return x.masked_fill(~self._text[..., None], 0)

    def moved(self, x: Tensor, before: int) -> Tensor:
        """x [B,before+T,d], of which the first ones are no padding, with each row's padding moved to its start."""
        return x.gather(1, self._order(before)[..., None].expand_as(x))

    def moved_back(self, x: Tensor, before: int) -> Tensor:
        """x [B,before+T,d] that was moved so, in its own order again, and of it the last T."""
        back = self._order(before).argsort(dim=1)[:, before:, None]
        return x.gather(1, back.expand(-1, -1, x.shape[2]))

    def _order(self, before: int) -> Tensor:
        """[B,before+T] which places come first: padding, then the others."""
        text = torch.cat([self._text.new_ones(len(self._text), before), self._text], dim=1)
        return text.to(torch.uint8).argsort(dim=1, stable=True)


def without_padding(x: Tensor, mask: Tensor, kept: int = 0) -> Tensor:
    """x [B,T,d] with 0 for padding; mask [B,kept+T] has 0 for it, of which the first ones are of tokens before x.

    Raises:
        TypeError: a mask that is no tensor of real numbers.
        ValueError: a mask of another shape.
    """
    B, T = x.shape[:2]
    _check(mask, B, kept + T)
    return Padding(mask[:, kept:], x).zeroed(x)


def _check(mask: Tensor, B: int, tokens: int) -> None:
    if not isinstance(mask, Tensor) or mask.dtype.is_complex:
        found = mask.dtype if isinstance(mask, Tensor) else type(mask).__name__
        raise TypeError(f"mask: got {found}; expected a tensor with 0 for padding")
    if mask.shape != (B, tokens):
        raise ValueError(f"mask: got {list(mask.shape)}; expected {[B, tokens]}")
