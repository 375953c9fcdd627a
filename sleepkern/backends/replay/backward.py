"""Gradients through N passes over the same window, from one backward over the window each or from two in all.

Pass N, with the outputs, is an ordinary backward from S_(N-1); it leaves dstate, the gradient of S_(N-1). The passes
before it see only the state, S_(n+1) = A S_n + B, and are gone through

    state_pass     by a backward of the window from each S_n: lam_n comes out as the gradient of the state
    affine   by dA = sum lam_(n+1) S_n^T, dB = sum lam_(n+1), lam_n = A^T lam_(n+1), and then two backwards of the
             window: from the identity with values 0 (whose final state is A) and from 0 (whose final state is B)
    closed   by the derivative of the closed form, and the backward from 0

whichever costs the fewest flop. What is kept of the passes is their states, K V numbers each, whatever the window is.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from ...problems.recurrence import Problem, Tensors
from . import costs
from .methods import closed, window_decay

Gradients = list[Tensor | None]
"""Gradients of q, k, v, g, beta and the state."""
OnePass = Callable[[Problem, Tensors, Tensor | None], Tensor]
"""(problem, tensors, state or None for 0) -> next state"""
OneBackward = Callable[[Problem, Tensors, Tensor | None, Tensor | None, Tensor | None], Gradients]
"""(problem, tensors, state, gradient of the outputs or None, of the final state or None) -> gradients of one pass"""


class Chain(NamedTuple):
    """The passes as powers of A, S <- A S + B, and back.

    powers   (A, S_0, S_1, passes) -> S_0 ... S_(passes-1) [passes,n,HV,K,V]
    adjoint  (A, those states, gradient of the state before the last pass, made) -> dA, dB, gradient of S_0
    """

    powers: Callable[[Tensor, Tensor, Tensor, int], Tensor]
    adjoint: Callable[[Tensor, Tensor, Tensor, Tensor | None], tuple[Tensor, Tensor, Tensor]]


def powers(A: Tensor, start: Tensor, after: Tensor, passes: int) -> Tensor:
    """S_(n+1) = S_n + d, d <- A d, from d = S_1 - S_0."""
    states, d = [start, after], after - start
    for _ in range(passes - 2):
        d = A @ d
        states.append(states[-1] + d)
    return torch.stack(states[:passes])


def adjoint(A: Tensor, states: Tensor, last: Tensor, made: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """lam_n = A^T lam_(n+1), dA = sum lam_(n+1) S_n^T, dB = sum lam_(n+1); a head takes part in the passes it made."""
    dstate, dA, dB = last, torch.zeros_like(A), torch.zeros_like(last)
    for n in range(states.shape[0] - 2, -1, -1):
        seen = dstate if made is None else dstate * active(made, n)
        dA += seen @ states[n].transpose(-1, -2)
        dB += seen
        back = A.transpose(-1, -2) @ seen
        dstate = back if made is None else torch.where(active(made, n) > 0, back, dstate)
    return dA, dB, dstate


def active(made: Tensor, n: int) -> Tensor:
    """1 for heads whose last pass comes after pass n (counted from 0), else 0; [sequences,HV,1,1]."""
    return (made - 1 > n).float()[..., None, None]


TORCH = Chain(powers, adjoint)


def backward(
    problem: Problem,
    x: Tensors,
    do: Tensor | None,
    dstate: Tensor | None,
    made: Tensor | None,
    one_pass: OnePass,
    one_backward: OneBackward,
    chain: Chain = TORCH,
) -> Gradients:
    """Gradients of all passes; made [sequences,HV] says how many each head made, None for all of `problem.passes`."""
    types = [None if t is None else t.dtype for t in x[:6]]
    x = Tensors._make([*(None if t is None else t.float() for t in x[:6]), x.cu_seqlens])
    problem = problem._replace(dtype=torch.float32, tol=None)
    passes = problem.passes if made is None else max(int(made.max()), 1)
    given = x.state is not None
    start = x.state
    if start is None:
        start = x.k.new_zeros((problem.sequences, problem.HV, problem.K, problem.V))
    replay = _Replay(problem._replace(passes=passes), x, start, made, one_pass, one_backward, chain)
    grads = replay.gradients(None if do is None else do.float(), dstate)
    if not given:
        grads[5] = None
    return [None if d is None or t is None else d.to(t) for d, t in zip(grads, types, strict=True)]


class _Replay:
    """The states of one replay, and the ways back through its passes."""

    def __init__(
        self,
        problem: Problem,
        x: Tensors,
        start: Tensor,
        made: Tensor | None,
        one_pass: OnePass,
        one_backward: OneBackward,
        chain: Chain,
    ) -> None:
        self.problem, self.x, self.start, self.made, self.chain = problem, x, start, made, chain
        self.one_pass, self.one_backward = one_pass, one_backward

    def gradients(self, do: Tensor | None, dstate: Tensor | None) -> Gradients:
        method = self._method()
        if method == "closed":
            return self._closed(do, dstate)
        A = self._transition() if method == "affine" else None
        states = self._states(A)
        last = states[-1] if self.made is None else self._at(states, self.made - 1)
        grads = self.one_backward(self.problem, self.x._replace(state=last), last, do, dstate)
        if A is not None:
            return self._affine(A, states, grads)
        for n in range(self.problem.passes - 2, -1, -1):
            dstate = grads[5]
            assert dstate is not None
            taking = None if self.made is None else active(self.made, n)
            before = self.one_backward(
                self.problem, self.x, states[n], None, dstate if taking is None else dstate * taking
            )
            grads = _add(grads, before, taking)
        return grads

    def _method(self) -> str:
        T, K, V = self.problem.T, self.problem.K, self.problem.V
        state_pass, affine = costs.backward_state_pass(T, K, V), costs.backward_affine(T, K, V)
        if self.made is not None:  # heads that stop at passes of their own have no common closed form
            return (
                "affine"
                if affine.setup + (self.problem.passes - 1) * affine.a_pass < state_pass.a_pass
                else "state_pass"
            )
        return costs.cheapest(self.problem, state_pass=state_pass, affine=affine)

    @staticmethod
    def _at(states: Tensor, index: Tensor) -> Tensor:
        index = index.clamp_min(0).long()[None, ..., None, None].expand(1, *states.shape[1:])
        return states.gather(0, index)[0]

    def _transition(self) -> Tensor:
        """A [sequences,HV,K,K]: the state after a pass from the identity with values of width K that are zero."""
        problem, x, identity = self._identity()
        return self.one_pass(problem, x, identity)

    def _identity(self) -> tuple[Problem, Tensors, Tensor]:
        p = self.problem
        k = self.x.k
        identity = torch.eye(p.K, dtype=k.dtype, device=k.device).expand(p.sequences, p.HV, p.K, p.K).contiguous()
        zero = k.new_zeros((p.B, p.T, p.HV, p.K))
        return p._replace(V=p.K), self.x._replace(v=zero, state=identity), identity

    def _states(self, A: Tensor | None) -> Tensor:
        """S_0 ... S_(N-1)."""
        passes = self.problem.passes
        if A is not None:
            return self.chain.powers(A, self.start, self.one_pass(self.problem, self.x, self.start), passes)
        states = [self.start]
        for _ in range(passes - 1):
            states.append(self.one_pass(self.problem, self.x, states[-1]))
        return torch.stack(states)

    def _affine(self, A: Tensor, states: Tensor, grads: Gradients) -> Gradients:
        dstate = grads[5]
        assert dstate is not None
        dA, dB, dstart = self.chain.adjoint(A, states, dstate, self.made)
        problem, x, identity = self._identity()
        through_A = self.one_backward(problem, x, identity, None, dA)
        through_A[2] = None  # of the zero values
        grads = _add(_add(grads, self._from_zero(dB)), through_A)
        grads[5] = dstart
        return grads

    def _from_zero(self, dB: Tensor) -> Gradients:
        return self.one_backward(self.problem, self.x._replace(state=None), None, None, dB)

    def _closed(self, do: Tensor | None, dstate: Tensor | None) -> Gradients:
        B = self.one_pass(self.problem, self.x, None).requires_grad_()
        start = self.start.detach().requires_grad_()
        g = None if self.x.g is None else self.x.g.detach().requires_grad_()
        with torch.enable_grad():
            G = window_decay(self.problem, self.x._replace(g=g))
            last = closed(G, B, start, self.problem.passes - 1)
        grads = self.one_backward(self.problem, self.x._replace(state=last), last.detach(), do, dstate)
        leaves = [start, B] if g is None else [start, B, g]
        dstart, dB, *rest = torch.autograd.grad(last, leaves, grads[5])
        grads = _add(grads, self._from_zero(dB))
        grads[5] = dstart
        if rest and grads[3] is not None:
            grads[3] = grads[3] + rest[0]
        return grads


def _add(grads: Gradients, more: Gradients, taking: Tensor | None = None) -> Gradients:
    """Gradients of q ... beta added up; that of the state is the earlier pass's, of the heads that made it."""
    total = [a if b is None else b if a is None else a + b for a, b in zip(grads[:5], more[:5], strict=True)]
    state, before = grads[5], more[5]
    if before is not None and state is not None and taking is not None:
        before = torch.where(taking > 0, before, state)
    return [*total, state if before is None else before]
