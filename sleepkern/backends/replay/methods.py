"""Looped ingestion: the same window, N times, with a sound stopping rule. Shared by the backends.

With k, v, g, beta fixed one pass is affine in the state, S <- A S + B. Without delta A is the decay of the window and
N passes have a closed form. The differences d_n = S_n - S_{n-1} shrink by about r = |d_n| / |d_{n-1}| a pass, so what
is left to the fixed point is |d_n| r / (1 - r). The plain relative change |d_n| / |S_n| says little when r is near 1:
many small steps remain.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ... import transforms
from ...problems.recurrence import Problem, RecurrenceResult, Tensors

OnePass = Callable[[Tensor, bool], tuple[Tensor | None, Tensor]]
"""(state, want outputs) -> (outputs or None, next state)"""


def repeat(one_pass: OnePass, state: Tensor, passes: int, tol: float | None, output: bool) -> RecurrenceResult:
    """`passes` passes from `state` [n,HV,K,V]; with `tol` each head stops once its estimated residual is below it.

    Readouts are those of the last pass a head made.
    """
    if tol is None:
        for _ in range(passes - 1):
            state = one_pass(state, False)[1]
        return RecurrenceResult(*one_pass(state, output))
    before, after = state, one_pass(state, False)[1]
    size = (after - before).flatten(2).norm(dim=2)
    residual = torch.full_like(size, torch.inf)
    made = torch.ones_like(size, dtype=torch.int32)
    active = torch.ones_like(size, dtype=torch.bool)
    for _ in range(passes - 1):
        following = one_pass(after, False)[1]
        step = (following - after).flatten(2).norm(dim=2)
        left = remaining(size, step) / following.flatten(2).norm(dim=2).clamp_min(1e-30)
        keep = active[..., None, None]
        before, after = torch.where(keep, after, before), torch.where(keep, following, after)
        residual, size = torch.where(active, left, residual), torch.where(active, step, size)
        made = made + active.int()
        active = active & (left > tol)
        if not transforms.active() and not bool(active.any()):
            break
    o = one_pass(before, True)[0] if output else None
    return RecurrenceResult(o, after, residual, made)


def affine(A: Tensor, B: Tensor, one_pass: OnePass) -> OnePass:
    """`one_pass` with its state-only passes made by A [n,HV,K,K] and B [n,HV,K,V]: 2 K^2 V flop each, whatever T."""
    return lambda state, output: one_pass(state, output) if output else (None, A @ state + B)


def closed(G: Tensor | None, B: Tensor, state: Tensor, passes: int) -> Tensor:
    """State after `passes` passes without delta: Gam^N S + (1 + Gam + ... + Gam^(N-1)) B.

    G is the log of Gam, [n,HV,1,1] or [n,HV,K,1], None for no decay. The sum is made from those of half as many passes,
    s_2m = s_m (1 + Gam^m) and s_(m+1) = 1 + Gam s_m: log2 N steps of terms that are never negative, which are exact and
    differentiable at G = 0 too.
    """
    if G is None:
        return state + passes * B
    total, made = torch.ones_like(G), 1
    for bit in range(passes.bit_length() - 2, -1, -1):
        total, made = total * (1 + (made * G).exp()), 2 * made
        if passes >> bit & 1:
            total, made = 1 + G.exp() * total, made + 1
    return (passes * G).exp() * state + total * B


def remaining(previous: Tensor, step: Tensor) -> Tensor:
    """|d| r / (1 - r) with r = step / previous; infinite where the steps do not shrink, 0 where they vanish."""
    ratio = step / previous.clamp_min(1e-30)
    left = step * ratio / (1 - ratio).clamp_min(1e-30)
    return torch.where(step == 0, 0.0, torch.where(ratio < 1, left, torch.inf))


def window_decay(problem: Problem, x: Tensors) -> Tensor | None:
    """Sum of g over each window, [sequences,HV,1,1] or [sequences,HV,K,1]; None where the rule has no decay."""
    if x.g is None:
        return None
    g = x.g.float()
    if x.cu_seqlens is None:
        total = g.sum(1)
    else:  # by segments, because reading the offsets would make a GPU's host wait
        total = torch.segment_reduce(g[0], "sum", offsets=x.cu_seqlens.to(g.device), unsafe=True)
    return total[..., None] if problem.rule.gate == "channel" else total[..., None, None]
