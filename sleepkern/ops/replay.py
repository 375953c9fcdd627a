"""Step 1 of a call, PUBLIC: looped ingestion of one window."""

from __future__ import annotations

from functools import partial

from torch import Tensor

from ..problems.recurrence import Tensors
from ..rules import GATED_DELTA_RULE, Rule, rule_named
from . import fast_replay
from .call import SleepResult, raw_gates, run

__all__ = ["SleepResult", "sleep_ingest"]


def sleep_ingest(
    k: Tensor,
    v: Tensor,
    g: Tensor | None = None,
    beta: Tensor | None = None,
    passes: int = 1,
    q: Tensor | None = None,
    initial_state: Tensor | None = None,
    tol: float | None = None,
    method: str = "auto",
    rule: Rule | str = GATED_DELTA_RULE,
    cu_seqlens: Tensor | None = None,
    backend: str | None = None,
    scale: float | None = None,
    use_qk_l2norm_in_kernel: bool = False,
    use_gate_in_kernel: bool = False,
    A_log: Tensor | None = None,
    dt_bias: Tensor | None = None,
    use_beta_sigmoid_in_kernel: bool = False,
    allow_neg_eigval: bool = False,
    lower_bound: float | None = None,
) -> SleepResult:
    """Looped ingestion (replay): `passes` passes over one window, with the state carried from pass to pass.

        S(0) = initial_state;   S(n) = A S(n-1) + B, n = 1..passes

    A and B depend on the window alone, because one pass of the recurrence is affine in the state. The methods use that:

        repeat  plain repetition
        wy      chunk factors once, then `passes` state passes over them (4 T K V flop each)
        affine  A and B once, then S <- A S + B (2 K^2 V flop each, whatever T)
        rank    one chunk, iterated in its T rows (2 T^2 V flop each)
        auto    the cheapest; rules without delta have a closed form and no loop

    Source: arXiv 2605.26099 runs whole blocks N times; with k and v held fixed that is this function.

    Args:
        k: [B,T,H,K] keys: float32, bfloat16, float16 or float64, one type for q, k and v.
        v: [B,T,HV,V] values; HV is a multiple of H, and value head j reads key head j // (HV // H).
        g: log decay, at most 0, of any float type: [B,T,HV], [B,T,HV,K] where the rule decays by key channel, None
            where it does not decay.
        beta: [B,T,HV] factor of the write, of any float type; None for 1, where the rule has no delta.
        passes: the number of passes, at least 1.
        q: [B,T,H,K] queries; with them the outputs of the last pass are returned.
        initial_state: [n,HV,K,V] state before the first token, default zero: float32, or float64 for float64 inputs; n
            is B, or the number of packed sequences.
        tol: stop each head after the pass whose estimated distance to the fixed point, relative to |S|, is at most tol.
            Default: all passes.
        method: "auto", "repeat", "wy", "affine" or "rank"; results differ by rounding alone.
        rule: one of `sleepkern.rules`, or its name: "gated_delta_rule", "kda", "delta_rule", "simple_gla" or "gla".
        cu_seqlens: [n+1] int32 or int64, where each of n sequences in one row (B = 1) starts, and the end of the last;
            each has a state of its own. Default: one sequence a row.
        backend: "cuda", "cpu", "triton", "chunked" or "reference", default the first of these that can;
            `sleepkern.explain` says which.
        scale: factor of the output, default K ** -0.5.
        use_qk_l2norm_in_kernel: use q / |q| and k / |k|, with 1e-6 added under the root; on a GPU for lengths below
            1e19.
        use_gate_in_kernel: whether g is raw, of any sign: the log decay is -exp(A_log) softplus(g + dt_bias).
        A_log: [HV] logarithm of each value head's rate, of any float type, where g is raw; None for rates of 1, which
            only lower_bound allows.
        dt_bias: [HV], or [HV,K] or [HV*K] where the rule decays by key channel, added to a raw g, of any float type,
            default 0.
        use_beta_sigmoid_in_kernel: whether beta is raw, of any sign: the factor is sigmoid(beta).
        allow_neg_eigval: whether a raw beta's factor is 2 sigmoid(beta), with which a transition may have negative
            eigenvalues.
        lower_bound: makes a raw g the log decay lower_bound sigmoid(exp(A_log) (g + dt_bias)); a number below 0.

    Returns:
        A SleepResult: final_state [n,HV,K,V], output [B,T,HV,V] or None without q, passes, residual [n,HV] or None
        without tol, and method. State and output are differentiable in every tensor.

    Raises:
        TypeError: an argument of another type.
        ValueError: a shape, device, offset or option that does not fit, a log decay above 0 (on a GPU with
            SLEEPKERN_DEBUG=1), beta |k|^2 above 2 with more than one pass, which would diverge, or a backend or method
            that cannot do this call.
    """
    gates = raw_gates((use_gate_in_kernel, A_log, dt_bias, use_beta_sigmoid_in_kernel, allow_neg_eigval, lower_bound))
    rule, key = rule_named(rule), None
    if gates is None:
        replay = (passes, tol, method, cu_seqlens, backend, scale, use_qk_l2norm_in_kernel)
        key = fast_replay.key_of(rule, k, v, q, *replay)
        plain = fast_replay.run(key, q, k, v, g, beta, initial_state)
        if plain is not None:
            return plain
    x = Tensors(q, k, v, g, beta, initial_state, cu_seqlens)
    noted = None if key is None else partial(fast_replay.remember, key)
    return run(
        rule, x, scale, use_qk_l2norm_in_kernel, backend, passes, tol, method, outputs=False, gates=gates, noted=noted
    )
