"""vLLM's functions for the prefill and the decode of gated delta rules."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ... import settings
from ...ops import recurrence as ops
from ...problems.recurrence import check_dense, check_offsets, check_packing, wrong_shape, wrong_type
from ...rules import GATED_DELTA_RULE, KDA, Rule


def chunk_gated_delta_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    cu_seqlens: Tensor | None = None,
    use_qk_l2norm_in_kernel: bool = False,
    state_v_first: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """Prefill by vLLM's name: packed sequences, each from its row of `initial_state`.

    Args:
        q, k: [1,T,H,K] queries and keys.
        v: [1,T,HV,V] values.
        g: [1,T,HV] log decay, at most 0.
        beta: [1,T,HV] factor of the write.
        scale: factor of the output, default K ** -0.5.
        initial_state: [n,HV,K,V] states of any float type, default zero.
        output_final_state: whether the final states are returned.
        cu_seqlens: [n+1] where each sequence starts, default one sequence a row.
        use_qk_l2norm_in_kernel: whether q and k are normalised in the kernel.
        state_v_first: whether states are [n,HV,V,K].

    Returns:
        o [1,T,HV,V], and the final states in the type and layout of `initial_state`, or None.

    Raises:
        TypeError, ValueError: as `sleepkern.gated_delta_rule`.
    """
    options = (scale, initial_state, output_final_state, cu_seqlens, use_qk_l2norm_in_kernel, state_v_first)
    return _chunk(ops.gated_delta_rule, q, k, v, g, beta, *options)


def chunk_kda(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    cu_seqlens: Tensor | None = None,
    use_qk_l2norm_in_kernel: bool = False,
    state_v_first: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """Prefill of Kimi Delta Attention by vLLM's name; g is [1,T,HV,K], all else as in `chunk_gated_delta_rule`."""
    options = (scale, initial_state, output_final_state, cu_seqlens, use_qk_l2norm_in_kernel, state_v_first)
    return _chunk(ops.kda, q, k, v, g, beta, *options)


def fused_recurrent_gated_delta_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    inplace_final_state: bool = True,
    cu_seqlens: Tensor | None = None,
    ssm_state_indices: Tensor | None = None,
    num_accepted_tokens: Tensor | None = None,
    use_qk_l2norm_in_kernel: bool = False,
    state_v_first: bool = False,
    null_block: int = 0,
) -> tuple[Tensor, Tensor]:
    """Decode by vLLM's name, on a pool of states; a draft starts from the state after its last accepted token.

    Args:
        q, k: [1,T,H,K] queries and keys of n packed sequences, or [n,t,H,K].
        v: [1,T,HV,V] values, or [n,t,HV,V].
        g: log decay, at most 0, of one element a head and token.
        beta: factor of the write, of one element a head and token.
        scale: factor of the output, default K ** -0.5.
        initial_state: the pool [rows,HV,K,V], float32 or bfloat16, updated in place.
        inplace_final_state: whether the pool is updated in place; only True is done.
        cu_seqlens: [n+1] where each sequence starts, default one sequence a row.
        ssm_state_indices: [n] row of each sequence; or [n,t]: the state after token j of sequence i goes to row [i,j].
        num_accepted_tokens: [n], with rows [n,t]: sequence i starts from row [i, num_accepted_tokens[i] - 1], default
            from row [i,0].
        use_qk_l2norm_in_kernel: whether q and k are normalised in the kernel.
        state_v_first: whether states are [rows,HV,V,K].
        null_block: rows from 0 up to this one belong to no sequence: they are not read, outputs are 0. vLLM's is 0;
            with -1 only negative rows are padding.

    Returns:
        o in the shape of v, and the pool.

    Raises:
        TypeError, ValueError: as `sleepkern.recurrent_step`, or an option that is not done.
    """
    tokens: dict[str, Any] = {"q": q, "k": k, "v": v, "g": g, "beta": beta}
    rows = (initial_state, inplace_final_state, ssm_state_indices, num_accepted_tokens, null_block)
    return _recurrent(GATED_DELTA_RULE, tokens, cu_seqlens, *rows, scale, use_qk_l2norm_in_kernel, state_v_first)


def fused_recurrent_kda(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    inplace_final_state: bool = True,
    cu_seqlens: Tensor | None = None,
    ssm_state_indices: Tensor | None = None,
    num_accepted_tokens: Tensor | None = None,
    use_qk_l2norm_in_kernel: bool = True,
    state_v_first: bool = False,
    null_block: int = 0,
) -> tuple[Tensor, Tensor]:
    """Decode of Kimi Delta Attention by vLLM's name; g has an element for each key channel.

    All else is as in `fused_recurrent_gated_delta_rule`, but q and k are normalised unless told otherwise.
    """
    tokens: dict[str, Any] = {"q": q, "k": k, "v": v, "g": g, "beta": beta}
    rows = (initial_state, inplace_final_state, ssm_state_indices, num_accepted_tokens, null_block)
    return _recurrent(KDA, tokens, cu_seqlens, *rows, scale, use_qk_l2norm_in_kernel, state_v_first)


def _chunk(
    rule: Any,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    scale: float | None,
    initial_state: Tensor | None,
    output_final_state: bool,
    cu_seqlens: Tensor | None,
    normalize: bool,
    v_first: bool,
) -> tuple[Tensor, Tensor | None]:
    state = initial_state
    if state is not None:
        state = (state.transpose(-1, -2) if v_first else state).to(torch.float32)
    o, final = rule(
        q, k, v, g, beta, scale, state, output_final_state, use_qk_l2norm_in_kernel=normalize, cu_seqlens=cu_seqlens
    )
    if final is not None and v_first:
        final = final.transpose(-1, -2).contiguous()
    return o, final if final is None or initial_state is None else final.to(initial_state.dtype)


def _recurrent(
    rule: Rule,
    tokens: dict[str, Any],
    cu_seqlens: Tensor | None,
    initial_state: Tensor | None,
    inplace_final_state: bool,
    indices: Tensor | None,
    accepted: Tensor | None,
    null_block: int,
    scale: float | None,
    normalize: bool,
    v_first: bool,
) -> tuple[Tensor, Tensor]:
    if inplace_final_state is not True:
        raise ValueError(f"inplace_final_state: got {inplace_final_state!r}; expected True, states stay in the pool")
    if initial_state is None or indices is None:
        name = "initial_state" if initial_state is None else "ssm_state_indices"
        raise ValueError(f"{name}: got None; expected a pool of states and the rows of the sequences")
    _check_rows(indices, accepted)
    pool = initial_state.transpose(-1, -2) if v_first else initial_state
    rows = torch.where(indices > null_block, indices, -1)
    options: dict[str, Any] = {"rule": rule, "scale": scale, "use_qk_l2norm_in_kernel": normalize}
    if rows.dim() == 1:
        o, _ = ops.recurrent_step(**tokens, state=pool, state_indices=rows, cu_seqlens=cu_seqlens, **options)
        return o, initial_state
    n, longest = rows.shape
    last = torch.zeros_like(rows[:, 0]) if accepted is None else accepted.to(rows.dtype) - 1
    start = rows.gather(1, last.clamp(0, longest - 1).long()[:, None])[:, 0]
    if cu_seqlens is None:
        T = tokens["v"].shape[1]
        o, _ = ops.recurrent_step(
            **tokens, state=pool, state_indices=start, states_out=pool, states_out_indices=rows[:, :T], **options
        )
        return o, initial_state
    _check_drafts(cu_seqlens, n, longest, tokens["v"].shape[1])
    if not tokens["v"].numel():
        return torch.empty_like(tokens["v"]), initial_state
    # Drafts of different lengths become rows of the longest; what is beyond the end of one is stored nowhere.
    lengths, at = cu_seqlens.long().diff(), torch.arange(longest, device=rows.device)
    inside = at < lengths.to(rows.device)[:, None]
    positions = (cu_seqlens[:-1].long().to(rows.device)[:, None] + at).clamp_max(tokens["v"].shape[1] - 1)
    padded = {name: t[0, positions] for name, t in tokens.items()}
    written = torch.where(inside, rows, -1)
    o, _ = ops.recurrent_step(
        **padded, state=pool, state_indices=start, states_out=pool, states_out_indices=written, **options
    )
    return o[inside][None], initial_state


def _check_integers(name: str, t: Tensor) -> None:
    check_dense(name, t)
    if t.dtype not in (torch.int32, torch.int64):
        raise wrong_type(name, t, "torch.int32 or torch.int64")


def _check_rows(indices: Tensor, accepted: Tensor | None) -> None:
    """Check types and shapes of the rows of sequences or drafts, and of the numbers of accepted tokens."""
    _check_integers("ssm_state_indices", indices)
    if indices.dim() not in (1, 2) or (indices.dim() == 2 and not indices.shape[1]):
        raise ValueError(f"ssm_state_indices: got shape {list(indices.shape)}; expected [n] or [n,t] with t >= 1")
    if accepted is None:
        return
    _check_integers("num_accepted_tokens", accepted)
    if indices.dim() == 1:
        raise ValueError("num_accepted_tokens: got it with rows [n]; expected ssm_state_indices of [n,t]")
    if accepted.shape != indices.shape[:1]:
        raise wrong_shape("num_accepted_tokens", accepted, tuple(indices.shape[:1]))


def _check_drafts(cu_seqlens: Tensor, n: int, longest: int, T: int) -> None:
    """Check that n drafts of up to `longest` tokens fill T; on a GPU, values are checked with SLEEPKERN_DEBUG=1."""
    check_packing(cu_seqlens, 1)
    if cu_seqlens.shape != (n + 1,):
        raise wrong_shape("cu_seqlens", cu_seqlens, (n + 1,))
    if cu_seqlens.device.type != "cpu" and not settings.DEBUG:
        return
    offsets = cu_seqlens.tolist()
    check_offsets(offsets, T)
    most = max(b - a for a, b in zip(offsets, offsets[1:], strict=False))
    if most > longest:
        raise ValueError(
            f"ssm_state_indices: got rows of {longest} tokens, with a draft of {most}; expected a row for each token"
        )
