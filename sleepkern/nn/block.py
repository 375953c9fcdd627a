"""A block: mixer and MLP, each behind a norm, each added to the residual stream."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F

from .attention import WindowAttention
from .mixer import GatedDeltaNet
from .padding import without_padding
from .sizes import whole_numbers


class MLP(nn.Module):
    """out relu(up x)^2."""

    def __init__(self, width: int, factor: int = 4) -> None:
        super().__init__()
        whole_numbers(width=width, factor=factor)
        self.up = nn.Linear(width, factor * width, bias=False)
        self.out = nn.Linear(factor * width, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """[...,width] to the same."""
        return self.out(F.relu(self.up(x)).square())  # type: ignore[no-any-return]


class HybridBlock(nn.Module):
    """h <- h + mixer(norm h); h <- h + MLP(norm h)."""

    def __init__(self, width: int, mixer: GatedDeltaNet | WindowAttention, factor: int = 4) -> None:
        super().__init__()
        self.mixer_norm, self.mixer = nn.RMSNorm(width), mixer
        self.mlp_norm, self.mlp = nn.RMSNorm(width), MLP(width, factor)

    @property
    def recurrent(self) -> bool:
        """Whether its memory is a fast weight; attention's is keys and values."""
        return isinstance(self.mixer, GatedDeltaNet)

    def forward(
        self, h: Tensor, before: Any = None, mask: Tensor | None = None, replays: int = 1
    ) -> tuple[Tensor, Any]:
        """h [B,T,d] and the mixer's memory to both after it; replays: passes of a recurrence over the same input.

        mask: as the mixer takes it; what is padding counts as 0.
        """
        if mask is not None:  # nan in padding would reach the gradients of the norms
            h = without_padding(h, mask, 0 if before is None or self.recurrent else before.keys.shape[2])
        options = {"replays": replays} if self.recurrent else {}
        mixed, after = self.mixer(self.mixer_norm(h), before, mask, **options)
        h = h + mixed
        return h + self.mlp(self.mlp_norm(h)), after
