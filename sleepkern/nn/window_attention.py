"""Attention that sees its window, and what was kept of the one before."""

from __future__ import annotations

import importlib.util

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..state import KVState
from .padding import without_padding
from .sizes import residual, whole_numbers

_FLASH = importlib.util.find_spec("flash_attn") is not None


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
        return self.out(_attend(q, k, v, mask).transpose(1, 2).flatten(-2)), KVState(k, v)

    def _check_before(self, before: KVState, B: int) -> None:
        if not isinstance(before, KVState):
            raise TypeError(f"before: got a {type(before).__name__}; expected KVState(keys, values)")
        for name, t in before._asdict().items():
            if t.ndim != 4 or t.shape[:2] != (B, self.heads) or t.shape != before.keys.shape:
                raise ValueError(f"before: got {name} {list(t.shape)}; expected {[B, self.heads]} and tokens, width")


def _attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    T, S = q.shape[2], k.shape[2]
    if mask is None and _FLASH and q.is_cuda and q.dtype in (torch.bfloat16, torch.float16):
        from flash_attn import flash_attn_func

        out: Tensor = flash_attn_func(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), causal=True)
        return out.transpose(1, 2)
    if mask is None and S == T:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True)
    seen = torch.ones(T, S, dtype=torch.bool, device=q.device).tril(S - T)
    if mask is not None:
        diagonal = torch.eye(T, S, dtype=torch.bool, device=q.device).roll(S - T, 1)  # a row of padding sees itself
        seen = (seen & mask[:, None, None, :].bool()) | diagonal
    return F.scaled_dot_product_attention(q, k, v, attn_mask=seen)
