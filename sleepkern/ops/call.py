"""The one way from every public function of the recurrence to a kernel: check, choose, apply."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from .. import settings
from ..autograd import gated, states
from ..autograd import recurrence as autograd
from ..backends.interface import RecurrenceBackend
from ..backends.native.views import on_device_of
from ..dispatch import Explanation, choose, explain_problem, method_of
from ..eager import any_autocast
from ..problems.gates import GateOptions, RawGates, read_gates
from ..problems.recurrence import Problem, RecurrenceResult, Tensors, check
from ..rules import Rule, rule_named
from .known_calls import check_and_choose


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
    """Say which backend and kernel a call with these tensors would take, and why not the others; compute nothing.

    Args:
        rule: one of `sleepkern.rules`, or its name: "gated_delta_rule", "kda", "delta_rule", "simple_gla" or "gla".
        q: [B,T,H,K] queries, or None for a call that returns the state alone.
        k: [B,T,H,K] keys.
        v: [B,T,HV,V] values; HV is a multiple of H, and value head j reads key head j // (HV // H).
        g: log decay [B,T,HV] or [B,T,HV,K], None where the rule does not decay.
        beta: [B,T,HV] factor of the write; None for 1, where the rule has no delta.
        initial_state: [n,HV,K,V] state before the first token, default zero.
        cu_seqlens: [n+1] int32 or int64 offsets of sequences packed into one row (B = 1), default one sequence a row.
        passes: passes of `sleep_ingest`, default 1, which is a call of the rule itself.
        tol: the tol of `sleep_ingest`, default None.
        method: the replay method of `sleep_ingest`, default "auto".
        backend: the backend that the call would name, default none.

    Returns:
        An Explanation. Its `reasons` say for each backend why it cannot do the call, and `print` shows all of it.

    Raises:
        TypeError, ValueError: the errors of the call itself. Only where no backend is named and none can do the call,
            nothing is raised: `chosen` is None then, and `reasons` say why.
    """
    x = cast(Tensors(q, k, v, g, beta, initial_state, cu_seqlens))
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
    gates: RawGates | None = None,
    noted: Callable[[Problem, RecurrenceBackend], None] | None = None,
) -> SleepResult:
    """Check, choose, apply, and say how the passes were made. noted: is told the problem and its backend."""
    problem, engine, out = apply(rule, x, scale, normalize, backend, passes, tol, method, outputs, gates=gates)
    if noted is not None:
        noted(problem, engine)
    if x.k.is_cuda:
        with on_device_of(x.k):
            made_by = method_of(problem, engine)
    else:
        made_by = method_of(problem, engine)
    return SleepResult(out.state, out.o, problem.passes if out.passes is None else out.passes, out.residual, made_by)


def apply(
    rule: Rule,
    x: Tensors,
    scale: float | None,
    normalize: bool,
    backend: str | None,
    passes: int = 1,
    tol: float | None = None,
    method: str = "auto",
    outputs: bool = True,
    gates: RawGates | None = None,
    state_every: int | None = None,
) -> tuple[Problem, RecurrenceBackend, RecurrenceResult]:
    """The one way from every public function to a kernel."""
    x = cast(x)
    problem, engine = check_and_choose(
        rule, x, scale, normalize, backend, passes, tol, method, outputs, state_every=state_every
    )
    if state_every is not None:
        x = x if gates is None else gated.made(problem, x, gates)
        return problem, engine, states.ingest(problem, engine, x)
    if gates is not None:
        return problem, engine, gated.ingest(problem, engine, x, gates)
    return problem, engine, autograd.ingest(problem, engine, x)


def gradients_wanted(x: Tensors, gates: RawGates | None, *more: Tensor | None) -> bool:
    """Tells whether autograd would record a call with these tensors and raw gates."""
    if not torch.is_grad_enabled():
        return False
    raw = () if gates is None else (gates.A_log, gates.dt_bias)
    return any(t is not None and t.requires_grad for t in (*x, *raw, *more))


def raw_gates(options: GateOptions) -> RawGates | None:
    """What a call says of its gates; None where neither is raw."""
    use_gate, A_log, dt_bias, use_sigmoid, doubled, lower_bound = options
    if use_gate is use_sigmoid is doubled is False and A_log is dt_bias is None and lower_bound is None:
        return None
    return read_gates(options)


def cast(x: Tensors) -> Tensors:
    """Cast q, k and v to the type of autocast, as a matrix product's operands would: float64 does not, nor do gates and
    state."""
    if not torch.compiler.is_compiling() and not any_autocast():
        return x
    device = x.k.device.type if isinstance(x.k, Tensor) else "cpu"
    if device not in ("cpu", "cuda") or not torch.is_autocast_enabled(device):
        return x
    dtype = torch.get_autocast_dtype(device)

    def cast(t: Tensor) -> Tensor:
        narrow = isinstance(t, Tensor) and t.is_floating_point() and t.dtype != torch.float64
        return t.to(dtype) if narrow else t

    return x._replace(q=x.q if x.q is None else cast(x.q), k=cast(x.k), v=cast(x.v))
