"""A rule with a new row takes three files: every call of it is right by torch, and no kernel computes another rule."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch

import sleepkern
from sleepkern import dispatch, rules
from sleepkern.backends import BACKENDS, chunked, reference
from sleepkern.problems.recurrence import Tensors, describe
from sleepkern.rules import Rule
from sleepkern.testing import TOLERANCE, Shape, make_inputs, relative_error, rules_of, to_float64

TOY = Rule("toy", gate="none", delta=False)
SHAPE = Shape(B=2, T=70, H=1, HV=2, K=8, V=6)


@dataclass(frozen=True)
class Curved(Rule):
    """A rule with a trait that no backend was told of."""

    curvature: float = 1.0


@pytest.fixture
def toy(monkeypatch: pytest.MonkeyPatch) -> Rule:
    """The toy with its row in RULES."""
    monkeypatch.setitem(rules.RULES, TOY.name, TOY)
    return TOY


def test_a_toy_is_chosen_and_computed(toy: Rule) -> None:
    x = make_inputs(toy, SHAPE)
    tensors, exact = Tensors(*x.values()), Tensors(*to_float64(x).values())
    problem = describe(toy, tensors, 0.5, False)
    engine = dispatch.choose(problem)
    assert engine is chunked
    found = engine.forward(problem, tensors)
    expected = reference.forward(describe(toy, exact, 0.5, False), exact)
    assert found.o is not None and expected.o is not None
    assert relative_error(found.o, expected.o) <= TOLERANCE[torch.float32]
    assert relative_error(found.state, expected.state) <= TOLERANCE[torch.float32]


def test_every_call_takes_a_toy(toy: Rule) -> None:
    """The gradient too: the row is the name by which a rule travels through torch's operators."""
    x = make_inputs(toy, Shape(B=2, T=3, H=1, HV=2, K=8, V=6))
    written = torch.einsum("bthk,bthv->bhkv", x["k"].repeat_interleave(2, 2), x["beta"][..., None] * x["v"])
    state = x["initial_state"].clone()
    _, stepped = sleepkern.recurrent_step(x["q"], x["k"], x["v"], None, x["beta"], state, rule="toy")
    assert relative_error(stepped, x["initial_state"] + written) <= TOLERANCE[torch.float32]
    v = x["v"].clone().requires_grad_()
    slept = sleepkern.sleep_ingest(**{**x, "v": v}, passes=4, rule="toy")
    assert slept.method == "closed"
    assert relative_error(slept.final_state, x["initial_state"] + 4 * written) <= TOLERANCE[torch.float32]
    slept.final_state.sum().backward()
    assert v.grad is not None


def test_kernels_refuse_what_they_do_not_declare(toy: Rule) -> None:
    x = make_inputs(toy, SHAPE)
    told = sleepkern.explain(toy, **x)
    assert told.chosen == "chunked"
    for backend in BACKENDS:
        if toy in backend.SUPPORTS:
            assert told.reasons[backend.NAME] is None
            continue
        assert told.reasons[backend.NAME] == f"does not know the rule {toy}"
        with pytest.raises(
            ValueError, match=f"^backend: got '{backend.NAME}', which cannot do this call: does not know"
        ):
            sleepkern.sleep_ingest(**x, rule=toy, backend=backend.NAME)


def test_a_trait_that_no_backend_declares_is_refused_by_all() -> None:
    x = make_inputs(TOY, SHAPE)
    with pytest.raises(ValueError, match="^backend: none can do this call"):
        sleepkern.sleep_ingest(**x, rule=Curved("curved", gate="none", delta=False))


def test_tests_of_a_backend_leave_out_the_rules_it_does_not_declare(toy: Rule) -> None:
    assert "toy" in rules_of("chunked", "reference")
    assert "toy" not in rules_of("cpu") and "toy" not in rules_of("reference", "cuda")
    assert rules_of().keys() == rules.RULES.keys()
