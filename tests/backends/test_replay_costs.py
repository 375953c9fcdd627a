"""backends/replay/costs.py: the formulas of every method, as literals, and the one refusal of method "rank"."""

from __future__ import annotations

import pytest
import torch

from sleepkern import rules
from sleepkern.backends.replay import costs
from sleepkern.backends.replay.costs import Cost
from sleepkern.problems.recurrence import Problem
from sleepkern.rules import Rule

KDA = rules.KDA
DELTA = rules.GATED_DELTA_RULE


def problem(rule: Rule = DELTA, T: int = 16, method: str = "rank", tol: float | None = None) -> Problem:
    return Problem(rule, "cpu", torch.float32, 1, T, 2, 2, 8, 8, 1, False, True, False, 1.0, 4, tol, method)


@pytest.mark.parametrize(("T", "K", "V"), [(1, 1, 1), (32, 64, 128), (300, 128, 5)])
def test_formulas(T: int, K: int, V: int) -> None:
    assert costs.state_pass(T, K, V) == 4 * T * K * V
    assert costs.wy(T, K, V) == Cost(0, 4 * T * K * V)
    assert costs.affine(7, K, V) == Cost(7, 2 * K * K * V)
    assert costs.rank(T, K, V) == Cost(2 * T * K * (T + 2 * V) + T * T * (3 * K + V), 2 * T * T * V)
    assert costs.backward_state_pass(T, K, V) == Cost(0, 18 * T * K * V)
    assert costs.backward_affine(T, K, V) == Cost(18 * T * K * (K + V), 6 * K * K * V)


def test_the_cheapest_method() -> None:
    few, many = Cost(0, 10), Cost(25, 1)
    assert costs.cheapest(problem()._replace(passes=2), wy=few, affine=many) == "wy"
    assert costs.cheapest(problem()._replace(passes=4), wy=few, affine=many) == "affine"
    assert costs.cheapest(problem()._replace(passes=2), wy=None, affine=many) == "affine"
    assert costs.cheapest(problem(rules.GLA), wy=few) == "closed"
    assert costs.cheapest(problem(rules.GLA, tol=1e-3), wy=few) == "wy"


def test_refusals_of_rank() -> None:
    assert costs.refuse(problem(), 16) is None
    assert costs.refuse(problem(KDA, method="wy"), 1) is None
    chunk = "method 'rank' needs one chunk (T <= 16) and no channel decay"
    assert costs.refuse(problem(T=17), 16) == costs.refuse(problem(KDA), 16) == chunk
    assert costs.refuse(problem()._replace(packed=True), 16) is None
    assert costs.refuse(problem()._replace(packed=True), 16, packs=False) == chunk
    assert costs.refuse(problem(tol=1e-3), 16) == "method 'rank' never forms the state of a pass, which tol looks at"
