"""A token that is not a number spoils what comes after it in its own head, and nothing else."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from sleepkern.rules import Rule
from sleepkern.testing import Shape, call, make_inputs

BACKENDS = ["cpu", "chunked"]
SHAPES = {  # steps; part of a chunk; several chunks, the spoilt one in the middle of one
    "T=4": (Shape(T=4, H=2, HV=4, K=16, V=16), 2),
    "T=29": (Shape(T=29, H=2, HV=4, K=20, V=12), 13),
    "T=150": (Shape(T=150, H=2, HV=4, K=16, V=40), 75),
}


def spoilt(x: dict[str, Any], name: str, token: int, value: float) -> dict[str, Any]:
    """The inputs with one token of the first head replaced."""
    t: Tensor = x[name].clone()
    t[:, token, 0] = value
    return {**x, name: t}


def check_reach(rule: Rule, x: dict[str, Any], backend: str, token: int, value: float) -> None:
    clean, clean_state = call(rule, x, backend)
    assert clean_state is not None
    for name in ("q", "k", "v", "g", "beta"):
        if x[name] is None or (name == "g" and value > 0):
            continue
        o, state = call(rule, spoilt(x, name, token, value), backend)
        assert state is not None
        assert torch.equal(o[:, :token], clean[:, :token]), (name, "a token before")
        of_key = 2 if name in "qk" else 1  # value heads that the spoilt one reaches
        assert torch.equal(o[:, :, of_key:], clean[:, :, of_key:]), (name, "another head")
        assert torch.equal(state[:, of_key:], clean_state[:, of_key:]), (name, "another head's state")
        reached = o[:, token : token + 1 if name == "q" else None, :of_key]
        if value == value:  # sums of infinities may be either, and exp(-inf) is 0
            continue
        assert bool(reached.isnan().all()), (name, "a token from there on")
        if name == "q":
            assert torch.equal(o[:, token + 1 :], clean[:, token + 1 :]) and torch.equal(state, clean_state)
        else:
            assert bool(state[:, :of_key].isnan().all()), (name, "the state")


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_no_token_before_is_reached(rule: Rule, backend: str, shape: str, value: float) -> None:
    sizes, token = SHAPES[shape]
    check_reach(rule, make_inputs(rule, sizes, seed=1, decay="slow"), backend, token, value)


@pytest.mark.computed_by("cpu")
def test_padding_on_the_right_may_be_anything(rule: Rule) -> None:
    """Rows of a batch padded with NaN: outputs before the padding are those of the row alone."""
    x = make_inputs(rule, Shape(B=2, T=60, K=16, V=16), seed=2, decay="slow")
    padded = {n: t.clone() if isinstance(t, Tensor) else t for n, t in x.items()}
    for name in ("q", "k", "v", "g", "beta"):
        if padded[name] is not None:
            padded[name][0, 37:] = math.nan
    for backend in (*BACKENDS, "reference"):
        (o, _), (clean, _) = call(rule, padded, backend), call(rule, x, backend)
        assert torch.equal(o[0, :37], clean[0, :37]) and torch.equal(o[1], clean[1]), backend


@pytest.mark.computed_by("cpu")
def test_nothing_stays_behind(rule: Rule) -> None:
    """The next call finds no NaN in memory that a thread keeps, also where it has fewer tokens and channels."""
    spoiled = make_inputs(rule, Shape(T=64, K=64, V=64), seed=3)
    for name in ("q", "k", "v"):
        spoiled[name] = torch.full_like(spoiled[name], math.nan)
    x = make_inputs(rule, Shape(T=33, K=37, V=19), seed=4)
    before = call(rule, x, "cpu")
    call(rule, spoiled, "cpu")
    after = call(rule, x, "cpu")
    assert torch.equal(before[0], after[0])
    assert before[1] is not None and after[1] is not None and torch.equal(before[1], after[1])
