"""The short convolution before a mixer's recurrence, as models of transformers call it."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sleepkern.nn import short_convolution, short_convolution_step

from ..falling_back import left_to_original


def many_tokens(original: Callable[..., Any]) -> Callable[..., Any]:
    """Stands for causal_conv1d_fn: one pass over memory on the CPU, and packed sequences are kept apart."""

    @functools.wraps(original)
    def causal_conv1d_fn(*args: Any, **kwargs: Any) -> Tensor:
        call = _call(*args, **kwargs)
        if left_to_original(_why_not(call.x, call.activation)):
            return original(*args, **kwargs)  # type: ignore[no-any-return]
        x = call.x.transpose(1, 2)
        offsets = _offsets(call)
        if offsets is not None:  # the rows of a batch are sequences of their own, too
            x = x.reshape(1, -1, x.shape[2])
        y, _ = short_convolution(x, call.weight, call.bias, activation=_silu(call.activation), cu_seqlens=offsets)
        return y.view(call.x.shape[0], -1, y.shape[2]).transpose(1, 2)

    return causal_conv1d_fn


def one_token(original: Callable[..., Any]) -> Callable[..., Any]:
    """Stands for causal_conv1d_update: x [B,D,1] after the last W inputs [B,D,W], which move on in place."""

    @functools.wraps(original)
    def causal_conv1d_update(
        hidden_states: Tensor,
        conv_state: Tensor,
        weight: Tensor,
        bias: Tensor | None = None,
        activation: str | None = None,
        **unused: Any,
    ) -> Tensor:
        reason = _why_not(hidden_states, activation)
        if hidden_states.shape[-1] != 1 or conv_state.shape[-1] != weight.shape[-1]:
            reason = "no step of several tokens, or on a state of another width than the weight"
        if left_to_original(reason):
            return original(hidden_states, conv_state, weight, bias, activation, **unused)  # type: ignore[no-any-return]
        x = hidden_states.squeeze(-1)
        return short_convolution_step(x, conv_state, weight, bias, _silu(activation))[..., None]

    return causal_conv1d_update


class _Call(NamedTuple):
    x: Tensor
    weight: Tensor
    bias: Tensor | None
    activation: str | None
    cu_seqlens: Tensor | None
    seq_idx: Tensor | None


def _call(
    hidden_states: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    activation: str | None = None,
    cu_seq_lens_q: Tensor | None = None,
    seq_idx: Tensor | None = None,
    **unused: Any,
) -> _Call:
    return _Call(hidden_states, weight, bias, activation, cu_seq_lens_q, seq_idx)


def _why_not(x: Tensor, activation: str | None) -> str | None:
    """None, or why the call stays with the original, which on a GPU has kernels of its own."""
    if torch.compiler.is_exporting():
        return "an exported program keeps to torch's own operators"
    if x.device.type != "cpu":
        return f"no convolution for the device {x.device}"
    if activation not in ("silu", "swish", None):
        return f"no convolution with {activation}"
    return None


def _silu(activation: str | None) -> str | None:
    return None if activation is None else "silu"


def _offsets(call: _Call) -> Tensor | None:
    """Where packed sequences start and end among the columns of all rows; columns that a cache put before are the
    first's."""
    B, _, T = call.x.shape
    if call.cu_seqlens is not None:
        offsets = call.cu_seqlens + (T - call.cu_seqlens[-1])
        return torch.cat([torch.zeros_like(offsets[:1]), offsets[1:]])
    if call.seq_idx is None:
        return None
    before = T - call.seq_idx.shape[1]
    index = torch.cat([call.seq_idx[:, :1].expand(-1, before), call.seq_idx], dim=1)
    starts = torch.ones(B, T, dtype=torch.bool, device=index.device)
    starts[:, 1:] = index[:, 1:] != index[:, :-1]
    end = torch.full((1,), B * T, device=index.device)
    return torch.cat([starts.flatten().nonzero()[:, 0], end])
