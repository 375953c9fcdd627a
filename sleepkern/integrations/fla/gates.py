"""Gates that fla computes inside or beside its kernels, in float32, or float64 where they are given so."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def fused_gdn_gate(
    g: Tensor,
    A_log: Tensor,
    dt_bias: Tensor | None = None,
    output_dtype: torch.dtype = torch.float32,
) -> Tensor:
    """The log decay -exp(A_log) softplus(g + dt_bias) of a head; g [..., HV], A_log and dt_bias [HV]."""
    return head_gate(g, A_log, dt_bias).to(output_dtype)


def fused_kda_gate(
    g: Tensor,
    A_log: Tensor | None = None,
    dt_bias: Tensor | None = None,
    lower_bound: float | None = None,
    output_dtype: torch.dtype = torch.float32,
) -> Tensor:
    """The log decay of a channel; g [..., H, K], A_log [H], dt_bias [H K].

    -exp(A_log) softplus(g + dt_bias), or with lower_bound: lower_bound sigmoid(exp(A_log) (g + dt_bias)).
    """
    return channel_gate(g, A_log, dt_bias, lower_bound).to(output_dtype)


def beta_of(beta: Tensor | None, raw: bool, doubled: bool) -> Tensor | None:
    """beta, or its sigmoid where it is raw, times 2 where doubled.

    Raises:
        ValueError: beta is doubled, but not raw.
    """
    if doubled and not raw:
        raise ValueError("allow_neg_eigval: got True; expected use_beta_sigmoid_in_kernel=True beside it")
    if beta is None or not raw:
        return beta
    beta = _wide(beta).sigmoid()
    return beta * 2 if doubled else beta


def head_gate(g: Tensor | None, A_log: Tensor | None, dt_bias: Tensor | None) -> Tensor:
    if g is None or A_log is None:
        raise ValueError("A_log: got None; use_gate_in_kernel expects it, and the raw g")
    raw = _wide(g) if dt_bias is None else _wide(g) + _wide(dt_bias)
    return -_wide(A_log).exp() * F.softplus(raw)


def channel_gate(g: Tensor, A_log: Tensor | None, dt_bias: Tensor | None, lower_bound: float | None) -> Tensor:
    raw = _wide(g) if dt_bias is None else _wide(g) + _wide(dt_bias).view(g.shape[-2:])
    rate = None if A_log is None else _wide(A_log).exp().view(-1, 1)
    if lower_bound is not None:
        return lower_bound * torch.sigmoid(raw if rate is None else rate * raw)
    if rate is None:
        raise ValueError("A_log: got None; use_gate_in_kernel without lower_bound expects it")
    return -rate * F.softplus(raw)


def _wide(t: Tensor) -> Tensor:
    return t if t.dtype == torch.float64 else t.float()
