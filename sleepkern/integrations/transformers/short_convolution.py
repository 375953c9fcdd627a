"""The short convolution before a mixer's recurrence, as models of transformers call it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sleepkern.nn import short_convolution, short_convolution_step

from ..call_mapping import replacement
from ..fallback import unsupported_reason
from .packing import SegmentTree, offsets_of, one_row, packed_by
from .recording import record_convolution_step


class _Many(NamedTuple):
    """A call for tokens [B,D,T]: the arguments of the original, in its order, and the names of packed sequences."""

    hidden_states: Tensor
    weight: Tensor
    bias: Tensor | None = None
    activation: str | None = None
    cu_seqlens: Tensor | None = None
    cu_seq_lens_q: Tensor | None = None
    seq_idx: Tensor | None = None


class _One(NamedTuple):
    """A call for x [B,D,1] after the last W inputs [B,D,W], which are shifted in place."""

    hidden_states: Tensor
    conv_state: Tensor
    weight: Tensor
    bias: Tensor | None = None
    activation: str | None = None


def many_tokens(original: Callable[..., Any]) -> Callable[..., Any]:
    """The replacement of causal_conv1d_fn: one pass over memory, and packed sequences are kept apart."""
    return replacement(original, _Many, _why_not, _convolve, packed_by("seq_idx", _size))


def one_token(original: Callable[..., Any]) -> Callable[..., Any]:
    """The replacement of causal_conv1d_update."""
    return replacement(original, _One, _why_no_step, _step)


def _convolve(call: _Many) -> Tensor:
    x, offsets = call.hidden_states.transpose(1, 2), _offsets(call)
    if isinstance(offsets, SegmentTree):
        silu = _silu(call.activation)
        return short_convolution(x, call.weight, call.bias, activation=silu, **offsets.options)[0].transpose(1, 2)
    rows = x if offsets is None else one_row(x)
    y, _ = short_convolution(rows, call.weight, call.bias, activation=_silu(call.activation), cu_seqlens=offsets)
    return y.view(x.shape).transpose(1, 2)


def _step(call: _One) -> Tensor:
    record_convolution_step(call.conv_state, call.hidden_states)
    x = call.hidden_states.squeeze(-1)
    return short_convolution_step(x, call.conv_state, call.weight, call.bias, _silu(call.activation))[..., None]


def _why_not(call: _Many | _One) -> str | None:
    """None, or a sentence why the call goes to the original."""
    if (reason := unsupported_reason(call.hidden_states)) is not None:
        return reason
    if call.activation not in ("silu", "swish", None):
        return f"no convolution with {call.activation}"
    return None


def _why_no_step(call: _One) -> str | None:
    if call.hidden_states.shape[-1] != 1 or call.conv_state.shape[-1] != call.weight.shape[-1]:
        return "no step of several tokens, or on a state of another width than the weight"
    return _why_not(call)


def _silu(activation: str | None) -> str | None:
    return None if activation is None else "silu"


def _size(x: Tensor) -> tuple[int, int]:
    return x.shape[0], x.shape[2]


def _offsets(call: _Many) -> Tensor | SegmentTree | None:
    """Offsets of packed sequences. Columns that a cache put before those of one row belong to the first sequence."""
    B, T = _size(call.hidden_states)
    offsets = offsets_of(B, T, call.cu_seqlens, call.cu_seq_lens_q, call.seq_idx)
    if offsets is None or B > 1 or isinstance(offsets, SegmentTree):
        return offsets
    later = offsets + (T - offsets[-1])
    return torch.cat([torch.zeros_like(later[:1]), later[1:]])
