"""Gates that the Triton kernels make of raw projections, against the float64 reference, forward and every gradient."""

from __future__ import annotations

from typing import Any
from unittest import mock

import pytest
import torch
from helpers.errors import errors, results
from helpers.raw_gates import raw_inputs

import sleepkern
from sleepkern.backends import triton as backend
from sleepkern.rules import GATED_DELTA_RULE, GLA, KDA, SIMPLE_GLA, Rule
from sleepkern.testing import TOLERANCE, Shape, call, relative_error, rules_of, to_float64

RULES = rules_of("triton")
ALL = pytest.mark.parametrize("rule", RULES.values(), ids=RULES)
ONE = {"H": 1, "HV": 1}
SHAPES: dict[str, Shape] = {
    "no tokens": Shape(T=0, K=16, V=16),
    "one token": Shape(T=1, K=16, V=16),
    "T=15": Shape(B=2, T=15, K=5, V=3, **ONE),
    "T=17": Shape(T=17, K=24, V=16, **ONE),
    "T=63": Shape(T=63, K=16, V=16, **ONE),
    "T=65": Shape(B=2, T=65, K=16, V=16, **ONE),
    "grouped": Shape(T=20, H=1, HV=3, K=16, V=16),
    "packed": Shape(H=1, HV=2, K=16, V=16, lengths=(1, 16, 17, 0, 5)),
}
OPTIONS: dict[str, dict[str, Any]] = {
    "bounded": {"lower_bound": -5.0},
    "doubled": {"allow_neg_eigval": True},
    "fast rates": {"rate": (1.0, 16.0)},
    "state only": {"outputs": False, "passes": 1},
}


@pytest.fixture
def taken(monkeypatch: pytest.MonkeyPatch) -> mock.Mock:
    """The calls of the backward whose gates are raw."""
    watched = mock.Mock(wraps=backend.backward_of_raw)
    monkeypatch.setattr(backend, "backward_of_raw", watched)
    return watched


def within(found: dict[str, float], tolerance: float) -> None:
    assert all(error <= tolerance for error in found.values()), found


@ALL
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_shapes(rule: Rule, shape: Shape, taken: mock.Mock) -> None:
    if shape.T:
        within(errors(rule, shape, raw=True), TOLERANCE[torch.float32])
    else:
        x = raw_inputs(rule, shape, seed=3)
        found = results(rule, x, "triton", None, torch.ones_like(x["initial_state"]))
        assert all(not found[n].any() for n in ("g", "beta", "A_log", "dt_bias") if n in found)
    assert taken.called


@pytest.mark.parametrize("rule", [GATED_DELTA_RULE, KDA, SIMPLE_GLA, GLA], ids=lambda rule: rule.name)
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_options(rule: Rule, options: dict[str, Any], taken: mock.Mock) -> None:
    within(errors(rule, Shape(T=40, K=16, V=16, **ONE), raw=True, **options), TOLERANCE[torch.float32])
    assert taken.called


@pytest.mark.parametrize("rule", [GATED_DELTA_RULE, KDA], ids=lambda rule: rule.name)
def test_wide_heads(rule: Rule) -> None:
    within(errors(rule, Shape(T=20, K=96, V=40, **ONE), raw=True), TOLERANCE[torch.float32])


@pytest.mark.parametrize("rule", [GATED_DELTA_RULE, KDA], ids=lambda rule: rule.name)
@pytest.mark.parametrize("T", [24, 70])
def test_bfloat16(rule: Rule, T: int) -> None:
    """A_log of five heads, because the sum of one may cancel."""
    within(errors(rule, Shape(T=T, H=1, HV=5, K=32, V=32), torch.bfloat16, raw=True), TOLERANCE[torch.bfloat16])


@ALL
@pytest.mark.parametrize("T", [1, 3, 20])
def test_steps_in_place(rule: Rule, T: int) -> None:
    x = raw_inputs(rule, Shape(B=2, T=T, H=1, HV=2, K=24, V=37), seed=6)
    expected_o, expected_S = call(rule, to_float64(x), "reference")
    state = x["initial_state"].clone()
    arguments = {n: t for n, t in x.items() if n not in ("initial_state", "cu_seqlens")}
    with mock.patch.object(backend, "step_of_raw", wraps=backend.step_of_raw) as taken:
        o, same = sleepkern.recurrent_step(**arguments, state=state, rule=rule, backend="triton")
    assert taken.called and same is state
    assert relative_error(o, expected_o) < TOLERANCE[torch.float32]
    assert relative_error(state, expected_S) < TOLERANCE[torch.float32]


@pytest.mark.parametrize("bound", [None, -5.0])
@pytest.mark.parametrize("rule", [GATED_DELTA_RULE, KDA], ids=lambda rule: rule.name)
def test_large_and_far_raw_gates(rule: Rule, bound: float | None) -> None:
    shape = Shape(T=20, K=16, V=16, **ONE)
    for far in (200.0, -30.0):
        x = raw_inputs(rule, shape, seed=6, lower_bound=bound)
        x["g"] = x["g"].sign() * far if far > 0 else far - x["g"].abs()
        do, dstate = torch.ones_like(x["v"]), torch.ones_like(x["initial_state"])
        actual = results(rule, x, "triton", do, dstate)
        expected = results(rule, to_float64(x), "reference", do, dstate)
        for name, e in expected.items():
            apart = float((actual[name].double() - e).norm())
            assert apart <= 1e-4 * float(e.norm()) + (1e-12 if far > 0 else 0), (name, far)
