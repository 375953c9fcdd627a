"""Bad input of every kind: one clear error that names the argument, what it got and what it expects."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers.bad_inputs import RULE, SHAPE, BadInput, refused_calls

import sleepkern
from sleepkern import rules, settings
from sleepkern.testing import call, make_inputs

CALLS = refused_calls()


@pytest.mark.parametrize(("bad", "x"), CALLS.values(), ids=CALLS)
def test_bad_input(bad: BadInput, x: dict[str, Any]) -> None:
    with pytest.raises(bad.error, match=f"^{bad.message}"):
        call(RULE, x)


def test_unknown_backend() -> None:
    with pytest.raises(ValueError, match=r"backend: got 'gpu'; expected one of cuda, cpu, triton, chunked, reference"):
        call(RULE, make_inputs(RULE, SHAPE), backend="gpu")


def test_gates_a_rule_has_not() -> None:
    x = make_inputs(RULE, SHAPE)
    arguments = (x["q"], x["k"], x["v"], x["g"], x["beta"], x["initial_state"])
    with pytest.raises(ValueError, match=r"g: delta_rule has no decay, got a tensor \[2, 5, 4\]; expected None"):
        sleepkern.recurrent_step(*arguments, rule=rules.DELTA_RULE)
    with pytest.raises(ValueError, match=r"g: got shape \[2, 5, 4\]; expected \[2, 5, 4, 8\]"):
        sleepkern.recurrent_step(*arguments, rule=rules.KDA)


def test_bad_replay() -> None:
    x = make_inputs(RULE, SHAPE)
    for options, message in (
        ({"passes": 0}, r"passes: got 0; expected an integer of at least 1"),
        ({"passes": 2.0}, r"passes: got 2.0; expected an integer"),
        ({"tol": 0.0}, r"tol: got 0.0; expected None or a number above 0"),
        ({"method": "power"}, r"method: got 'power'; expected one of auto, repeat, wy, affine, rank"),
        (
            {"method": "wy", "backend": "reference"},
            r"backend: got 'reference', which cannot do this call: .*method 'wy'",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            sleepkern.sleep_ingest(**x, **options)


def test_a_rejected_step_leaves_the_state_alone() -> None:
    x = make_inputs(RULE, SHAPE)
    state = x["initial_state"].clone()
    for change in ({"g": x["g"] + 1}, {"v": x["v"][:, :4]}):
        bad = {**x, **change}
        with pytest.raises(ValueError):
            sleepkern.recurrent_step(bad["q"], bad["k"], bad["v"], bad["g"], bad["beta"], state)
        assert torch.equal(state, x["initial_state"])
    with pytest.raises(ValueError, match=r"^state: got shape"):
        sleepkern.recurrent_step(x["q"], x["k"], x["v"], x["g"], x["beta"], state[:1])


def test_nan_is_found_when_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    x = make_inputs(RULE, SHAPE)
    x["v"][0, 3, 1, 2] = float("nan")
    call(RULE, x)
    monkeypatch.setattr(settings, "DEBUG", True)
    with pytest.raises(ValueError, match="v: got NaN; expected numbers"):
        call(RULE, x)


def test_values_are_checked_in_a_compiled_graph_too() -> None:
    x = make_inputs(RULE, SHAPE)
    compiled = torch.compile(
        lambda q, k, v, g, b: sleepkern.gated_delta_rule(q, k, v, g, b)[0], fullgraph=True, backend="eager"
    )
    compiled(x["q"], x["k"], x["v"], x["g"], x["beta"])
    with pytest.raises(ValueError, match="expected g <= 0"):
        compiled(x["q"], x["k"], x["v"], -x["g"], x["beta"])
