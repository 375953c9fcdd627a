"""The gates of a call, made of raw projections by torch's operators: the definition, differentiable as often as wanted.

Sums and exponentials are float32, or float64 where the inputs are. A backend that makes gates in its kernels is
compared with this; for any other, this runs before it.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from ..problems.gates import RawGates
from ..problems.recurrence import Problem, Tensors


def with_gates(problem: Problem, x: Tensors, gates: RawGates) -> Tensors:
    """The tensors of the same call with g and beta made."""
    wide = problem.state_dtype == torch.float64
    g, beta = x.g, x.beta
    if gates.decay:
        assert g is not None
        g = log_decay(g, gates.A_log, gates.dt_bias, gates.lower_bound, wide)
    if gates.beta_scale:
        assert beta is not None
        beta = beta_of(beta, gates.beta_scale, wide)
    return x._replace(g=g, beta=beta)


def log_decay(
    g: Tensor, A_log: Tensor | None, dt_bias: Tensor | None, lower_bound: float | None = None, wide: bool = False
) -> Tensor:
    """-exp(A_log) softplus(g + dt_bias), or with lower_bound: lower_bound sigmoid(exp(A_log) (g + dt_bias)).

    g [B,T,HV] or [B,T,HV,K]; A_log of HV elements; dt_bias of as many as a token of g has. softplus is max(x, 0) +
    log1p(exp(-|x|)), which neither overflows nor loses what is small.
    """
    dtype = torch.float64 if wide or g.dtype == torch.float64 else torch.float32
    raw = g.to(dtype)
    if dt_bias is not None:
        raw = raw + dt_bias.to(dtype).reshape(g.shape[2:])
    rate = None
    if A_log is not None:
        rate = A_log.to(dtype).exp().reshape(-1, *(1,) * (g.dim() - 3))
    if lower_bound is not None:
        return lower_bound * torch.sigmoid(raw if rate is None else rate * raw)
    negative = F.logsigmoid(-raw)
    return negative if rate is None else rate * negative


def beta_of(beta: Tensor, scale: float, wide: bool = False) -> Tensor:
    """scale sigmoid(beta), in float32 or float64."""
    beta = torch.sigmoid(beta.to(torch.float64 if wide or beta.dtype == torch.float64 else torch.float32))
    return beta if scale == 1 else scale * beta
