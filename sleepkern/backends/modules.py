"""Blocks as modules, called one by one: the passes over a window in Python, and the reference of every kernel for them.

h(0) = h;   (h(n), S(n)) = Blocks(h(n-1), S(n-1)),  n = 1..N
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ..problems.blocks import BlockProblem, Slept
from ..state import RecurrentState, State

NAME = "modules"
SUPPORTS = None
RECORDED = True
Pass = Callable[[Tensor, list[State]], tuple[Tensor, list[State], Tensor]]
"""h [B,L,d] and what each layer carries into a pass; both after it, and what it changed (`relative_change`)."""


def why_not(problem: BlockProblem) -> str | None:
    """None: blocks can always be called."""
    return None


def kernel(problem: BlockProblem) -> str:
    """One line on the code that runs."""
    return "the modules, one by one"


def run(problem: BlockProblem, h: Tensor, blocks: Sequence[Any], states: Sequence[State]) -> Slept:
    """Run the blocks on any device, for any type."""
    made = passes_of(blocks, h, states, problem.passes, problem.reinject, problem.carry)
    return Slept(*made)  # type: ignore[arg-type]


def repeat(
    one_pass: Pass,
    h: Tensor,
    states: Sequence[State],
    passes: int,
    reinject: bool,
    carry: bool,
    tol: float | None = None,
) -> tuple[Tensor, list[State], Tensor]:
    """N passes: h and states after the last one, and changes [N].

    Args:
        one_pass: runs the layers once.
        h: [B,L,d] before the first pass.
        states: what each layer carries into the window.
        reinject: a pass after the first starts from the normalised h of the one before plus the first h.
        carry: convolutions of a pass after the first see the window's end before it, else what preceded the window.
        tol: no further pass follows one that changed less than this.
    """
    start, now, changes = h, list(states), []
    for n in range(passes):
        if n > 0:
            h = rms_normalize(h) + start if reinject else h
            now = [_before_pass(old, new, carry) for old, new in zip(states, now, strict=True)]
        h, now, change = one_pass(h, now)
        changes.append(change)
        if tol is not None and float(change) < tol:
            break
    return h, now, torch.stack(changes)


def one_pass(blocks: Sequence[Callable[..., Any]], h: Tensor, before: list[State]) -> tuple[Tensor, list[State]]:
    """h and what each block carries, both after these blocks."""
    after: list[State] = []
    for block, state in zip(blocks, before, strict=True):
        h, kept = block(h, state)
        after.append(kept)
    return h, after


def passes_of(
    blocks: Sequence[Callable[..., Any]], h: Tensor, states: Sequence[State], passes: int, reinject: bool, carry: bool
) -> tuple[Tensor, list[State], Tensor]:
    """Does the same as `repeat` with blocks that are called with h and their state; autograd records it."""

    def once(h: Tensor, before: list[State]) -> tuple[Tensor, list[State], Tensor]:
        h, after = one_pass(blocks, h, before)
        return h, after, change_of(before, after)

    return repeat(once, h, states, passes, reinject, carry)


def rms_normalize(h: Tensor) -> Tensor:
    """Over its root mean square, without weights."""
    return F.rms_norm(h, h.shape[-1:])


def change_of(before: Sequence[State], after: Sequence[State]) -> Tensor:
    """`relative_change` of the fast weights among these states."""
    pairs = [pair for pair in zip(before, after, strict=True) if isinstance(pair[1], RecurrentState)]
    return relative_change(
        (old.state if isinstance(old, RecurrentState) else None, new.state)  # type: ignore[union-attr]
        for old, new in pairs
    )


@torch.no_grad()
def relative_change(states: Iterable[tuple[Tensor | None, Tensor]]) -> Tensor:
    """|S_n - S_(n-1)| / |S_n| over pairs of a fast weight before a pass (None for 0) and after it; 0 without any."""
    pairs = list(states)
    if not pairs:
        return torch.zeros((), dtype=torch.float32, device="cpu")
    steps = [torch.linalg.vector_norm(S) if old is None else torch.dist(S, old) for old, S in pairs]
    sizes = [torch.linalg.vector_norm(S) for _, S in pairs]
    change: Tensor = torch.stack(steps).norm() / torch.stack(sizes).norm().clamp_min(1e-30)
    return change


def _before_pass(old: State, new: State, carry: bool) -> State:
    """What a layer carries into a pass after the first: the fast weight of the pass before, keys as of the first."""
    if not isinstance(new, RecurrentState):
        return old
    if carry:
        return new
    return RecurrentState(torch.zeros_like(new.conv) if old is None else old[0], new.state)
