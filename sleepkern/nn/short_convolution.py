"""The short causal convolution before a mixer's recurrence, as a module; `ops.mixer` has it as a function."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..ops.mixer import short_convolution, short_convolution_step

__all__ = ["ShortConvolution", "short_convolution", "short_convolution_step"]


class ShortConvolution(nn.Module):
    """`short_convolution` with weights of its own, silu, without bias.

    Args:
        channels: D, the number of channels, each with weights of its own.
        width: W, the tokens that an output sees: its own and the W - 1 before.
    """

    weight: nn.Parameter

    def __init__(self, channels: int, width: int = 4) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(channels, width))
        nn.init.normal_(self.weight, std=width**-0.5)

    def forward(self, x: Tensor, past: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """x [B,T,D] and the width - 1 inputs before it [B,width-1,D] to (y [B,T,D], the last width - 1 inputs)."""
        return short_convolution(x, self.weight, past=past)
