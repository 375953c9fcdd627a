"""Step 1 of a call, PUBLIC: one function for each rule. The decode step is in decode.py, looped ingestion in replay.py.

Every function ends in `call.apply`: check, choose, apply. Layouts and names are the field's (flash-linear-attention).

Products of bfloat16 inputs take bfloat16 operands on a GPU, and on processors that multiply it in one instruction where
the rule decays by head and their errors do not add up; elsewhere float32 ones (`explain` says which).

All functions are differentiable in every tensor, in reverse mode; gradients that are differentiated again
(create_graph=True) are made by torch's operators, which is slower. So are calls under transforms of torch.func that
differentiate in reverse mode (grad, vjp, jacrev, hessian, vmap of these), whatever `backend` says; forward mode alone
(jvp, jacfwd) is refused. All run under torch.compile(fullgraph=True), torch.export with any dimension open, and
autocast. All raise ValueError or TypeError, which name the argument, what it got and what it expects, before any kernel
runs.
"""

from __future__ import annotations

from torch import Tensor

from ..rules import DELTA_RULE, GATED_DELTA_RULE, GLA, KDA, SIMPLE_GLA
from .call import explain, one_pass, run
from .decode import recurrent_step
from .replay import SleepResult, sleep_ingest

__all__ = [
    "SleepResult",
    "delta_rule",
    "explain",
    "gated_delta_rule",
    "gla",
    "kda",
    "recurrent_step",
    "run",
    "simple_gla",
    "sleep_ingest",
    "ssd",
]


def gated_delta_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
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
) -> tuple[Tensor, Tensor | None]:
    """Gated delta rule: a decay for each head, and writes that first erase along k.

        S_t = (I - b k k^T) a S_(t-1) + b k v^T,   a = exp(g);   o_t = scale S_t^T q

    Source: Gated DeltaNet, arXiv 2412.06464, equation 10.

    Args:
        q: [B,T,H,K] queries: float32, bfloat16, float16 or float64, one type for q, k and v, with any strides.
        k: [B,T,H,K] keys.
        v: [B,T,HV,V] values; HV is a multiple of H, and value head j reads key head j // (HV // H).
        g: [B,T,HV] log decay, at most 0, of any float type.
        beta: [B,T,HV] factor of the write, of any float type; the rule is stable for 0 <= beta |k|^2 <= 2.
        scale: factor of the output, default K ** -0.5.
        initial_state: [n,HV,K,V] state before the first token, default zero: float32, or float64 for float64 inputs; n
            is B, or the number of packed sequences.
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

    Returns:
        o [B,T,HV,V] in the type of v, and the final state [n,HV,K,V], or None without output_final_state. Sums and
        states are float32, or float64 for float64 inputs. Both results are differentiable in every tensor.

    Raises:
        TypeError: an argument of another type.
        ValueError: a shape, device, offset or option that does not fit, a log decay above 0 (on a GPU with
            SLEEPKERN_DEBUG=1), or a backend that cannot do this call. No kernel has run then.
    """
    x = (q, k, v, g, beta, initial_state, cu_seqlens)
    gates = (use_gate_in_kernel, A_log, dt_bias, use_beta_sigmoid_in_kernel, allow_neg_eigval, lower_bound)
    return one_pass(GATED_DELTA_RULE, x, scale, use_qk_l2norm_in_kernel, output_final_state, backend, gates)


def kda(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
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
) -> tuple[Tensor, Tensor | None]:
    """Kimi Delta Attention: a decay for each key channel, and writes that first erase along k.

        S_t = (I - b k k^T) diag(a) S_(t-1) + b k v^T,   a = exp(g);   o_t = scale S_t^T q

    Source: Kimi Linear, arXiv 2510.26692, equation 1.

    Args:
        q: [B,T,H,K] queries: float32, bfloat16, float16 or float64, one type for q, k and v, with any strides.
        k: [B,T,H,K] keys.
        v: [B,T,HV,V] values; HV is a multiple of H, and value head j reads key head j // (HV // H).
        g: [B,T,HV,K] log decay, at most 0, of any float type.
        beta: [B,T,HV] factor of the write, of any float type; the rule is stable for 0 <= beta |k|^2 <= 2.
        scale: factor of the output, default K ** -0.5.
        initial_state: [n,HV,K,V] state before the first token, default zero: float32, or float64 for float64 inputs; n
            is B, or the number of packed sequences.
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

    Returns:
        o [B,T,HV,V] in the type of v, and the final state [n,HV,K,V], or None without output_final_state. Sums and
        states are float32, or float64 for float64 inputs. Both results are differentiable in every tensor.

    Raises:
        TypeError: an argument of another type.
        ValueError: a shape, device, offset or option that does not fit, a log decay above 0 (on a GPU with
            SLEEPKERN_DEBUG=1), or a backend that cannot do this call. No kernel has run then.
    """
    x = (q, k, v, g, beta, initial_state, cu_seqlens)
    gates = (use_gate_in_kernel, A_log, dt_bias, use_beta_sigmoid_in_kernel, allow_neg_eigval, lower_bound)
    return one_pass(KDA, x, scale, use_qk_l2norm_in_kernel, output_final_state, backend, gates)


def delta_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    use_qk_l2norm_in_kernel: bool = False,
    cu_seqlens: Tensor | None = None,
    backend: str | None = None,
    use_beta_sigmoid_in_kernel: bool = False,
    allow_neg_eigval: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """Delta rule: no decay, and writes that first erase along k.

        S_t = (I - b k k^T) S_(t-1) + b k v^T;   o_t = scale S_t^T q

    Source: DeltaNet, arXiv 2406.06484, section 2.2.

    Args:
        q: [B,T,H,K] queries: float32, bfloat16, float16 or float64, one type for q, k and v, with any strides.
        k: [B,T,H,K] keys.
        v: [B,T,HV,V] values; HV is a multiple of H, and value head j reads key head j // (HV // H).
        beta: [B,T,HV] factor of the write, of any float type; the rule is stable for 0 <= beta |k|^2 <= 2.
        scale: factor of the output, default K ** -0.5.
        initial_state: [n,HV,K,V] state before the first token, default zero: float32, or float64 for float64 inputs; n
            is B, or the number of packed sequences.
        output_final_state: whether the state after the last token is returned.
        use_qk_l2norm_in_kernel: use q / |q| and k / |k|, with 1e-6 added under the root; on a GPU for lengths below
            1e19.
        cu_seqlens: [n+1] int32 or int64, where each of n sequences in one row (B = 1) starts, and the end of the last;
            each has a state of its own. Default: one sequence a row.
        backend: "cuda", "cpu", "triton", "chunked" or "reference", default the first of these that can;
            `sleepkern.explain` says which.
        use_beta_sigmoid_in_kernel: whether beta is raw, of any sign: the factor is sigmoid(beta).
        allow_neg_eigval: whether a raw beta's factor is 2 sigmoid(beta), with which a transition may have negative
            eigenvalues.

    Returns:
        o [B,T,HV,V] in the type of v, and the final state [n,HV,K,V], or None without output_final_state. Sums and
        states are float32, or float64 for float64 inputs. Both results are differentiable in every tensor.

    Raises:
        TypeError: an argument of another type.
        ValueError: a shape, device, offset or option that does not fit, a log decay above 0 (on a GPU with
            SLEEPKERN_DEBUG=1), or a backend that cannot do this call. No kernel has run then.
    """
    x = (q, k, v, None, beta, initial_state, cu_seqlens)
    gates = (False, None, None, use_beta_sigmoid_in_kernel, allow_neg_eigval, None)
    return one_pass(DELTA_RULE, x, scale, use_qk_l2norm_in_kernel, output_final_state, backend, gates)


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
) -> tuple[Tensor, Tensor | None]:
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
            is B, or the number of packed sequences.
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

    Returns:
        o [B,T,HV,V] in the type of v, and the final state [n,HV,K,V], or None without output_final_state. Sums and
        states are float32, or float64 for float64 inputs. Both results are differentiable in every tensor.

    Raises:
        TypeError: an argument of another type.
        ValueError: a shape, device, offset or option that does not fit, a log decay above 0 (on a GPU with
            SLEEPKERN_DEBUG=1), or a backend that cannot do this call. No kernel has run then.
    """
    x = (q, k, v, g, beta, initial_state, cu_seqlens)
    gates = (use_gate_in_kernel, A_log, dt_bias, use_beta_sigmoid_in_kernel, allow_neg_eigval, lower_bound)
    return one_pass(SIMPLE_GLA, x, scale, use_qk_l2norm_in_kernel, output_final_state, backend, gates)


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
) -> tuple[Tensor, Tensor | None]:
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
            is B, or the number of packed sequences.
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

    Returns:
        o [B,T,HV,V] in the type of v, and the final state [n,HV,K,V], or None without output_final_state. Sums and
        states are float32, or float64 for float64 inputs. Both results are differentiable in every tensor.

    Raises:
        TypeError: an argument of another type.
        ValueError: a shape, device, offset or option that does not fit, a log decay above 0 (on a GPU with
            SLEEPKERN_DEBUG=1), or a backend that cannot do this call. No kernel has run then.
    """
    x = (q, k, v, g, beta, initial_state, cu_seqlens)
    gates = (use_gate_in_kernel, A_log, dt_bias, use_beta_sigmoid_in_kernel, allow_neg_eigval, lower_bound)
    return one_pass(GLA, x, scale, use_qk_l2norm_in_kernel, output_final_state, backend, gates)


ssd = simple_gla
