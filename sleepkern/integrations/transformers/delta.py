"""The functions that gated DeltaNet and Kimi Delta Attention models of transformers call, over sleepkern's.

Each is made from the original and looks at every call on its own: what sleepkern does not do goes to the original, with
the reason in the debug log.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

import sleepkern
from sleepkern.rules import GATED_DELTA_RULE, Rule

from ..falling_back import left_to_original, why_not_here

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


def many_tokens(original: Callable[..., Any], rule: Rule = GATED_DELTA_RULE) -> Callable[..., Any]:
    """Stands for torch_chunk_gated_delta_rule, or with KDA for chunk_kimi_delta_attention."""

    @functools.wraps(original)
    def chunk(*args: Any, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
        call = _chunk_call(*args, **kwargs)
        if left_to_original(_why_not(call)):
            return original(*args, **kwargs)  # type: ignore[no-any-return]
        return _ingest(rule, call)

    return chunk


def one_token(original: Callable[..., Any], rule: Rule = GATED_DELTA_RULE) -> Callable[..., Any]:
    """Stands for torch_recurrent_gated_delta_rule, or with KDA for recurrent_kimi_delta_attention."""

    @functools.wraps(original)
    def recurrent(*args: Any, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
        call = _step_call(*args, **kwargs)
        if left_to_original(_why_not(call)):
            return original(*args, **kwargs)  # type: ignore[no-any-return]
        return _step(rule, call) if _may_write_state(call) else _ingest(rule, call)

    return recurrent


def _ingest(rule: Rule, call: _Call) -> tuple[Tensor, Tensor | None]:
    o, state = getattr(sleepkern, rule.name)(
        *call[:5],
        initial_state=call.initial_state,
        output_final_state=call.output_final_state,
        use_qk_l2norm_in_kernel=call.use_qk_l2norm_in_kernel,
        cu_seqlens=call.cu_seqlens,
    )
    return o.to(call.q.dtype), state  # another type only under autocast


def _step(rule: Rule, call: _Call) -> tuple[Tensor, Tensor | None]:
    assert call.initial_state is not None
    normalize = call.use_qk_l2norm_in_kernel
    o, state = sleepkern.recurrent_step(*call[:5], call.initial_state, rule=rule, use_qk_l2norm_in_kernel=normalize)
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


def _why_not(call: _Call) -> str | None:
    """None, or the sentence why a call is left to the function that was there before."""
    reason = why_not_here(call.k)
    if reason is not None:
        return reason
    if call.k.dtype not in _DTYPES:
        return f"a model of {call.k.dtype} keeps a float32 state, which sleepkern does not mix"
    if call.q.dtype != call.k.dtype or call.v.dtype != call.k.dtype:
        return f"query, key and value have the types {call.q.dtype}, {call.k.dtype}, {call.v.dtype}"
    if call.k.numel() == 0:
        return "no tokens"
    if call.seq_idx is not None and call.cu_seqlens is None:
        return "packed sequences are told apart by cu_seq_lens_q, only seq_idx was given"
    return None
