"""Tokens that a session holds back until they fill a window, and the masks of padding that go with tokens."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class WindowBuffer(NamedTuple):
    """Tokens that are pending: they were ingested, and their window is not full.

    ids   [B,T] integers, None where no token is pending
    mask  [B,T] with 0 for padding, else 1; None where no token is padded
    """

    ids: Tensor | None = None
    mask: Tensor | None = None

    @property
    def tokens(self) -> int:
        """T, 0 where no token is pending."""
        return 0 if self.ids is None else self.ids.shape[1]

    def followed_by(self, ids: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """The pending tokens and then `ids` [B,T'], with the mask of both."""
        if self.ids is None:
            return ids, mask
        return torch.cat([self.ids, ids], dim=1), joined_mask(self.ids, self.mask, ids, mask)

    def rows(self, index: Tensor) -> WindowBuffer:
        """The buffer of these rows of the batch."""
        return WindowBuffer(*(None if t is None else t[index] for t in self))

    def compact(self) -> WindowBuffer:
        """The same tokens in memory of their own."""
        return WindowBuffer(*map(copy_of_tokens, self))


def joined_mask(first: Tensor, first_mask: Tensor | None, second: Tensor, mask: Tensor | None) -> Tensor | None:
    """The mask of tokens [B,T1] followed by tokens [B,T2]; None means that no token is padded."""
    if first_mask is None and mask is None:
        return None
    pairs = ((first, first_mask), (second, mask))
    return torch.cat([torch.ones_like(ids) if mask is None else mask for ids, mask in pairs], dim=1)


def copy_of_tokens(ids: Tensor | None) -> Tensor | None:
    """A copy of tokens or of a mask [B,T], None for T = 0. A view would keep a whole text, and change with the text."""
    return None if ids is None or ids.shape[1] == 0 else ids.clone()
