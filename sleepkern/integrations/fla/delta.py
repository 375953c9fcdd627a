"""The delta rules by fla's names: gated_delta_rule (gdn), kda, delta_rule."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, overload

from torch import Tensor

from sleepkern.rules import DELTA_RULE, GATED_DELTA_RULE, KDA

from .calls import Result, check_options, run
from .gates import beta_of, head_gate, raw_gates

Offsets = Tensor | Sequence[int] | None


def chunk_gated_delta_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None = None,
    beta: Tensor | None = None,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    use_qk_l2norm_in_kernel: bool = False,
    use_beta_sigmoid_in_kernel: bool = False,
    allow_neg_eigval: bool = False,
    state_v_first: bool = False,
    cu_seqlens: Offsets = None,
    *,
    use_gate_in_kernel: bool = False,
    A_log: Tensor | None = None,
    dt_bias: Tensor | None = None,
    **options: Any,
) -> Result:
    """q, k [B,T,H,K], v [B,T,HV,V], g log decay [B,T,HV], beta [B,T,HV], initial_state [n,HV,K,V] to (o, final state).

    use_gate_in_kernel: g is raw, and the log decay -exp(A_log) softplus(g + dt_bias). use_beta_sigmoid_in_kernel:
    beta is raw; with allow_neg_eigval doubled. state_v_first: states are [n,HV,V,K].
    """
    check_options(options, (16, 32, 64))
    raw = raw_gates(g, beta, use_gate_in_kernel, A_log, dt_bias, use_beta_sigmoid_in_kernel, allow_neg_eigval)
    rule = DELTA_RULE if g is None else GATED_DELTA_RULE
    result: Result = run(
        rule, q, k, v, g, beta, scale, initial_state, output_final_state, use_qk_l2norm_in_kernel, state_v_first,
        cu_seqlens, options, raw,
    )  # fmt: skip
    return result


def fused_recurrent_gated_delta_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None = None,
    gk: Tensor | None = None,
    gv: Tensor | None = None,
    beta: Tensor | None = None,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    use_qk_l2norm_in_kernel: bool = False,
    use_gate_in_kernel: bool = False,
    A_log: Tensor | None = None,
    dt_bias: Tensor | None = None,
    use_beta_sigmoid_in_kernel: bool = False,
    allow_neg_eigval: bool = False,
    state_v_first: bool = False,
    cu_seqlens: Offsets = None,
    **options: Any,
) -> Result:
    """The same as chunk_gated_delta_rule; gk [B,T,HV,K] is a log decay per channel, beside g or alone."""
    if gk is not None:
        if use_gate_in_kernel and g is not None:
            g = head_gate(g, A_log, dt_bias)
        total = gk if g is None else gk + g[..., None]
        beta = beta_of(beta, use_beta_sigmoid_in_kernel, allow_neg_eigval)
        result: Result = run(
            KDA, q, k, v, total, beta, scale, initial_state, output_final_state, use_qk_l2norm_in_kernel,
            state_v_first, cu_seqlens, {**options, "gv": gv},
        )  # fmt: skip
        return result
    return chunk_gated_delta_rule(
        q, k, v, g, beta, scale, initial_state, output_final_state, use_qk_l2norm_in_kernel,
        use_beta_sigmoid_in_kernel, allow_neg_eigval, state_v_first, cu_seqlens,
        use_gate_in_kernel=use_gate_in_kernel, A_log=A_log, dt_bias=dt_bias, gv=gv, **options,
    )  # fmt: skip


@overload
def chunk_kda(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    use_qk_l2norm_in_kernel: bool = False,
    use_gate_in_kernel: bool = False,
    use_beta_sigmoid_in_kernel: bool = False,
    allow_neg_eigval: bool = False,
    safe_gate: bool = False,
    lower_bound: float | None = None,
    disable_recompute: bool = False,
    return_intermediate_states: Literal[False] = False,
    state_v_first: bool = False,
    cu_seqlens: Offsets = None,
    *,
    A_log: Tensor | None = None,
    dt_bias: Tensor | None = None,
    **options: Any,
) -> Result: ...


@overload
def chunk_kda(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    *,
    return_intermediate_states: Literal[True],
    **options: Any,
) -> tuple[Tensor, Tensor | None, Tensor]: ...


def chunk_kda(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    use_qk_l2norm_in_kernel: bool = False,
    use_gate_in_kernel: bool = False,
    use_beta_sigmoid_in_kernel: bool = False,
    allow_neg_eigval: bool = False,
    safe_gate: bool = False,
    lower_bound: float | None = None,
    disable_recompute: bool = False,
    return_intermediate_states: bool = False,
    state_v_first: bool = False,
    cu_seqlens: Offsets = None,
    *,
    A_log: Tensor | None = None,
    dt_bias: Tensor | None = None,
    **options: Any,
) -> Any:
    """The same as chunk_gated_delta_rule with g [B,T,HV,K].

    use_gate_in_kernel: the log decay is -exp(A_log) softplus(g + dt_bias), or with lower_bound
    lower_bound sigmoid(exp(A_log) (g + dt_bias)).

    return_intermediate_states: returns a third result, the states before each chunk of chunk_size (default 64) tokens
    [B,chunks,HV,K,V], in the type of k and the layout of the final state; unlike fla's they have gradients.
    """
    check_options(options, (32, 64))
    raw = raw_gates(
        g, beta, use_gate_in_kernel, A_log, dt_bias, use_beta_sigmoid_in_kernel, allow_neg_eigval, lower_bound
    )
    return run(
        KDA, q, k, v, g, beta, scale, initial_state, output_final_state, use_qk_l2norm_in_kernel,
        state_v_first, cu_seqlens, options, raw, return_intermediate_states,
    )  # fmt: skip


def fused_recurrent_kda(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    A_log: Tensor | None = None,
    dt_bias: Tensor | None = None,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    use_qk_l2norm_in_kernel: bool = False,
    use_gate_in_kernel: bool = False,
    use_beta_sigmoid_in_kernel: bool = False,
    allow_neg_eigval: bool = False,
    lower_bound: float | None = None,
    state_v_first: bool = False,
    cu_seqlens: Offsets = None,
    **options: Any,
) -> Result:
    """The same as chunk_kda."""
    return chunk_kda(
        q, k, v, g, beta, scale, initial_state, output_final_state, use_qk_l2norm_in_kernel, use_gate_in_kernel,
        use_beta_sigmoid_in_kernel, allow_neg_eigval, lower_bound=lower_bound, state_v_first=state_v_first,
        cu_seqlens=cu_seqlens, A_log=A_log, dt_bias=dt_bias, **options,
    )  # fmt: skip


def chunk_delta_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor | None = None,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    use_qk_l2norm_in_kernel: bool = False,
    cu_seqlens: Offsets = None,
    **options: Any,
) -> Result:
    """The delta rule without decay; beta None is 1."""
    result: Result = run(
        DELTA_RULE, q, k, v, None, beta, scale, initial_state, output_final_state, use_qk_l2norm_in_kernel, False,
        cu_seqlens, options,
    )  # fmt: skip
    return result


def fused_recurrent_delta_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor | None = None,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    use_qk_l2norm_in_kernel: bool = False,
    cu_seqlens: Offsets = None,
    **options: Any,
) -> Result:
    """The same as chunk_delta_rule."""
    return chunk_delta_rule(
        q, k, v, beta, scale, initial_state, output_final_state, use_qk_l2norm_in_kernel, cu_seqlens, **options
    )


def parallel_delta_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor | None = None,
    scale: float | None = None,
    output_attentions: bool = False,
    **options: Any,
) -> Result:
    """The same as chunk_delta_rule without states, to (o, None): attention scores are not made, and refused."""
    return chunk_delta_rule(q, k, v, beta, scale, output_attentions=output_attentions, **options)


chunk_gdn = chunk_gated_delta_rule
fused_recurrent_gdn = fused_recurrent_gated_delta_rule
fused_chunk_delta_rule = chunk_delta_rule
