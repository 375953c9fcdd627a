"""Tokens as a caller gives them, checked."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import transforms
from ..eager import dispatch_modes

WHOLE = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)
"""Types of tokens."""


def tokens_of(ids: Any, vocabulary: int | None) -> Tensor:
    """ids [B,T] of a type that embeddings take: int32 as it is, narrower ones as int64.

    vocabulary: tokens there are, None for not to look; nor are numbers looked at that are not there, or of a graph.

    Raises:
        TypeError, ValueError: not tokens of this vocabulary.
    """
    if not isinstance(ids, Tensor):
        raise TypeError(f"ids: got a {type(ids).__name__}; expected a tensor of integers [B,T]")
    if ids.ndim != 2 or ids.dtype not in WHOLE or ids.layout is not torch.strided:
        layout = "" if ids.layout is torch.strided else f"{ids.layout} "
        raise ValueError(f"ids: got {layout}{ids.dtype} {list(ids.shape)}; expected integers [B,T]")
    if vocabulary is not None and _has_numbers(ids):
        low, high = (int(end) for end in torch.aminmax(ids))
        if low < 0 or high >= vocabulary:
            raise ValueError(f"ids: got {low if low < 0 else high}; expected tokens from 0 to {vocabulary - 1}")
    return ids if ids.dtype in (torch.int64, torch.int32) else ids.long()


def _has_numbers(ids: Tensor) -> bool:
    if torch.compiler.is_compiling() or transforms.active() or dispatch_modes() > 0:
        return False
    return type(ids) is Tensor and ids.device.type != "meta" and ids.numel() > 0
