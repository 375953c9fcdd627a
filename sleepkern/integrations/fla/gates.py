"""Gates that fla computes inside or beside its kernels, in float32, or float64 where they are given so."""

from __future__ import annotations

from typing import Any

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


def raw_gates(
    g: Tensor | None,
    beta: Tensor | None,
    use_gate: bool,
    A_log: Tensor | None,
    dt_bias: Tensor | None,
    use_sigmoid: bool,
    doubled: bool,
    lower_bound: float | None = None,
) -> dict[str, Any]:
    """The options by which sleepkern's functions make the gates of a call; A_log and dt_bias of any shape.

    Raises:
        ValueError: beta is doubled, but not raw; a gate without the raw g or A_log.
    """
    beta_of(None, use_sigmoid, doubled)
    made: dict[str, Any] = {}
    if use_sigmoid and beta is not None:
        made |= {"use_beta_sigmoid_in_kernel": True, "allow_neg_eigval": doubled}
    if not use_gate:
        return made
    if g is None or (A_log is None and lower_bound is None):
        raise ValueError("A_log: got None; use_gate_in_kernel without lower_bound expects it, and the raw g")
    flat = {name: None if t is None else t.flatten() for name, t in (("A_log", A_log), ("dt_bias", dt_bias))}
    return made | flat | {"use_gate_in_kernel": True, "lower_bound": lower_bound}


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
