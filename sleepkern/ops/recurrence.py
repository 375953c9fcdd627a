"""Step 1 of a call, PUBLIC: one function per rule, the decode step, and looped ingestion.

Every function ends in `_apply`: check, choose, apply. Layouts and names are the field's (flash-linear-attention):

    q, k   [B,T,H,K]   float32, bfloat16, float16 or float64, one type for q, k, v; last dimension contiguous or not
    v      [B,T,HV,V]  HV a multiple of H: value head j reads key head j // (HV // H)
    g      log decay, <= 0, any float type: [B,T,HV], or [B,T,HV,K] where the gate is per channel
    beta   [B,T,HV]    write strength, any float type; 0..2 keeps the delta rule stable for |k| = 1
    state  [n,HV,K,V]  float32 (float64 for float64 inputs), n = B, or the number of packed sequences

    o, S = rule(q, k, v, ...)   o [B,T,HV,V] in the type of v;  S None unless output_final_state

Options of every rule:

    scale                    factor of the readout, default K ** -0.5
    initial_state            state before the first token, default zero
    output_final_state       return the state after the last token
    use_qk_l2norm_in_kernel  use q / |q| and k / |k| (eps 1e-6 under the root), on a GPU of lengths below 1e19
    cu_seqlens               [n+1] int32 or int64: B = 1 and n sequences laid end to end, one state each
    backend                  name of a backend (see `explain`), default the best that can

Sums and states are float32, float64 for float64 inputs. Products of bfloat16 inputs take bfloat16 operands on a GPU,
and on processors that multiply it in one instruction where the rule decays by head and their errors do not add up;
elsewhere float32 ones (`explain` says which).

All are differentiable in every tensor, in reverse mode; gradients that are differentiated again (create_graph=True) are
made by torch's operators, which is slower. So are calls under transforms of torch.func that differentiate in reverse
mode (grad, vjp, jacrev, hessian, vmap of these), whatever `backend` says; forward mode alone (jvp, jacfwd) is refused.
All run under torch.compile(fullgraph=True), torch.export with any dimension open, and autocast, and raise ValueError or
TypeError naming the argument, what it got and what it expects, before any kernel runs.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import settings, transforms
from ..addresses import check_memory
from ..autograd import recurrence as autograd
from ..backends.interface import Backend
from ..backends.native.views import on_device_of
from ..dispatch import Explanation, choose, explain_problem, method_of, torch_form
from ..eager import untraced
from ..problems.recurrence import Problem, RecurrenceResult, Tensors, check, check_dense, check_flag, check_pool
from ..rules import DELTA_RULE, GATED_DELTA_RULE, GLA, KDA, SIMPLE_GLA, Rule, rule_named
from . import fast_path


class SleepResult(NamedTuple):
    """What `sleep_ingest` returns.

    final_state  [n,HV,K,V] state after the last pass
    output       [B,T,HV,V] outputs of the last pass, None when q was not given
    passes       passes made: an int, or int32 [n,HV] when `tol` let heads stop early
    residual     [n,HV] estimated distance to the fixed point relative to |S|; None without `tol`
    method       how the passes were made; "auto" in a graph that leaves sizes open, which chooses as it runs
    """

    final_state: Tensor
    output: Tensor | None
    passes: int | Tensor
    residual: Tensor | None
    method: str


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
) -> tuple[Tensor, Tensor | None]:
    """S_t = (I - b k k^T) a S + b k v^T, a = exp(g) one number a head; g [B,T,HV], beta [B,T,HV].

    Gated DeltaNet, arXiv 2412.06464, equation 10. Shapes and options: module docstring.
    """
    x = (q, k, v, g, beta, initial_state, cu_seqlens)
    return _one_pass(GATED_DELTA_RULE, x, scale, use_qk_l2norm_in_kernel, output_final_state, backend)


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
) -> tuple[Tensor, Tensor | None]:
    """S_t = (I - b k k^T) diag(a) S + b k v^T, a = exp(g) one number a key channel; g [B,T,HV,K], beta [B,T,HV].

    Kimi Delta Attention, arXiv 2510.26692, equation 1. Shapes and options: module docstring.
    """
    x = (q, k, v, g, beta, initial_state, cu_seqlens)
    return _one_pass(KDA, x, scale, use_qk_l2norm_in_kernel, output_final_state, backend)


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
) -> tuple[Tensor, Tensor | None]:
    """S_t = (I - b k k^T) S + b k v^T; beta [B,T,HV].

    DeltaNet, arXiv 2406.06484, section 2.2. Shapes and options: module docstring.
    """
    x = (q, k, v, None, beta, initial_state, cu_seqlens)
    return _one_pass(DELTA_RULE, x, scale, use_qk_l2norm_in_kernel, output_final_state, backend)


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
) -> tuple[Tensor, Tensor | None]:
    """S_t = a S + b k v^T, a = exp(g) one number a head; g [B,T,HV], beta [B,T,HV] or None for 1.

    Mamba-2's state space duality (arXiv 2405.21060) with b its step size; also called `ssd`. Shapes and options:
    module docstring.
    """
    x = (q, k, v, g, beta, initial_state, cu_seqlens)
    return _one_pass(SIMPLE_GLA, x, scale, use_qk_l2norm_in_kernel, output_final_state, backend)


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
) -> tuple[Tensor, Tensor | None]:
    """S_t = diag(a) S + b k v^T, a = exp(g) one number a key channel; g [B,T,HV,K], beta [B,T,HV] or None for 1.

    Gated linear attention, arXiv 2312.06635, equation 3. Shapes and options: module docstring.
    """
    x = (q, k, v, g, beta, initial_state, cu_seqlens)
    return _one_pass(GLA, x, scale, use_qk_l2norm_in_kernel, output_final_state, backend)


ssd = simple_gla


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
) -> tuple[Tensor, Tensor]:
    """Decode: a few tokens of any rule on a state that is at hand.

    Args:
        state: [B,HV,K,V]; with inplace=True it is updated and returned, with inplace=False left alone.
        state_indices: [B] int32 or int64, where `state` is a pool [n,HV,K,V] as serving engines keep it: row b goes on
            from state[state_indices[b]]. No index may be there twice; a negative one marks a padded row, whose
            outputs are 0.
        rule: one of `sleepkern.rules`, or its name; g or beta None where the rule has none. The rest: module docstring.

    Returns:
        (o [B,T,HV,V], state after the tokens). Differentiable; where a gradient is wanted, an in-place update is
        recorded as a copy into `state`.
    """
    if type(rule) is not Rule:
        rule = rule_named(rule)
    if inplace is True and state_indices is None:
        plain = fast_path.step(rule, q, k, v, g, beta, state, scale, use_qk_l2norm_in_kernel, backend)
        if plain is not None:
            return plain, state
    x = Tensors(q, k, v, g, beta, state, None)
    check_flag("inplace", inplace)
    if state_indices is not None:
        return _step_in_pool(rule, x, state_indices, inplace, scale, use_qk_l2norm_in_kernel, backend)
    x = _cast(x)
    check_dense("state", state)
    problem = check(rule, x, scale, use_qk_l2norm_in_kernel, state_name="state")
    engine = _choose(problem, x, backend)
    if inplace and not (autograd.wants_grad(x) or transforms.active()):
        return autograd.step(problem, engine, x), state
    if inplace:  # what is saved for the gradient must not be the buffer that is about to be overwritten
        autograd.check_update(x)
        if untraced(state):
            check_memory(("state",), (state,))
        x = x._replace(state=state.clone())
    out = autograd.ingest(problem, engine, x)
    assert out.o is not None
    return out.o, state.copy_(out.state) if inplace else out.state


def _step_in_pool(
    rule: Rule, x: Tensors, places: Tensor, inplace: bool, scale: float | None, normalize: bool, backend: str | None
) -> tuple[Tensor, Tensor]:
    """recurrent_step on states that lie in a pool."""
    x = _cast(x)
    pool = x.state
    problem = check(rule, x._replace(state=None), scale, normalize)
    check_pool(problem, pool, places)
    assert pool is not None
    if untraced(pool, places):
        check_memory(("state", "state_indices"), (pool, places))
    engine = _choose(problem, x, backend)
    pool = pool if inplace else pool.clone()
    if not (autograd.wants_grad(x) or transforms.active()):
        return autograd.step(problem, engine, x._replace(state=pool), places), pool
    if inplace:
        autograd.check_update(x, places)
    present = places >= 0
    out = autograd.ingest(problem, engine, x._replace(state=pool[places.clamp_min(0)]))
    assert out.o is not None
    o = torch.where(present[:, None, None, None], out.o, 0)
    return o, pool.index_copy_(0, places[present].long(), out.state[present])


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
) -> SleepResult:
    """Looped ingestion (replay): the same window `passes` times, the state carried from pass to pass.

    One pass is affine in the state, S <- A S + B, which the methods use:

        repeat  plain repetition
        wy      chunk factors made once, then `passes` walks of the state over them (4 T K V flop each)
        affine  A and B made once, then S <- A S + B (2 K^2 V flop each, whatever T)
        rank    one chunk, iterated in its T rows (2 T^2 V flop each)
        auto    the cheapest; rules without delta have a closed form and no loop

    Args:
        q: [B,T,H,K]; outputs of the last pass are returned when it is given.
        tol: stop each head early, once its estimated distance to the fixed point over |S| is at most tol.
        rule: one of `sleepkern.rules`, or its name; g or beta None where the rule has none. The rest: module docstring.

    Raises:
        ValueError: beta * |k|^2 above 2, where more than one pass would diverge.

    Source: arXiv 2605.26099 runs whole blocks N times; with k and v held fixed that is this function.
    """
    x = Tensors(q, k, v, g, beta, initial_state, cu_seqlens)
    return run(rule_named(rule), x, scale, use_qk_l2norm_in_kernel, backend, passes, tol, method, outputs=False)


def explain(
    rule: Rule | str,
    q: Tensor | None,
    k: Tensor,
    v: Tensor,
    g: Tensor | None = None,
    beta: Tensor | None = None,
    initial_state: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    passes: int = 1,
    tol: float | None = None,
    method: str = "auto",
    backend: str | None = None,
) -> Explanation:
    """Which backend and kernel a call with these tensors would take, and why not the others.

    Nothing is computed. Raises as the call itself would, but where no backend is asked for by name and none can do the
    call: then `chosen` is None, and `reasons` say why.
    """
    x = _cast(Tensors(q, k, v, g, beta, initial_state, cu_seqlens))
    problem = check(rule_named(rule), x, None, False, passes, tol, method, outputs=False)
    with on_device_of(x.k):
        if backend is not None or settings.BACKEND is not None:
            choose(problem, backend)
        return explain_problem(problem, backend)


def run(
    rule: Rule,
    x: Tensors,
    scale: float | None,
    normalize: bool,
    backend: str | None,
    passes: int = 1,
    tol: float | None = None,
    method: str = "auto",
    outputs: bool = True,
) -> SleepResult:
    """Check, choose, apply, and say how the passes were made."""
    problem, engine, out = _apply(rule, x, scale, normalize, backend, passes, tol, method, outputs)
    with on_device_of(x.k):
        made_by = method_of(problem, engine)
    return SleepResult(out.state, out.o, problem.passes if out.passes is None else out.passes, out.residual, made_by)


def _apply(
    rule: Rule, x: Tensors, scale: float | None, normalize: bool, backend: str | None, *replay: Any
) -> tuple[Problem, Backend, RecurrenceResult]:
    """The one way from every public function to a kernel. replay: passes, tol, method, outputs."""
    x = _cast(x)
    problem = check(rule, x, scale, normalize, *replay)
    engine = _choose(problem, x, backend)
    return problem, engine, autograd.ingest(problem, engine, x)


def _choose(problem: Problem, x: Tensors, backend: str | None) -> Backend:
    """The backend that computes: the one that is chosen, or torch's operators where a transform wants their rules."""
    if x.k.is_cuda:
        with on_device_of(x.k):
            engine = choose(problem, backend)
    else:  # entering nothing costs as much as choosing
        engine = choose(problem, backend)
    return torch_form(problem, engine) if transforms.differentiating() else engine


def _one_pass(
    rule: Rule,
    x: tuple[Tensor | None, ...],
    scale: float | None,
    normalize: bool,
    output_final_state: bool,
    backend: str | None,
) -> tuple[Tensor, Tensor | None]:
    if type(output_final_state) is not bool:
        check_flag("output_final_state", output_final_state)
    plain = fast_path.forward(rule, x, scale, normalize, backend)
    if plain is not None:
        o, state = plain
        return o, state if output_final_state else None
    _, _, out = _apply(rule, Tensors._make(x), scale, normalize, backend)
    assert out.o is not None
    return out.o, out.state if output_final_state else None


def _cast(x: Tensors) -> Tensors:
    """Cast q, k and v to the type of autocast, as a matrix product's operands would: float64 does not, nor do gates and
    state."""
    if not torch.compiler.is_compiling() and not torch._C._is_any_autocast_enabled():
        return x
    device = x.k.device.type if isinstance(x.k, Tensor) else "cpu"
    if device not in ("cpu", "cuda") or not torch.is_autocast_enabled(device):
        return x
    dtype = torch.get_autocast_dtype(device)

    def cast(t: Tensor) -> Tensor:
        narrow = isinstance(t, Tensor) and t.is_floating_point() and t.dtype != torch.float64
        return t.to(dtype) if narrow else t

    return x._replace(q=x.q if x.q is None else cast(x.q), k=cast(x.k), v=cast(x.v))
