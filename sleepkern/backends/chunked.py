"""The readable chunk form, in torch: any device, any float type, differentiable; the fall-back where no kernel fits.

Per chunk (notation: rules.py), after `prepare` every rule is the same loop:

    Vn = U - W S;   O = Qe S + P Vn;   S <- Gam S + Kt^T Vn

so one pass over a window is affine in the state, S <- A S + B, which is what the replay methods use. A is a
contraction for beta |k|^2 <= 2. Exponents are differences of G inside a chunk and never positive; they are masked
before exp, so that nothing overflows however strong the decay.
"""

from __future__ import annotations

import math
from contextlib import nullcontext
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..problems.recurrence import Problem, RecurrenceResult, Tensors
from ..rules import FAMILY, Rule
from .interface import REPLAY, STATES, refuse_states
from .replay import backward as replay_backward
from .replay import costs
from .replay.methods import affine, closed, repeat
from .torch_common import Heads, by_sequence, gradients, step_by

NAME = "chunked"
SUPPORTS = FAMILY
OPTIONS = REPLAY | STATES
CHUNK = 64
MIN_LOG_DECAY = -1e4
"""exp of it is 0 in every type; a log decay of -inf itself would make differences of G into NaN."""


class Factors(NamedTuple):
    """Chunk factors of a window of c chunks; everything that does not depend on the state.

    Qe [n,HV,c,C,K]  P [n,HV,c,C,C] (None without q)  Kt [n,HV,c,C,K]  U [n,HV,c,C,V]  W [n,HV,c,C,K] (None without
    delta)  G_end [n,HV,c,1,1] or [n,HV,c,K,1], log of Gam (None without decay)
    """

    Qe: Tensor | None
    P: Tensor | None
    Kt: Tensor
    U: Tensor
    W: Tensor | None
    G_end: Tensor | None


def why_not(problem: Problem) -> str | None:
    """None unless a replay method is asked for that its form does not allow, or states inside of chunks."""
    return refuse_states(problem) or costs.refuse(problem, CHUNK)


def kernel(problem: Problem) -> str:
    """One line on the code that runs."""
    replay = f", replay by {method_of(problem)}" if problem.passes > 1 else ""
    return f"chunks of {CHUNK} in torch{replay}"


def method_of(problem: Problem) -> str:
    """The replay method for this problem; 'auto' takes the cheapest, a state_pass costs 4 T K V flop by wy."""
    if problem.method not in ("auto", "repeat"):
        return problem.method
    if problem.method == "repeat":
        return "wy"
    T, K, V = problem.T, problem.K, problem.V
    transition = costs.state_pass(T, K, K + V)  # a state pass that is K + V wide makes A and B
    return costs.cheapest(problem, wy=costs.wy(T, K, V), affine=costs.affine(transition, K, V))


def forward(problem: Problem, x: Tensors) -> RecurrenceResult:
    """Readouts and final state of `problem.passes` passes; differentiable by torch."""
    with torch.autocast(problem.device, enabled=False) if problem.device in ("cpu", "cuda") else nullcontext():
        return by_sequence(problem, x, lambda h: _ingest(problem, h))


def backward(
    problem: Problem, x: Tensors, do: Tensor | None, dstate: Tensor | None, dstates: Tensor | None = None
) -> list[Tensor | None]:
    """Gradients of q, k, v, g, beta, state: autograd through the chunk form."""
    return gradients(problem, x, do, dstate, dstates, forward)


def pieces(problem: Problem) -> tuple[replay_backward.OnePass, replay_backward.OneBackward]:
    """What the gradients of a replay are put together from, where another backend made its passes."""

    def one_pass(p: Problem, x: Tensors, state: Tensor | None) -> Tensor:
        return forward(p._replace(passes=1, output=False), x._replace(q=None, state=state)).state

    def one_backward(
        p: Problem, x: Tensors, state: Tensor | None, do: Tensor | None, dstate: Tensor | None
    ) -> list[Tensor | None]:
        return backward(p._replace(passes=1), x._replace(state=state), do, dstate)

    return one_pass, one_backward


def step(problem: Problem, x: Tensors) -> Tensor:
    """Readouts [B,T,HV,V]; the state is updated in place."""
    return step_by(problem, x, forward)


def prepare(rule: Rule, h: Heads, scale: float, chunk: int = CHUNK) -> Factors:
    """Cut [n,HV,T,*] into chunks (a short last one is padded with k = v = beta = g = 0) and make their factors."""
    q, k, v, g, beta = (None if t is None else _cut(t, chunk) for t in (h.q, h.k, h.v, h.g, h.beta))
    assert k is not None and v is not None
    if g is not None and rule.gate == "head":
        g = g[..., None]
    E, Kt, end = None, k, None
    if g is not None:
        g = g.clamp_min(MIN_LOG_DECAY)
        G = g.cumsum(-2)
        E, end = G.exp(), G[..., -1:, :].transpose(-1, -2)
        Kt = k * _sum_after(g).exp()
    bv = v if beta is None else beta[..., None] * v
    W, U = None, bv
    if rule.delta:
        assert beta is not None
        M = beta[..., None] * decayed_gram(k, k, g).tril(-1)
        rhs = torch.cat([beta[..., None] * (k if E is None else k * E), bv], -1)
        solved = torch.linalg.solve_triangular(M, rhs, upper=False, unitriangular=True)
        W, U = solved.split([k.shape[-1], v.shape[-1]], -1)
    Qe = None if q is None else scale * (q if E is None else q * E)
    P = None if q is None else scale * decayed_gram(q, k, g).tril()
    return Factors(Qe, P, Kt, U, W, end)


def decayed_gram(x: Tensor, y: Tensor, g: Tensor | None) -> Tensor:
    """[..., C, C] of sum_d x_id y_jd exp(G_id - G_jd) for i >= j; above the diagonal anything finite.

    Head decay factors out; its differences are taken in float64, because G_i - G_j is small where G is large. That of a
    token and itself is a number, not a difference: its two gradients would cancel, and under strong decay what rounding
    leaves of them is more than all others. Channel decay is split in halves: the lower left block, rows i in the second
    half, columns j in the first, is a product with the last token R of the first half between them, exp(G_i - R) and
    exp(R - G_j), both exponents non-positive and added up from R; the two diagonal blocks are halves of the same
    problem.
    """
    if g is None:
        return x @ y.transpose(-1, -2)
    if g.shape[-1] == 1:
        G = g.double().cumsum(-2)
        lower = torch.ones(G.shape[-2], G.shape[-2], dtype=torch.bool, device=G.device).tril()
        difference = (G - G.transpose(-1, -2)).masked_fill(lower & lower.T, 0).masked_fill(~lower, -torch.inf)
        return (x @ y.transpose(-1, -2)) * difference.to(x.dtype).exp()
    rows = g.shape[-2]
    if rows == 1:
        return (x * y).sum(-1, keepdim=True)
    m = rows // 2
    since, until = g[..., m:, :].cumsum(-2).exp(), _sum_after(g[..., :m, :]).exp()
    below = (x[..., m:, :] * since) @ (y[..., :m, :] * until).transpose(-1, -2)
    first = decayed_gram(x[..., :m, :], y[..., :m, :], g[..., :m, :])
    second = decayed_gram(x[..., m:, :], y[..., m:, :], g[..., m:, :])
    top = torch.cat([first, torch.zeros_like(below).transpose(-1, -2)], -1)
    return torch.cat([top, torch.cat([below, second], -1)], -2)


def _sum_after(g: Tensor) -> Tensor:
    """The sum of the rows after each row, added up from the end."""
    behind = F.pad(g[..., 1:, :], (0, 0, 0, 1))
    return behind.flip(-2).cumsum(-2).flip(-2)


def state_pass(
    f: Factors, state: Tensor, output: bool, ends: list[Tensor] | None = None
) -> tuple[Tensor | None, Tensor]:
    """One pass over the chunks: outputs [n,HV,c*C,V] (None unless wanted) and the state behind the window.

    The state after each chunk is appended to `ends`.
    """
    starts, writes = [], []
    for c in range(f.Kt.shape[2]):
        Vn = f.U[:, :, c] if f.W is None else f.U[:, :, c] - f.W[:, :, c] @ state
        starts.append(state)
        writes.append(Vn)
        kept = state if f.G_end is None else f.G_end[:, :, c].exp() * state
        state = kept + f.Kt[:, :, c].transpose(-1, -2) @ Vn
        if ends is not None:
            ends.append(state)
    if not output or f.Qe is None or f.P is None:
        return None, state
    o = f.Qe @ torch.stack(starts, 2) + _read_writes(f.P, torch.stack(writes, 2))
    return o.flatten(2, 3), state


def _read_writes(P: Tensor, writes: Tensor) -> Tensor:
    """P @ writes, in which a token that is not finite reaches none before it: there P is 0, and 0 * NaN is NaN.

    So the product is one of finite numbers, and NaN comes back to the tokens from there on.
    """
    finite = torch.nan_to_num(writes, nan=0.0, posinf=0.0, neginf=0.0)
    return P @ finite + (writes - finite).cumsum(-2)


def _ingest(problem: Problem, h: Heads) -> RecurrenceResult:
    if h.k.shape[2] == 0:
        return _no_tokens(problem, h)
    if problem.state_every is not None:
        return _with_states(problem, h, problem.state_every)
    f = prepare(problem.rule, h, problem.scale)
    state, passes, method = h.state, problem.passes, method_of(problem)

    def one_pass(state: Tensor, output: bool) -> tuple[Tensor | None, Tensor]:
        o, state = state_pass(f, state, output)
        return (None if o is None else o[:, :, : h.v.shape[2]]), state

    if passes > 1 and method == "closed":
        _, B = state_pass(f, torch.zeros_like(state), False)
        G = None if f.G_end is None else f.G_end.sum(2)
        state, passes = closed(G, B, state, passes - 1), 1
    elif passes > 1 and method == "rank":
        state, passes = _rank(f, state, passes - 1), 1
    elif passes > 1 and method == "affine":
        return repeat(affine(*_transition(f), one_pass), state, passes, problem.tol, problem.output)
    return repeat(one_pass, state, passes, problem.tol, problem.output)


def _with_states(problem: Problem, h: Heads, every: int) -> RecurrenceResult:
    """One pass in chunks that end at every `every` tokens, and the states there."""
    chunk, ends = math.gcd(every, CHUNK), []  # type: int, list[Tensor]
    f = prepare(problem.rule, h, problem.scale, chunk)
    o, state = state_pass(f, h.state, problem.output, ends)
    wanted = [*ends[every // chunk - 1 : -1 : every // chunk], state]
    return RecurrenceResult(None if o is None else o[:, :, : h.v.shape[2]], state, states=torch.stack(wanted, 1))


def _no_tokens(problem: Problem, h: Heads) -> RecurrenceResult:
    state = h.state.clone()
    none = None if problem.state_every is None else state.new_empty((state.shape[0], 0, *state.shape[1:]))
    return RecurrenceResult(h.v.clone() if problem.output else None, state, *_untouched(problem, state), none)


def _cut(t: Tensor, chunk: int) -> Tensor:
    pad = -t.shape[2] % chunk
    t = F.pad(t, (0, 0, 0, pad) if t.dim() == 4 else (0, pad))
    cut: Tensor = t.unflatten(2, (-1, chunk))
    return cut


def _transition(f: Factors) -> tuple[Tensor, Tensor]:
    """(A, B) of the window, by one state_pass with the state [I | 0] and the values [0 | U]."""
    n, HV, _, _, K = f.Kt.shape
    V = f.U.shape[-1]
    wide = torch.cat([torch.eye(K, dtype=f.U.dtype, device=f.U.device), f.U.new_zeros(K, V)], -1)
    values = torch.cat([f.U.new_zeros((*f.U.shape[:-1], K)), f.U], -1)
    _, both = state_pass(f._replace(U=values), wide.expand(n, HV, K, K + V), False)
    A, B = both.split([K, V], -1)
    return A, B


def _rank(f: Factors, state: Tensor, passes: int) -> Tensor:
    """State after `passes` passes over one chunk, iterated in its L rows: S_n = Gam^n S_0 + Kt^T Y_n,

    Y_(n+1) = Gam Y_n + U - Gam^n W S_0 - W Kt^T Y_n: 2 L^2 V flop a pass.
    """
    Kt, U = f.Kt[:, :, 0], f.U[:, :, 0]
    G = U.new_zeros(()) if f.G_end is None else f.G_end[:, :, 0]
    Y = torch.zeros_like(U)
    for n in range(passes):
        step = U
        if f.W is not None:
            W = f.W[:, :, 0]
            step = U - (n * G).exp() * (W @ state) - (W @ Kt.transpose(-1, -2)) @ Y
        Y = G.exp() * Y + step
    return (passes * G).exp() * state + Kt.transpose(-1, -2) @ Y


def _untouched(problem: Problem, state: Tensor) -> tuple[Tensor | None, Tensor | None]:
    if problem.tol is None:
        return None, None
    zero = state.new_zeros(state.shape[:2])
    return zero, zero.to(torch.int32)
