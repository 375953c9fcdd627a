"""The writes to a tensor that torch counts, and its storage, both held without its memory."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef


def hold_weakly(tensors: Sequence[Tensor]) -> list[StorageWeakRef]:
    """While there is a weak reference to a storage no other one gets its number, and its memory is free to go."""
    return [StorageWeakRef(t.untyped_storage()) for t in tensors]


def counter(t: Tensor) -> Tensor:
    """An alias without memory, which counts its tensor's writes with it, whatever takes that tensor's place."""
    with torch.inference_mode(False), torch.no_grad():
        alias = t.detach()
        alias.data = alias.new_empty(0)
    return alias
