"""flash-linear-attention's functions, by its names and keyword arguments, over sleepkern's.

    from sleepkern.integrations.fla import chunk_gated_delta_rule, fused_recurrent_gated_delta_rule

    import sleepkern.integrations.fla as kernels
    kernels.register()            # or let fla itself call them, where it lets others in

Importing this needs neither fla nor Triton, so code written for fla runs on a CPU. `chunk_` and `fused_recurrent_` are
the same here: sleepkern chooses by shape. Arguments are those of fla 0.6.0; what tunes its kernels (chunk_size,
chunk_indices, cu_seqlens_cpu, safe_gate, autotune_interval of Jet-Nemotron's copy, ...) is taken and not needed. What
would change the result and is not done here raises a ValueError that names it: gv, reverse, cp_context,
return_intermediate_states.

`register` reaches the functions that fla dispatches: chunk_gated_delta_rule, chunk_kda, fused_recurrent_simple_gla. One
registration serves fla's layers and all models built on them. `sleepkern.patch(model)` reaches all functions of fla
that the files of a model's layers import: of fla's own layers, and of remote code such as Jet-Nemotron's.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

import sleepkern
from sleepkern.rules import DELTA_RULE, GATED_DELTA_RULE, GLA, KDA, SIMPLE_GLA, Rule

from .falling_back import left_to_original, why_not_here

Result = tuple[Tensor, Tensor | None]
_CHANGING = ("gv", "reverse", "cp_context", "return_intermediate_states", "head_first")


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
    cu_seqlens: Tensor | None = None,
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
    g = _head_gate(g, A_log, dt_bias) if use_gate_in_kernel else g
    beta = _strength(beta, use_beta_sigmoid_in_kernel, allow_neg_eigval)
    rule = DELTA_RULE if g is None else GATED_DELTA_RULE
    return _run(
        rule, q, k, v, g, beta, scale, initial_state, output_final_state, use_qk_l2norm_in_kernel, state_v_first,
        cu_seqlens, options,
    )  # fmt: skip


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
    cu_seqlens: Tensor | None = None,
    **options: Any,
) -> Result:
    """As chunk_gated_delta_rule; gk [B,T,HV,K] is a log decay per channel, beside g or alone."""
    if gk is not None:
        if use_gate_in_kernel and g is not None:
            g = _head_gate(g, A_log, dt_bias)
        total = gk if g is None else gk + g[..., None]
        beta = _strength(beta, use_beta_sigmoid_in_kernel, allow_neg_eigval)
        return _run(
            KDA, q, k, v, total, beta, scale, initial_state, output_final_state, use_qk_l2norm_in_kernel,
            state_v_first, cu_seqlens, {**options, "gv": gv},
        )  # fmt: skip
    return chunk_gated_delta_rule(
        q, k, v, g, beta, scale, initial_state, output_final_state, use_qk_l2norm_in_kernel,
        use_beta_sigmoid_in_kernel, allow_neg_eigval, state_v_first, cu_seqlens,
        use_gate_in_kernel=use_gate_in_kernel, A_log=A_log, dt_bias=dt_bias, gv=gv, **options,
    )  # fmt: skip


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
    cu_seqlens: Tensor | None = None,
    *,
    A_log: Tensor | None = None,
    dt_bias: Tensor | None = None,
    **options: Any,
) -> Result:
    """As chunk_gated_delta_rule with g [B,T,HV,K].

    use_gate_in_kernel: the log decay is -exp(A_log) softplus(g + dt_bias), or with lower_bound
    lower_bound sigmoid(exp(A_log) (g + dt_bias)).
    """
    g = _channel_gate(g, A_log, dt_bias, lower_bound) if use_gate_in_kernel else g
    beta_given = _strength(beta, use_beta_sigmoid_in_kernel, allow_neg_eigval)
    return _run(
        KDA, q, k, v, g, beta_given, scale, initial_state, output_final_state, use_qk_l2norm_in_kernel,
        state_v_first, cu_seqlens, {**options, "return_intermediate_states": return_intermediate_states},
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
    cu_seqlens: Tensor | None = None,
    **options: Any,
) -> Result:
    """As chunk_kda."""
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
    cu_seqlens: Tensor | None = None,
    **options: Any,
) -> Result:
    """The delta rule without decay; beta None is 1."""
    return _run(
        DELTA_RULE, q, k, v, None, beta, scale, initial_state, output_final_state, use_qk_l2norm_in_kernel, False,
        cu_seqlens, options,
    )  # fmt: skip


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
    cu_seqlens: Tensor | None = None,
    **options: Any,
) -> Result:
    """g log decay [B,T,H], or g_gamma [H] the same for every token; with neither there is no decay."""
    if g is None:
        g = v.new_zeros(v.shape[:3], dtype=torch.float32)
    if g_gamma is not None:
        g = g + g_gamma
    return _run(
        SIMPLE_GLA, q, k, v, g, None, scale, initial_state, output_final_state, False, state_v_first, cu_seqlens,
        options,
    )  # fmt: skip


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
    cu_seqlens: Tensor | None = None,
    **options: Any,
) -> Result:
    """As chunk_simple_gla."""
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
    cu_seqlens: Tensor | None = None,
    **options: Any,
) -> Result:
    """g log decay [B,T,H,K]; None is no decay."""
    g = k.new_zeros(k.shape, dtype=torch.float32) if g is None else g
    return _run(
        GLA, q, k, v, g, None, scale, initial_state, output_final_state, False, state_v_first, cu_seqlens, options
    )


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
    cu_seqlens: Tensor | None = None,
    **options: Any,
) -> Result:
    """As chunk_gla, its g by the name gk."""
    options |= {"gv": gv, "reverse": reverse}
    return chunk_gla(q, k, v, gk, scale, initial_state, output_final_state, state_v_first, cu_seqlens, **options)


fused_recurrent_delta_rule = chunk_delta_rule


def register() -> None:
    """Let fla call these where it can.

    Calls that are not ours (a device without kernels, arguments not done here) stay fla's.

    Raises:
        ImportError: fla 0.6 or newer is not installed.
    """
    from fla import backends
    from fla.ops.kda import chunk_kda as fla_chunk_kda
    from fla.ops.simple_gla import fused_recurrent_simple_gla as fla_fused_recurrent_simple_gla

    def backend(name: str, function: Callable[..., Result]) -> type:
        members = {
            "backend_type": "sleepkern",
            "priority": -1,
            name: staticmethod(function),
            f"{name}_verifier": staticmethod(_takes),
        }
        return type("SleepkernBackend", (backends.BaseBackend,), members)

    backends.register("gated_delta_rule")(backend("chunk_gated_delta_rule", chunk_gated_delta_rule))
    for theirs, ours in ((fla_chunk_kda, chunk_kda), (fla_fused_recurrent_simple_gla, fused_recurrent_simple_gla)):
        backends.register(theirs)(backend(ours.__name__, ours))


def stands_for(original: Callable[..., Any]) -> Callable[..., Any] | None:
    """Ours for a function of fla.ops, which keeps the calls that are not ours; None where there is none."""
    name = getattr(original, "__name__", "")
    ours = globals().get(name) if name.startswith(("chunk_", "fused_recurrent_")) else None
    if ours is None or not getattr(original, "__module__", "").startswith("fla.ops"):
        return None

    @functools.wraps(original)
    def function(*args: Any, **kwargs: Any) -> Any:
        if left_to_original(_takes(*args, **kwargs)[1]):
            return original(*args, **kwargs)
        return ours(*args, **kwargs)

    return function


def _takes(*args: Any, **kwargs: Any) -> tuple[bool, str | None]:
    """Whether a call is ours, as fla asks."""
    reason = why_not_here(args[0] if args else kwargs["q"])
    for name in _CHANGING:
        if kwargs.get(name):
            reason = reason or f"{name} is not done here"
    return reason is None, reason


def _run(
    rule: Rule,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None,
    beta: Tensor | None,
    scale: float | None,
    initial_state: Tensor | None,
    output_final_state: bool,
    normalize: bool,
    state_v_first: bool,
    cu_seqlens: Tensor | None,
    options: dict[str, Any],
) -> Result:
    for name in _CHANGING:
        if options.get(name) not in (None, False):
            raise ValueError(f"{name}: got {options[name]!r}; sleepkern does not do it, expected None or False")
    v_first = state_v_first or bool(options.get("transpose_state_layout"))
    state = None if initial_state is None else initial_state.float()
    if state is not None and v_first:
        state = state.transpose(-1, -2)
    gates = {} if g is None else {"g": g}
    if rule.delta or beta is not None:
        gates["beta"] = torch.ones_like(v[..., 0]) if beta is None else beta
    o, final = getattr(sleepkern, rule.name)(
        q,
        k,
        v,
        **gates,
        scale=scale,
        initial_state=state,
        output_final_state=output_final_state,
        use_qk_l2norm_in_kernel=normalize,
        cu_seqlens=cu_seqlens,
    )
    if final is not None and v_first:
        final = final.transpose(-1, -2).contiguous()
    return o, final


def _strength(beta: Tensor | None, raw: bool, doubled: bool) -> Tensor | None:
    if beta is None or not raw:
        return beta
    return beta.sigmoid() * 2 if doubled else beta.sigmoid()


def _head_gate(g: Tensor | None, A_log: Tensor | None, dt_bias: Tensor | None) -> Tensor:
    if g is None or A_log is None:
        raise ValueError("A_log: got None; use_gate_in_kernel expects it, and the raw g")
    raw = g.float() if dt_bias is None else g.float() + dt_bias.float()
    return -A_log.float().exp() * F.softplus(raw)


def _channel_gate(g: Tensor, A_log: Tensor | None, dt_bias: Tensor | None, lower_bound: float | None) -> Tensor:
    raw = g.float() if dt_bias is None else g.float() + dt_bias.float().view(g.shape[-2:])
    rate = None if A_log is None else A_log.float().exp().view(-1, 1)
    if lower_bound is not None:
        return lower_bound * torch.sigmoid(raw if rate is None else rate * raw)
    if rate is None:
        raise ValueError("A_log: got None; use_gate_in_kernel without lower_bound expects it")
    return -rate * F.softplus(raw)
