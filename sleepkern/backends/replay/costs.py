"""What a replay costs by each method, as pure arithmetic, and which problems method "rank" can do.

All costs are flop of one head over a window of T tokens, 2 for a multiply-add.
"""

from __future__ import annotations

from typing import NamedTuple

from ...problems.recurrence import Problem


class Cost(NamedTuple):
    """Flop a head of a replay method: before the passes, beyond what an ordinary pass takes, and of each pass."""

    setup: int
    a_pass: int


def state_pass(T: int, K: int, V: int) -> int:
    """One pass over the chunk factors, without outputs: the products W S and Kt^T Vn."""
    return 4 * T * K * V


def wy(T: int, K: int, V: int) -> Cost:
    """Every pass is a state pass; the factors are those of the first one."""
    return Cost(0, state_pass(T, K, V))


def affine(setup: int, K: int, V: int) -> Cost:
    """Every pass is A S + B, whatever T; `setup` makes A, and B where the first pass does not leave it behind."""
    return Cost(setup, 2 * K * K * V)


def rank(T: int, K: int, V: int) -> Cost:
    """Every pass is one product of T x T with T x V; the setup makes that matrix and goes to T rows and back."""
    return Cost(2 * T * K * (T + 2 * V) + T * T * (3 * K + V), 2 * T * T * V)


def backward_state_pass(T: int, K: int, V: int) -> Cost:
    """The gradients of every pass by a backward over the chunks, which makes the factors anew."""
    return Cost(0, 18 * T * K * V)


def backward_affine(T: int, K: int, V: int) -> Cost:
    """The gradients of every pass are products with A; those of A and B go through one backward over the chunks."""
    return Cost(18 * T * K * (K + V), 6 * K * K * V)


def cheapest(problem: Problem, **methods: Cost | None) -> str:
    """The method that takes the fewest flop, None marking one that cannot; closed form for rules without delta."""
    if not problem.rule.delta and problem.tol is None:
        return "closed"
    best, fewest = "", -1
    for name, cost in methods.items():  # a loop, because torch.compile cannot trace min of a list
        if cost is not None:
            total = cost.setup + (problem.passes - 1) * cost.a_pass
            if fewest < 0 or total < fewest:
                best, fewest = name, total
    return best


def refuse(problem: Problem, limit: int, packs: bool = True) -> str | None:
    """None, or the sentence why method "rank" cannot do the problem where a chunk has at most `limit` tokens.

    Problems of other methods are not refused. packs says whether the method takes packed sequences.
    """
    if problem.method != "rank":
        return None
    if problem.T > limit or (problem.packed and not packs) or problem.rule.gate == "channel":
        return f"method 'rank' needs one chunk (T <= {limit}) and no channel decay"
    if problem.tol is not None:
        return "method 'rank' never forms the state of a pass, which tol looks at"
    return None
