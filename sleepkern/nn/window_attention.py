"""Attention that sees its window, and what was kept of the one before."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..state import KVState
from .attention import attend
from .padding import without_padding
from .sizes import residual, whole_numbers


class WindowAttention(nn.Module):
    """Causal attention with normalised q and k; flash-attn on a GPU where it is installed, else torch's own.

    Args:
        width: d of the residual stream.
        heads: H, each width / heads wide.
    """

    heads: int
    qkv: nn.Linear
    q_norm: nn.RMSNorm
    k_norm: nn.RMSNorm
    out: nn.Linear

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        whole_numbers(width=width, heads=heads)
        if width % heads:
            raise ValueError(f"width: got {width}; expected a multiple of heads = {heads}")
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.q_norm, self.k_norm = nn.RMSNorm(width // heads), nn.RMSNorm(width // heads)
        self.out = nn.Linear(width, width, bias=False)

    def forward(self, x: Tensor, before: KVState | None = None, mask: Tensor | None = None) -> tuple[Tensor, KVState]:
        """x [B,T,d] after keys and values before it, [B,H,tokens,d/H]; mask [B,tokens+T] has 0 for padding.

        Raises:
            TypeError, ValueError: another x or `before`, or a mask that is no tensor [B,tokens+T] of real numbers.
        """
        residual(x, self.qkv)
        if before is not None:
            self._check_before(before, x.shape[0])
        if mask is not None:
            x = without_padding(x, mask, 0 if before is None else before.keys.shape[2])
        q, k, v = (part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in self.qkv(x).chunk(3, dim=-1))
        q, k = self.q_norm(q), self.k_norm(k)
        if before is not None:
            k, v = torch.cat([before.keys, k], dim=2), torch.cat([before.values, v], dim=2)
        return self.out(attend(q, k, v, mask).transpose(1, 2).flatten(-2)), KVState(k, v)

    def _check_before(self, before: KVState, B: int) -> None:
        if not isinstance(before, KVState):
            raise TypeError(f"before: got a {type(before).__name__}; expected KVState(keys, values)")
        for name, t in before._asdict().items():
            if t.ndim != 4 or t.shape[:2] != (B, self.heads) or t.shape != before.keys.shape:
                raise ValueError(f"before: got {name} {list(t.shape)}; expected {[B, self.heads]} and tokens, width")
