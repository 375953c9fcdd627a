"""Rules without delta by fla's names: simple_gla, gla, and with fixed decays retention, lightning, linear attention."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from sleepkern.rules import GLA, SIMPLE_GLA

from .calls import Result, run

Offsets = Tensor | Sequence[int] | None
State = Tensor | tuple[Tensor | None, Tensor | None] | None


def chunk_simple_gla(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None = None,
    g_gamma: Tensor | None = None,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    state_v_first: bool = False,
    cu_seqlens: Offsets = None,
    **options: Any,
) -> Result:
    """g log decay [B,T,H], or g_gamma [H] the same for every token; with neither there is no decay."""
    if g is None:
        g = v.new_zeros(v.shape[:3], dtype=torch.float32)
    if g_gamma is not None:
        g = g + g_gamma
    result: Result = run(
        SIMPLE_GLA, q, k, v, g, None, scale, initial_state, output_final_state, False, state_v_first, cu_seqlens,
        options,
    )  # fmt: skip
    return result


def fused_recurrent_simple_gla(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None = None,
    g_gamma: Tensor | None = None,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    reverse: bool = False,
    state_v_first: bool = False,
    cu_seqlens: Offsets = None,
    **options: Any,
) -> Result:
    """The same as chunk_simple_gla."""
    options["reverse"] = reverse
    return chunk_simple_gla(
        q, k, v, g, g_gamma, scale, initial_state, output_final_state, state_v_first, cu_seqlens, **options
    )


def chunk_gla(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None = None,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    state_v_first: bool = False,
    cu_seqlens: Offsets = None,
    **options: Any,
) -> Result:
    """g log decay [B,T,H,K]; None is no decay."""
    g = k.new_zeros(k.shape, dtype=torch.float32) if g is None else g
    result: Result = run(
        GLA, q, k, v, g, None, scale, initial_state, output_final_state, False, state_v_first, cu_seqlens, options
    )
    return result


def fused_recurrent_gla(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    gk: Tensor | None = None,
    gv: Tensor | None = None,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    reverse: bool = False,
    state_v_first: bool = False,
    cu_seqlens: Offsets = None,
    **options: Any,
) -> Result:
    """The same as chunk_gla, its g by the name gk."""
    options |= {"gv": gv, "reverse": reverse}
    return chunk_gla(q, k, v, gk, scale, initial_state, output_final_state, state_v_first, cu_seqlens, **options)


def fused_chunk_simple_gla(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None = None,
    g_gamma: Tensor | None = None,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    cu_seqlens: Offsets = None,
    **options: Any,
) -> Result:
    """The same as chunk_simple_gla."""
    return chunk_simple_gla(
        q, k, v, g, g_gamma, scale, initial_state, output_final_state, cu_seqlens=cu_seqlens, **options
    )


def parallel_simple_gla(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None = None,
    scale: float | None = None,
    output_attentions: bool = False,
    cu_seqlens: Offsets = None,
    **options: Any,
) -> Result:
    """The same as chunk_simple_gla without states, to (o, None): attention scores are not made, and refused."""
    return chunk_simple_gla(
        q, k, v, g, scale=scale, cu_seqlens=cu_seqlens, output_attentions=output_attentions, **options
    )


def chunk_retention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    cu_seqlens: Offsets = None,
    **options: Any,
) -> Result:
    """Simple GLA with the decay of RetNet (arXiv 2307.08621): head h keeps 1 - 2^(-5-h) of its state a token."""
    g_gamma = (1 - 2.0 ** (-5.0 - torch.arange(q.shape[2], dtype=torch.float32, device=q.device))).log()
    return chunk_simple_gla(
        q, k, v, None, g_gamma, scale, initial_state, output_final_state, cu_seqlens=cu_seqlens, **options
    )


def fused_recurrent_retention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    reverse: bool = False,
    state_v_first: bool = False,
    cu_seqlens: Offsets = None,
    **options: Any,
) -> Result:
    """The same as chunk_retention."""
    options |= {"reverse": reverse, "state_v_first": state_v_first}
    return chunk_retention(q, k, v, scale, initial_state, output_final_state, cu_seqlens, **options)


def parallel_retention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float | None = None,
    output_attentions: bool = False,
    cu_seqlens: Offsets = None,
    **options: Any,
) -> Result:
    """The same as chunk_retention without states, to (o, None): attention scores are not made, and refused."""
    options["output_attentions"] = output_attentions
    return chunk_retention(q, k, v, scale, cu_seqlens=cu_seqlens, **options)


def chunk_lightning_attn(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    layer_idx: int,
    num_layers: int,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    cu_seqlens: Offsets = None,
    **options: Any,
) -> Result:
    """Simple GLA with the decay of Lightning Attention (arXiv 2405.17381): -8 h / H (1 - layer_idx / num_layers)."""
    slope = -8 / q.shape[2] * (1 - layer_idx / num_layers)
    g_gamma = slope * torch.arange(q.shape[2], dtype=torch.float32, device=q.device)
    return chunk_simple_gla(
        q, k, v, None, g_gamma, scale, initial_state, output_final_state, cu_seqlens=cu_seqlens, **options
    )


def fused_recurrent_lightning_attn(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    layer_idx: int,
    num_layers: int,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    reverse: bool = False,
    cu_seqlens: Offsets = None,
    **options: Any,
) -> Result:
    """The same as chunk_lightning_attn."""
    options["reverse"] = reverse
    return chunk_lightning_attn(
        q, k, v, layer_idx, num_layers, scale, initial_state, output_final_state, cu_seqlens, **options
    )


def chunk_linear_attn(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float | None = None,
    initial_state: State = None,
    output_final_state: bool = False,
    normalize: bool = True,
    cu_seqlens: Offsets = None,
    **options: Any,
) -> tuple[Tensor, State]:
    """Linear attention without decay, S_t = S_{t-1} + k_t v_t^T.

    normalize: divides o by scale q . z (plus 1e-10), z the sum of the keys. A state is then (S, z), z [n,1,H,K], in and
    out, and (None, z) comes out unless output_final_state.
    """
    S, z = initial_state if isinstance(initial_state, tuple) else (initial_state, None)
    o, final = chunk_simple_gla(
        q, k, v, None, None, scale, S, output_final_state, cu_seqlens=cu_seqlens, **options
    )  # fmt: skip
    if not normalize:
        return o, final
    # The sum of keys is the state of values that are all 1, and its readout the divisor.
    before = None if z is None else z.transpose(1, 2).transpose(2, 3)
    ones = v.new_ones((*v.shape[:3], 1), dtype=torch.float64 if v.dtype == torch.float64 else torch.float32)
    divisor, keys = chunk_simple_gla(q, k, ones, None, None, scale, before, True, cu_seqlens=cu_seqlens, **options)
    assert keys is not None
    return (o / (divisor + 1e-10)).to(o.dtype), (final, keys.transpose(2, 3).transpose(1, 2))


def fused_recurrent_linear_attn(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float | None = None,
    initial_state: State = None,
    output_final_state: bool = False,
    reverse: bool = False,
    normalize: bool = False,
    cu_seqlens: Offsets = None,
    **options: Any,
) -> tuple[Tensor, State]:
    """The same as chunk_linear_attn."""
    options["reverse"] = reverse
    return chunk_linear_attn(q, k, v, scale, initial_state, output_final_state, normalize, cu_seqlens, **options)


fused_chunk_gla = chunk_gla
fused_chunk_retention = chunk_retention
fused_chunk_linear_attn = chunk_linear_attn
