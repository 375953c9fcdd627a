"""What mixers need before and after the recurrence."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class ShortConvolution(nn.Module):
    """y_t = silu(sum_j w_j x_{t-j}), j < width, each channel for itself; zeros precede the first token.

    Args:
        channels: D.
        width: tokens that an output sees.
    """

    def __init__(self, channels: int, width: int = 4) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(width, channels))
        nn.init.normal_(self.weight, std=width**-0.5)

    def forward(self, x: Tensor, past: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """x [B,T,D] and the width - 1 inputs before it [B,width-1,D] to (y [B,T,D], the last width - 1 inputs)."""
        width, T = len(self.weight), x.shape[1]
        if past is None:
            past = x.new_zeros(x.shape[0], width - 1, x.shape[2])
        full = torch.cat([past.to(x.dtype), x], dim=1)
        y = full[:, width - 1 :] * self.weight[0]
        for j in range(1, width):
            y = torch.addcmul(y, full[:, width - 1 - j : width - 1 - j + T], self.weight[j])
        return F.silu(y), full[:, T:]


class GatedRMSNorm(nn.Module):
    """RMSNorm(x) silu(gate) over the last dimension."""

    def __init__(self, width: int, eps: float = 1e-6) -> None:
        super().__init__()
        self.norm = nn.RMSNorm(width, eps)

    def forward(self, x: Tensor, gate: Tensor) -> Tensor:
        """x, gate [...,width] to the same."""
        return self.norm(x) * F.silu(gate)  # type: ignore[no-any-return]
