"""The short convolution before a mixer's recurrence, as models of transformers call it."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor


def short_convolution(original: Callable[..., Any]) -> Callable[..., Any]:
    """Stands for causal_conv1d_fn: keeps packed sequences apart, and is faster on the CPU."""

    @functools.wraps(original)
    def causal_conv1d_fn(*args: Any, **kwargs: Any) -> Tensor:
        call = _convolution_call(*args, **kwargs)
        packed = call.cu_seqlens is not None or call.seq_idx is not None
        ours = call.x.device.type == "cpu" and not torch.compiler.is_exporting()
        if ours and (packed or _faster_by_rows(call)):
            return _convolve(call)
        return original(*args, **kwargs)  # type: ignore[no-any-return]

    return causal_conv1d_fn


class _Convolution(NamedTuple):
    x: Tensor
    weight: Tensor
    bias: Tensor | None
    activation: str | None
    cu_seqlens: Tensor | None
    seq_idx: Tensor | None


def _convolution_call(
    hidden_states: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    activation: str | None = None,
    cu_seq_lens_q: Tensor | None = None,
    seq_idx: Tensor | None = None,
    **unused: Any,
) -> _Convolution:
    return _Convolution(hidden_states, weight, bias, activation, cu_seq_lens_q, seq_idx)


def _faster_by_rows(call: _Convolution) -> bool:
    """float32 on the CPU, no gradients, channels side by side as the projections leave them.

    torch's own depthwise convolution takes 2.1 times as long (8192 channels, 1024 tokens, one
    thread) and leaves the tokens side by side, so that q, k and v must be transposed once more.
    """
    if torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in call[:3]):
        return False
    float32 = call.x.dtype == call.weight.dtype == torch.float32
    return float32 and call.x.device.type == "cpu" and call.x.stride(1) == 1


def _convolve(call: _Convolution) -> Tensor:
    """y_t = bias + sum_j w_{W-1-j} x_{t-j}, t-j of t's own sequence; x, y [B,D,T], w [D,W]."""
    from transformers.activations import ACT2FN

    x, taps = call.x.transpose(1, 2).float(), call.weight.t().float().contiguous()
    T, W = x.shape[1], taps.shape[0]
    sequence = _sequence_of_columns(call, T)
    y = x * taps[W - 1] if call.bias is None else x * taps[W - 1] + call.bias
    for j in range(1, min(W, T)):
        past = x[:, : T - j]
        if sequence is not None:
            past = past * (sequence[:, j:] == sequence[:, : T - j])[..., None]
        y[:, j:].addcmul_(past, taps[W - 1 - j])
    y = y if call.activation is None else ACT2FN[call.activation](y)
    return y.to(call.x.dtype).transpose(1, 2)


def _sequence_of_columns(call: _Convolution, T: int) -> Tensor | None:
    """[1 or B,T] packed sequence of each column; columns a cache put before are the first's."""
    if call.cu_seqlens is not None:
        positions = torch.arange(T, device=call.x.device) - (T - call.cu_seqlens[-1])
        return torch.searchsorted(call.cu_seqlens[1:].to(positions), positions, right=True)[None]
    if call.seq_idx is not None:
        before = T - call.seq_idx.shape[1]
        return torch.cat([call.seq_idx[:, :1].expand(-1, before), call.seq_idx], dim=1)
    return None
