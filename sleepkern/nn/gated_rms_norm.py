"""The gated RMS norm after a mixer's recurrence, as a module; `ops.mixer` has it as a function."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..ops.mixer import gated_rms_norm

__all__ = ["GatedRMSNorm", "gated_rms_norm"]


class GatedRMSNorm(nn.Module):
    """y = w r x silu(gate), r = (mean x^2 + eps)^-1/2: `gated_rms_norm` with a weight of its own, norm first.

    Args:
        width: V, the last dimension of x.
        eps: added to the mean of squares.
    """

    weight: nn.Parameter
    eps: float

    def __init__(self, width: int, eps: float = 1e-6) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x: Tensor, gate: Tensor) -> Tensor:
        """x, gate [B,T,H,width] to the same."""
        return gated_rms_norm(x, gate, self.weight, self.eps)
