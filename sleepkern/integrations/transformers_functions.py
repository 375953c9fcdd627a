"""The functions that gated DeltaNet models of transformers call, over sleepkern's.

Each is made from the original and looks at every call on its own: what sleepkern does not do goes
to the original, with the reason in the debug log.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

import sleepkern
from sleepkern.backends import triton

logger = logging.getLogger(__name__)

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


class _Call(NamedTuple):
    """One call of a model under sleepkern's names; what else models pass is dropped."""

    q: Tensor
    k: Tensor
    v: Tensor
    g: Tensor
    beta: Tensor
    initial_state: Tensor | None
    output_final_state: bool
    use_qk_l2norm_in_kernel: bool
    cu_seqlens: Tensor | None
    seq_idx: Tensor | None


def _chunk_call(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    g: Tensor,
    beta: Tensor,
    chunk_size: int = 64,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    use_qk_l2norm_in_kernel: bool = False,
    cu_seqlens: Tensor | None = None,
    seq_idx: Tensor | None = None,
    **unused: Any,
) -> _Call:
    if initial_state is not None:
        initial_state = initial_state.to(torch.float32)
    options = (output_final_state, use_qk_l2norm_in_kernel, cu_seqlens, seq_idx)
    return _Call(query, key, value, g, beta, initial_state, *options)


def _step_call(query: Tensor, key: Tensor, value: Tensor, g: Tensor, beta: Tensor, *rest: Any, **named: Any) -> _Call:
    """The same without chunk_size."""
    return _chunk_call(query, key, value, g, beta, 64, *rest, **named)


def many_tokens(original: Callable[..., Any]) -> Callable[..., Any]:
    """Stands for torch_chunk_gated_delta_rule."""

    @functools.wraps(original)
    def chunk_gated_delta_rule(*args: Any, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
        call = _chunk_call(*args, **kwargs)
        if _left_to_original(call):
            return original(*args, **kwargs)  # type: ignore[no-any-return]
        return _ingest(call)

    return chunk_gated_delta_rule


def one_token(original: Callable[..., Any]) -> Callable[..., Any]:
    """Stands for torch_recurrent_gated_delta_rule."""

    @functools.wraps(original)
    def recurrent_gated_delta_rule(*args: Any, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
        call = _step_call(*args, **kwargs)
        if _left_to_original(call):
            return original(*args, **kwargs)  # type: ignore[no-any-return]
        return _step(call) if _may_write_state(call) else _ingest(call)

    return recurrent_gated_delta_rule


def _ingest(call: _Call) -> tuple[Tensor, Tensor | None]:
    o, state = sleepkern.gated_delta_rule(
        *call[:5],
        initial_state=call.initial_state,
        output_final_state=call.output_final_state,
        use_qk_l2norm_in_kernel=call.use_qk_l2norm_in_kernel,
        cu_seqlens=call.cu_seqlens,
    )
    return o.to(call.q.dtype), state  # another type only under autocast


def _step(call: _Call) -> tuple[Tensor, Tensor | None]:
    assert call.initial_state is not None
    normalize = call.use_qk_l2norm_in_kernel
    o, state = sleepkern.recurrent_step(*call[:5], call.initial_state, use_qk_l2norm_in_kernel=normalize)
    return o.to(call.q.dtype), state


def _may_write_state(call: _Call) -> bool:
    """Whether the state may be updated where it lies, which saves the decode step a copy of it.

    Only for the buffer of a transformers cache: the layer copies the returned state into that very
    buffer next (then a copy onto itself, which torch leaves out). The cache marks its buffers as
    static addresses for the sake of CUDA graphs; a tensor without the mark may still be wanted by
    whoever made it. Nor for gradients, which need the old state, or in a compiled graph, where the
    compiler plans the memory.
    """
    state = call.initial_state
    if torch.compiler.is_compiling() or not call.output_final_state or call.cu_seqlens is not None:
        return False
    if state is None or getattr(state, "_dynamo_static_input_type", None) is None:
        return False
    recorded = torch.is_grad_enabled() and any(x.requires_grad for x in (*call[:5], state))
    return not recorded and state.is_contiguous()


def _left_to_original(call: _Call) -> bool:
    reason = _why_not(call)
    if reason is not None and not torch.compiler.is_compiling():
        logger.debug("left to the original function: %s", reason)
    return reason is not None


def _why_not(call: _Call) -> str | None:
    """None, or the sentence why a call is left to the function that was there before."""
    if torch.compiler.is_exporting():
        return "an exported program keeps to torch's own operators"
    if call.k.dtype not in _DTYPES:
        return f"a model of {call.k.dtype} keeps a float32 state, which sleepkern does not mix"
    if call.q.dtype != call.k.dtype or call.v.dtype != call.k.dtype:
        return f"query, key and value have the types {call.q.dtype}, {call.k.dtype}, {call.v.dtype}"
    if not _has_kernel(call.k.device.type):
        return f"no kernel for the device {call.k.device}"
    if call.k.numel() == 0:
        return "no tokens"
    if call.seq_idx is not None and call.cu_seqlens is None:
        return "packed sequences are told apart by cu_seq_lens_q, only seq_idx was given"
    return None


def _has_kernel(device: str) -> bool:
    """Whether there are kernels for a type of device; the portable backends would slow a GPU model."""
    return device == "cpu" or triton.why_not_on(device) is None


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
