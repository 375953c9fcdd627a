"""The mixer's own operators in torch: any device, any float type, differentiable; the definition of the kernels.

z_t = bias + sum_j w_{W-1-j} x_{t-j}, j < W;   y_t = silu(z_t) or z_t      each channel for itself

y = w r x act(gate), r = (mean x^2 + eps)^-1/2        gate first (Mamba-2): y = w u r(u), u = x act(gate)
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from ..problems.mixer import ConvolutionProblem, ConvolutionStepProblem, GatedNormProblem, MixerProblem
from ..problems.recurrence import check_offsets
from ..transforms import offsets_of

NAME = "torch"
SUPPORTS = frozenset({ConvolutionProblem, ConvolutionStepProblem, GatedNormProblem})
RECORDED = True


def why_not(problem: MixerProblem) -> str | None:
    """None for every problem."""
    return None


def kernel(problem: MixerProblem) -> str:
    """One line on the code that runs."""
    return "torch's operators"


def convolve(
    x: Tensor, weight: Tensor, bias: Tensor | None, past: Tensor | None, cu_seqlens: Tensor | None, silu: bool
) -> tuple[Tensor, Tensor]:
    """y [B,T,D] and the last W - 1 inputs [n,W-1,D].

    Raises:
        ValueError: cu_seqlens do not start at 0, fall, or do not end at T.
    """
    if cu_seqlens is not None:
        ends = offsets_of(cu_seqlens)
        check_offsets(ends, x.shape[1])
        parts = [
            convolve(x[:, a:b], weight, bias, None if past is None else past[i : i + 1], None, silu)
            for i, (a, b) in enumerate(zip(ends, ends[1:], strict=False))
        ]
        return torch.cat([y for y, _ in parts], dim=1), torch.cat([last for _, last in parts])
    W, T = weight.shape[1], x.shape[1]
    if past is None:
        past = x.new_zeros(x.shape[0], W - 1, x.shape[2])
    full = torch.cat([past, x], dim=1)
    z = full[:, W - 1 :] * weight[:, W - 1]
    for j in range(1, W):
        z = torch.addcmul(z, full[:, W - 1 - j : W - 1 - j + T], weight[:, W - 1 - j])
    return _activated(z, bias, silu).to(x.dtype), full[:, T:]


def convolve_step(x: Tensor, state: Tensor, weight: Tensor, bias: Tensor | None, silu: bool) -> Tensor:
    """y [B,D]; the state [B,D,W] is updated in place."""
    state.copy_(torch.cat([state[..., 1:], x[..., None].to(state.dtype)], dim=-1))
    z = (state.to(weight.dtype) * weight).sum(-1)
    return _activated(z, bias, silu).to(x.dtype)


def gated_norm(x: Tensor, gate: Tensor, weight: Tensor, eps: float, silu: bool, gate_first: bool) -> Tensor:
    """y of the shape [B,T,H,V] or [B,T,V] of x."""
    dtype = torch.promote_types(x.dtype, torch.float32)
    a = (F.silu if silu else torch.sigmoid)(gate.to(dtype))
    u = x.to(dtype)
    if gate_first:
        return (_normalized(u * a, eps) * weight).to(x.dtype)
    return (_normalized(u, eps) * weight * a).to(x.dtype)


def _activated(z: Tensor, bias: Tensor | None, silu: bool) -> Tensor:
    z = z if bias is None else z + bias
    return F.silu(z) if silu else z


def _normalized(x: Tensor, eps: float) -> Tensor:
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)
