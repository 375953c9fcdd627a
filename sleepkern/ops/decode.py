"""Step 1 of a call, PUBLIC: a few tokens on a state that is updated in place."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import transforms
from ..addresses import check_memory
from ..autograd import gated, steps
from ..autograd import recurrence as autograd
from ..eager import untraced
from ..problems.gates import RawGates
from ..problems.pools import check_indices, check_pool
from ..problems.recurrence import Tensors, check, check_dense, check_flag
from ..rules import GATED_DELTA_RULE, Rule, rule_named
from . import fast_path
from .call import cast, raw_gates
from .decode_states import initial_states, special_step
from .known_calls import check_and_choose, engine_for


def recurrent_step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None,
    beta: Tensor | None,
    state: Tensor,
    rule: Rule | str = GATED_DELTA_RULE,
    inplace: bool = True,
    scale: float | None = None,
    use_qk_l2norm_in_kernel: bool = False,
    backend: str | None = None,
    state_indices: Tensor | None = None,
    use_gate_in_kernel: bool = False,
    A_log: Tensor | None = None,
    dt_bias: Tensor | None = None,
    use_beta_sigmoid_in_kernel: bool = False,
    allow_neg_eigval: bool = False,
    lower_bound: float | None = None,
    cu_seqlens: Tensor | None = None,
    states_out: Tensor | None = None,
    states_out_indices: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Decode: a few tokens of any rule, on a state that is updated in place.

        S_t = (I - b k k^T)^[delta] diag(a) S_(t-1) + b k v^T,   a = exp(g);   o_t = scale S_t^T q

    Args:
        q: [B,T,H,K] queries: float32, bfloat16, float16 or float64, one type for q, k and v; T is usually 1.
        k: [B,T,H,K] keys.
        v: [B,T,HV,V] values; HV is a multiple of H, and value head j reads key head j // (HV // H).
        g: log decay, at most 0, of any float type: [B,T,HV], [B,T,HV,K] where the rule decays by key channel, None
            where it does not decay.
        beta: [B,T,HV] factor of the write, of any float type; None for 1, where the rule has no delta.
        state: [B,HV,K,V] float32 or bfloat16, or float64 for float64 inputs; or a pool [n,HV,K,V] of states, of which
            state_indices name B. A bfloat16 state is computed with in float32, and rounded to nearest once a call.
        rule: one of `sleepkern.rules`, or its name: "gated_delta_rule", "kda", "delta_rule", "simple_gla" or "gla".
        inplace: whether `state` itself is updated and returned; else it stays as it is, and a new state is returned.
        scale: factor of the output, default K ** -0.5.
        use_qk_l2norm_in_kernel: use q / |q| and k / |k|, with 1e-6 added under the root; on a GPU for lengths below
            1e19.
        backend: "cuda", "cpu", "triton", "chunked" or "reference", default the first of these that can;
            `sleepkern.explain` says which.
        state_indices: [B] int32 or int64: row b goes on from state[state_indices[b]], as serving engines keep states.
            Each index may occur once; a negative one marks a padded row, whose outputs are 0.
        use_gate_in_kernel: whether g is raw, of any sign: the log decay is -exp(A_log) softplus(g + dt_bias).
        A_log: [HV] logarithm of each value head's rate, of any float type, where g is raw; None for rates of 1, which
            only lower_bound allows.
        dt_bias: [HV], or [HV,K] or [HV*K] where the rule decays by key channel, added to a raw g, of any float type,
            default 0.
        use_beta_sigmoid_in_kernel: whether beta is raw, of any sign: the factor is sigmoid(beta).
        allow_neg_eigval: whether a raw beta's factor is 2 sigmoid(beta), with which a transition may have negative
            eigenvalues.
        lower_bound: makes a raw g the log decay lower_bound sigmoid(exp(A_log) (g + dt_bias)); a number below 0.
        cu_seqlens: [m+1] int32 or int64: the tokens are those of m sequences in one row (B = 1), and m takes the place
            of B in `state` and `state_indices`.
        states_out: [B,T,HV,K,V], or with states_out_indices a pool [rows,HV,K,V], of the type of `state`: gets the
            state after each token, and `state` is only read. T is at most 16. Not differentiable.
        states_out_indices: [B,T] int32 or int64: the state after token t of sequence b goes to row [b,t] of this; a
            negative one is not written. The pool may be `state` itself; `commit` then keeps what was accepted.

    Returns:
        o [B,T,HV,V] in the type of v, and the state after the tokens, in the shape of `state`, or `states_out` where it
        is given. Both are differentiable, but for states of a pool with cu_seqlens; where a gradient is wanted, an
        in-place update is recorded as a copy into `state`.

    Raises:
        TypeError: an argument of another type.
        ValueError: a shape, device, index or option that does not fit, a log decay above 0 (on a GPU with
            SLEEPKERN_DEBUG=1), a state that overlaps itself or another argument, or a backend that cannot do this call.
            The state is then as it was.
    """
    if type(rule) is not Rule:
        rule = rule_named(rule)
    gates = raw_gates((use_gate_in_kernel, A_log, dt_bias, use_beta_sigmoid_in_kernel, allow_neg_eigval, lower_bound))
    if cu_seqlens is not None or states_out is not None or states_out_indices is not None:
        x, more = Tensors(q, k, v, g, beta, state, cu_seqlens), (states_out, states_out_indices)
        return special_step(rule, x, state_indices, inplace, scale, use_qk_l2norm_in_kernel, backend, gates, *more)
    if inplace is True and state_indices is None:
        plain = fast_path.step(rule, q, k, v, g, beta, state, scale, use_qk_l2norm_in_kernel, backend, gates)
        if plain is not None:
            return plain, state
    x = Tensors(q, k, v, g, beta, state, None)
    check_flag("inplace", inplace)
    options = (inplace, scale, use_qk_l2norm_in_kernel, backend, gates)
    if state_indices is not None:
        return _step_in_pool(rule, x, state_indices, *options)
    return _step(rule, x, *options)


def _step(
    rule: Rule,
    x: Tensors,
    inplace: bool,
    scale: float | None,
    normalize: bool,
    backend: str | None,
    gates: RawGates | None,
) -> tuple[Tensor, Tensor]:
    """recurrent_step on states of its own."""
    x = cast(x)
    state = check_dense("state", x.state)
    problem, engine = check_and_choose(rule, x, scale, normalize, backend, state_name="state")
    if gates is not None:
        o = gated.step(problem, engine, x, gates) if inplace else None
        if o is not None:
            return o, state
        x = gated.made(problem, x, gates)
    if inplace and not (autograd.wants_grad(x) or transforms.active()):
        return steps.step(problem, engine, x), state
    if inplace:  # what is saved for the gradient must not be the buffer that is about to be overwritten
        steps.check_update(x)
        if untraced(state):
            check_memory(("state",), (state,))
        x = x._replace(state=state.clone())
    if problem.state_bf16:
        problem, x = problem._replace(state_bf16=False), x._replace(state=state.to(torch.float32))
    out = autograd.ingest(problem, engine, x)
    assert out.o is not None
    return out.o, state.copy_(out.state) if inplace else out.state.to(state.dtype)


def _step_in_pool(
    rule: Rule,
    x: Tensors,
    places: Tensor,
    inplace: bool,
    scale: float | None,
    normalize: bool,
    backend: str | None,
    gates: RawGates | None,
) -> tuple[Tensor, Tensor]:
    """recurrent_step on states that lie in a pool."""
    x = cast(x)
    pool = x.state
    problem = check(rule, x._replace(state=None), scale, normalize)
    problem = check_pool(problem, pool)
    check_indices(problem, places, (problem.B,))
    if gates is not None:
        x = gated.made(problem, x, gates)
    assert pool is not None
    if untraced(pool, places):
        check_memory(("state", "state_indices"), (pool, places))
    engine = engine_for(problem, x, backend)
    pool = pool if inplace else pool.clone()
    if not (autograd.wants_grad(x) or transforms.active()):
        return steps.step(problem, engine, x._replace(state=pool), places), pool
    if inplace:
        steps.check_update(x, places)
    present = places >= 0
    out = autograd.ingest(
        problem._replace(state_bf16=False), engine, x._replace(state=initial_states(problem, pool, places))
    )
    assert out.o is not None
    o = torch.where(present[:, None, None, None], out.o, 0)
    return o, pool.index_copy_(0, places[present].long(), out.state[present].to(pool.dtype))
