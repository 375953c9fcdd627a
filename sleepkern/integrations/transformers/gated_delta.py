"""The functions that gated DeltaNet and Kimi Delta Attention models of transformers call, over sleepkern's.

Each is made from the original and looks at every call on its own: what sleepkern does not do goes to the original, with
the reason in the debug log.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sleepkern.ops import recurrence as ops
from sleepkern.rules import GATED_DELTA_RULE, Rule

from ..call_mapping import replacement
from ..fallback import unsupported_reason
from . import recording
from .packing import SegmentTree, offsets_of, one_row, packed_by

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


class _Many(NamedTuple):
    """A call for many tokens: the arguments of the original, in its order, and the names of packed sequences."""

    query: Tensor
    key: Tensor
    value: Tensor
    g: Tensor
    beta: Tensor
    chunk_size: int = 64
    initial_state: Tensor | None = None
    output_final_state: bool = False
    use_qk_l2norm_in_kernel: bool = False
    cu_seqlens: Tensor | None = None
    cu_seq_lens_q: Tensor | None = None
    seq_idx: Tensor | None = None


class _One(NamedTuple):
    """A call for one token: the same arguments without chunk_size."""

    query: Tensor
    key: Tensor
    value: Tensor
    g: Tensor
    beta: Tensor
    initial_state: Tensor | None = None
    output_final_state: bool = False
    use_qk_l2norm_in_kernel: bool = False
    cu_seqlens: Tensor | None = None
    cu_seq_lens_q: Tensor | None = None
    seq_idx: Tensor | None = None


_Call = _Many | _One


def many_tokens(original: Callable[..., Any], rule: Rule = GATED_DELTA_RULE) -> Callable[..., Any]:
    """The replacement of torch_chunk_gated_delta_rule, or with KDA for chunk_kimi_delta_attention."""
    return replacement(original, _Many, _why_not, partial(_ingest, rule), packed_by("cu_seqlens", _size))


def one_token(original: Callable[..., Any], rule: Rule = GATED_DELTA_RULE) -> Callable[..., Any]:
    """The replacement of torch_recurrent_gated_delta_rule, or with KDA for recurrent_kimi_delta_attention."""

    def run(call: _One) -> tuple[Tensor, Tensor | None]:
        return _step(rule, call) if _may_write_state(call) else _ingest(rule, call)

    return replacement(original, _One, _why_not, run, packed_by("cu_seqlens", _size))


def _size(query: Tensor) -> tuple[int, int]:
    return query.shape[0], query.shape[1]


def _ingest(rule: Rule, call: _Call) -> tuple[Tensor, Tensor | None]:
    if (recorder := recording.current()) is not None and call.output_final_state:
        S = None if call.initial_state is None else call.initial_state.to(torch.float32)
        o, state = recorder.run(call.query, _inputs(rule, call), S)
        return o.to(call.query.dtype), state
    offsets = _offsets(call)
    if isinstance(offsets, SegmentTree):
        normalize = call.use_qk_l2norm_in_kernel
        o, state = getattr(ops, rule.name)(*call[:5], use_qk_l2norm_in_kernel=normalize, **offsets.options)
        return o.to(call.query.dtype), state
    inputs = call[:5] if offsets is None else [one_row(x) for x in call[:5]]
    o, state = getattr(ops, rule.name)(
        *inputs,
        initial_state=None if call.initial_state is None else call.initial_state.to(torch.float32),
        output_final_state=call.output_final_state,
        use_qk_l2norm_in_kernel=call.use_qk_l2norm_in_kernel,
        cu_seqlens=offsets,
    )
    o = o if offsets is None else o.view(call.value.shape)
    return o.to(call.query.dtype), state  # another type only under autocast


def _step(rule: Rule, call: _One) -> tuple[Tensor, Tensor | None]:
    assert call.initial_state is not None
    state, normalize = call.initial_state.to(torch.float32), call.use_qk_l2norm_in_kernel
    o, state = ops.recurrent_step(*call[:5], state, rule=rule, use_qk_l2norm_in_kernel=normalize)
    recording.record_step(partial(_inputs, rule, call), state)
    return o.to(call.query.dtype), state


def _inputs(rule: Rule, call: _Call) -> recording.Inputs:
    return recording.Inputs(rule, call.key, call.value, call.g, call.beta, call.use_qk_l2norm_in_kernel)


def _may_write_state(call: _One) -> bool:
    """Tells whether the state may be updated in place, which saves the decode step a copy of it.

    Only for the buffer of a transformers cache: the layer copies the returned state into that very
    buffer next (then a copy onto itself, which torch leaves out). The cache marks its buffers as
    static addresses for the sake of CUDA graphs; a tensor without the mark may still be wanted by
    whoever made it. A cache that rolls back gives up its state without a mark. Nor for gradients,
    which need the old state, in a compiled graph, where the compiler plans the memory, or for a
    state made in inference mode, which outside of it torch lets nobody write to.
    """
    state = call.initial_state
    if torch.compiler.is_compiling() or not call.output_final_state or _offsets(call) is not None:
        return False
    if state is None:
        return False
    if getattr(state, "_dynamo_static_input_type", None) is None and recording.current() is None:
        return False
    if state.is_inference() and not torch.is_inference_mode_enabled():
        return False
    recorded = torch.is_grad_enabled() and any(x.requires_grad for x in (*call[:5], state))
    return not recorded and state.is_contiguous()


def _why_not(call: _Call) -> str | None:
    """None, or a sentence why a call goes to the original."""
    reason = unsupported_reason(call.key)
    if reason is not None:
        return reason
    if call.key.dtype not in _DTYPES:
        return f"a model of {call.key.dtype} keeps a float32 state, which sleepkern does not mix"
    if call.query.dtype != call.key.dtype or call.value.dtype != call.key.dtype:
        return f"query, key and value have the types {call.query.dtype}, {call.key.dtype}, {call.value.dtype}"
    if call.key.numel() == 0:
        return "no tokens"
    if call.output_final_state and isinstance(_offsets(call), SegmentTree):
        return "states of a tree of segments"
    carried = call.initial_state is not None or call.output_final_state
    if carried and call.key.shape[0] > 1 and _packed(call):
        return "states of packed sequences in several rows"
    return None


def _packed(call: _Call) -> bool:
    return call.cu_seqlens is not None or call.cu_seq_lens_q is not None or call.seq_idx is not None


def _offsets(call: _Call) -> Tensor | SegmentTree | None:
    return offsets_of(*_size(call.key), call.cu_seqlens, call.cu_seq_lens_q, call.seq_idx)
