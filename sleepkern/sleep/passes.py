"""What lies between two passes over a window."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor
from torch.nn import functional as F


def normalised(h: Tensor) -> Tensor:
    """Over its root mean square, without weights: what "reinject" adds to what the first pass started from."""
    return F.rms_norm(h, h.shape[-1:])


@torch.no_grad()
def relative_change(states: Iterable[tuple[Tensor | None, Tensor]]) -> Tensor:
    """|S_n - S_(n-1)| / |S_n| over pairs of a fast weight before a pass (None for 0) and after it; 0 without any."""
    pairs = list(states)
    if not pairs:
        return torch.zeros(())
    steps = [torch.linalg.vector_norm(S) if old is None else torch.dist(S, old) for old, S in pairs]
    sizes = [torch.linalg.vector_norm(S) for _, S in pairs]
    change: Tensor = torch.stack(steps).norm() / torch.stack(sizes).norm().clamp_min(1e-30)
    return change
