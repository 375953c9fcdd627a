"""Step 1 of a call, PUBLIC: the rules that only add to a state that decays."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, overload

from torch import Tensor
from typing_extensions import Unpack

from ..rules import GLA, SIMPLE_GLA
from .one_pass import Along, GatedRuleOptions, one_pass


@overload
def simple_gla(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor | None = None,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    use_qk_l2norm_in_kernel: bool = False,
    cu_seqlens: Tensor | None = None,
    backend: str | None = None,
    use_gate_in_kernel: bool = False,
    A_log: Tensor | None = None,
    dt_bias: Tensor | None = None,
    use_beta_sigmoid_in_kernel: bool = False,
    allow_neg_eigval: bool = False,
    lower_bound: float | None = None,
    state_every: None = None,
    state_indices: Tensor | None = None,
    output_state_indices: Tensor | None = None,
    parents: Tensor | Sequence[int] | None = None,
) -> tuple[Tensor, Tensor | None]: ...


@overload
def simple_gla(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor | None = None,
    *,
    state_every: int,
    **options: Unpack[GatedRuleOptions],
) -> tuple[Tensor, Tensor | None, Tensor]: ...


def simple_gla(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor | None = None,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    use_qk_l2norm_in_kernel: bool = False,
    cu_seqlens: Tensor | None = None,
    backend: str | None = None,
    use_gate_in_kernel: bool = False,
    A_log: Tensor | None = None,
    dt_bias: Tensor | None = None,
    use_beta_sigmoid_in_kernel: bool = False,
    allow_neg_eigval: bool = False,
    lower_bound: float | None = None,
    state_every: int | None = None,
    state_indices: Tensor | None = None,
    output_state_indices: Tensor | None = None,
    parents: Tensor | Sequence[int] | None = None,
) -> Any:
    """Linear attention with a decay for each head; also called `ssd`.

        S_t = a S_(t-1) + b k v^T,   a = exp(g);   o_t = scale S_t^T q

    Source: the state space duality of Mamba-2, arXiv 2405.21060, where b is the step size.

    Args:
        q: [B,T,H,K] queries: float32, bfloat16, float16 or float64, one type for q, k and v, with any strides.
        k: [B,T,H,K] keys.
        v: [B,T,HV,V] values; HV is a multiple of H, and value head j reads key head j // (HV // H).
        g: [B,T,HV] log decay, at most 0, of any float type.
        beta: [B,T,HV] factor of the write, of any float type, default 1.
        scale: factor of the output, default K ** -0.5.
        initial_state: [n,HV,K,V] state before the first token, default zero: float32, or float64 for float64 inputs; n
            is B, or the number of packed sequences. With state_indices: the pool.
        output_final_state: whether the state after the last token is returned.
        use_qk_l2norm_in_kernel: use q / |q| and k / |k|, with 1e-6 added under the root; on a GPU for lengths below
            1e19.
        cu_seqlens: [n+1] int32 or int64, where each of n sequences in one row (B = 1) starts, and the end of the last;
            each has a state of its own. Default: one sequence a row.
        backend: "cuda", "cpu", "triton", "chunked" or "reference", default the first of these that can;
            `sleepkern.explain` says which.
        use_gate_in_kernel: whether g is raw, of any sign: the log decay is -exp(A_log) softplus(g + dt_bias).
        A_log: [HV] logarithm of each value head's rate, of any float type, where g is raw; None for rates of 1, which
            only lower_bound allows.
        dt_bias: [HV] added to a raw g, of any float type, default 0.
        use_beta_sigmoid_in_kernel: whether beta is raw, of any sign: the factor is sigmoid(beta).
        allow_neg_eigval: whether a raw beta's factor is 2 sigmoid(beta), with which a transition may have negative
            eigenvalues.
        lower_bound: makes a raw g the log decay lower_bound sigmoid(exp(A_log) (g + dt_bias)); a number below 0.
        state_every: n returns the states after every n tokens too; a multiple of 16 for the fast backends, any n of at
            least 1 for "reference". In torch.compile, packed sequences with it break the graph.
        state_indices: [n] int32 or int64: sequence i starts from row state_indices[i] of `initial_state`, a pool of
            states [rows,HV,K,V] of float32 or bfloat16, and from zero where the index is negative. The pool is updated
            in place and returned. Rows may repeat where output_state_indices is given. Not differentiable.
        output_state_indices: [n] rows that the final states are written to, each at most once, default state_indices;
            nothing is written for a negative one.
        parents: [n] integers, with cu_seqlens: segment i goes on from where segment parents[i] < i ended, or for -1
            from its row of `initial_state`, which has one row for each -1, or from zero.

    Returns:
        o [B,T,HV,V] in the type of v, and the final state [n,HV,K,V], or None without output_final_state. With
        state_every also the states along the way [B,ceil(T/n),HV,K,V], states[:, i] after token min((i+1) n, T); those
        of packed sequences follow each other with B = 1, as `state_offsets` says. Sums and states are float32, or
        float64 for float64 inputs. All results are differentiable in every tensor.

    Raises:
        TypeError: an argument of another type.
        ValueError: a shape, device, offset or option that does not fit, a log decay above 0 (on a GPU with
            SLEEPKERN_DEBUG=1), or a backend that cannot do this call. No kernel has run then.
    """
    x = (q, k, v, g, beta, initial_state, cu_seqlens)
    gates = (use_gate_in_kernel, A_log, dt_bias, use_beta_sigmoid_in_kernel, allow_neg_eigval, lower_bound)
    along = Along(state_every, state_indices, output_state_indices, parents)
    return one_pass(SIMPLE_GLA, x, scale, use_qk_l2norm_in_kernel, output_final_state, backend, gates, along)


@overload
def gla(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor | None = None,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    use_qk_l2norm_in_kernel: bool = False,
    cu_seqlens: Tensor | None = None,
    backend: str | None = None,
    use_gate_in_kernel: bool = False,
    A_log: Tensor | None = None,
    dt_bias: Tensor | None = None,
    use_beta_sigmoid_in_kernel: bool = False,
    allow_neg_eigval: bool = False,
    lower_bound: float | None = None,
    state_every: None = None,
    state_indices: Tensor | None = None,
    output_state_indices: Tensor | None = None,
    parents: Tensor | Sequence[int] | None = None,
) -> tuple[Tensor, Tensor | None]: ...


@overload
def gla(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor | None = None,
    *,
    state_every: int,
    **options: Unpack[GatedRuleOptions],
) -> tuple[Tensor, Tensor | None, Tensor]: ...


def gla(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor | None = None,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    use_qk_l2norm_in_kernel: bool = False,
    cu_seqlens: Tensor | None = None,
    backend: str | None = None,
    use_gate_in_kernel: bool = False,
    A_log: Tensor | None = None,
    dt_bias: Tensor | None = None,
    use_beta_sigmoid_in_kernel: bool = False,
    allow_neg_eigval: bool = False,
    lower_bound: float | None = None,
    state_every: int | None = None,
    state_indices: Tensor | None = None,
    output_state_indices: Tensor | None = None,
    parents: Tensor | Sequence[int] | None = None,
) -> Any:
    """Gated linear attention: a decay for each key channel.

        S_t = diag(a) S_(t-1) + b k v^T,   a = exp(g);   o_t = scale S_t^T q

    Source: gated linear attention, arXiv 2312.06635, equation 3.

    Args:
        q: [B,T,H,K] queries: float32, bfloat16, float16 or float64, one type for q, k and v, with any strides.
        k: [B,T,H,K] keys.
        v: [B,T,HV,V] values; HV is a multiple of H, and value head j reads key head j // (HV // H).
        g: [B,T,HV,K] log decay, at most 0, of any float type.
        beta: [B,T,HV] factor of the write, of any float type, default 1.
        scale: factor of the output, default K ** -0.5.
        initial_state: [n,HV,K,V] state before the first token, default zero: float32, or float64 for float64 inputs; n
            is B, or the number of packed sequences. With state_indices: the pool.
        output_final_state: whether the state after the last token is returned.
        use_qk_l2norm_in_kernel: use q / |q| and k / |k|, with 1e-6 added under the root; on a GPU for lengths below
            1e19.
        cu_seqlens: [n+1] int32 or int64, where each of n sequences in one row (B = 1) starts, and the end of the last;
            each has a state of its own. Default: one sequence a row.
        backend: "cuda", "cpu", "triton", "chunked" or "reference", default the first of these that can;
            `sleepkern.explain` says which.
        use_gate_in_kernel: whether g is raw, of any sign: the log decay is -exp(A_log) softplus(g + dt_bias).
        A_log: [HV] logarithm of each value head's rate, of any float type, where g is raw; None for rates of 1, which
            only lower_bound allows.
        dt_bias: [HV,K] or [HV*K] added to a raw g, of any float type, default 0.
        use_beta_sigmoid_in_kernel: whether beta is raw, of any sign: the factor is sigmoid(beta).
        allow_neg_eigval: whether a raw beta's factor is 2 sigmoid(beta), with which a transition may have negative
            eigenvalues.
        lower_bound: makes a raw g the log decay lower_bound sigmoid(exp(A_log) (g + dt_bias)); a number below 0.
        state_every: n returns the states after every n tokens too; a multiple of 16 for the fast backends, any n of at
            least 1 for "reference". In torch.compile, packed sequences with it break the graph.
        state_indices: [n] int32 or int64: sequence i starts from row state_indices[i] of `initial_state`, a pool of
            states [rows,HV,K,V] of float32 or bfloat16, and from zero where the index is negative. The pool is updated
            in place and returned. Rows may repeat where output_state_indices is given. Not differentiable.
        output_state_indices: [n] rows that the final states are written to, each at most once, default state_indices;
            nothing is written for a negative one.
        parents: [n] integers, with cu_seqlens: segment i goes on from where segment parents[i] < i ended, or for -1
            from its row of `initial_state`, which has one row for each -1, or from zero.

    Returns:
        o [B,T,HV,V] in the type of v, and the final state [n,HV,K,V], or None without output_final_state. With
        state_every also the states along the way [B,ceil(T/n),HV,K,V], states[:, i] after token min((i+1) n, T); those
        of packed sequences follow each other with B = 1, as `state_offsets` says. Sums and states are float32, or
        float64 for float64 inputs. All results are differentiable in every tensor.

    Raises:
        TypeError: an argument of another type.
        ValueError: a shape, device, offset or option that does not fit, a log decay above 0 (on a GPU with
            SLEEPKERN_DEBUG=1), or a backend that cannot do this call. No kernel has run then.
    """
    x = (q, k, v, g, beta, initial_state, cu_seqlens)
    gates = (use_gate_in_kernel, A_log, dt_bias, use_beta_sigmoid_in_kernel, allow_neg_eigval, lower_bound)
    along = Along(state_every, state_indices, output_state_indices, parents)
    return one_pass(GLA, x, scale, use_qk_l2norm_in_kernel, output_final_state, backend, gates, along)


ssd = simple_gla
