"""Decode by CUDA on bfloat16 states, and with the state after each token, on the CPU, against the float64 reference."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers.states_along import decode_errors, growth

import sleepkern
from sleepkern.rules import GATED_DELTA_RULE, Rule
from sleepkern.testing import TOLERANCE, Shape, make_inputs, rules_of

RULES = rules_of("cuda")
ALL = pytest.mark.parametrize("rule", RULES.values(), ids=RULES)
SHAPES = [
    Shape(B=3, T=3, H=1, HV=2, K=24, V=37),
    Shape(B=2, T=2, H=1, HV=1, K=128, V=64),
    Shape(B=2, T=8, H=1, HV=1, K=200),
]
ROUNDED = 5e-4
"""A few values of a state lie between two numbers of bfloat16, so that float32 and float64 round them apart. All cut
off in place of rounded are 3e-3 apart."""


@ALL
@pytest.mark.parametrize("states", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=["K=24 V=37", "K=128 V=64", "K=200 V=64"])
def test_decode_states(on: Callable[..., Any], rule: Rule, shape: Shape, states: torch.dtype) -> None:
    """In place, in a pool, and with the states after each token, which are those of the reference but for rounding."""
    with on(order="random"):
        found = decode_errors(rule, shape, states=states, backend="cuda")
    tolerance = TOLERANCE[torch.float32] if states == torch.float32 else ROUNDED
    assert all(error <= tolerance for error in found.values()), found


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_decode_states_of_narrow_types(on: Callable[..., Any], dtype: torch.dtype) -> None:
    with on(order="backward"):
        found = decode_errors(GATED_DELTA_RULE, Shape(B=2, T=2, H=1, HV=2, K=96), dtype, torch.bfloat16, "cuda")
    assert all(error <= TOLERANCE[dtype] for error in found.values()), found


def test_transposed_states(on: Callable[..., Any]) -> None:
    """States whose [K,V] are not contiguous are copied, token by token."""
    from sleepkern.backends.cuda import recurrence as cuda
    from sleepkern.problems.recurrence import Tensors, describe

    x = Tensors(*make_inputs(GATED_DELTA_RULE, Shape(B=2, T=3, H=1, HV=2, K=16, V=16)).values())
    problem = describe(GATED_DELTA_RULE, x, 0.25, False)
    assert x.state is not None
    transposed = x.state.transpose(2, 3).contiguous().transpose(2, 3)
    out = [torch.zeros(2, 3, 2, 16, 16) for _ in range(2)]
    with on():
        for state, to in zip((x.state, transposed), out, strict=True):
            cuda.step_states(problem, x._replace(state=state), None, to, None)
    assert torch.equal(*out)


@ALL
@pytest.mark.parametrize("steps", [1, 1000, pytest.param(20_000, marks=pytest.mark.hardening)])
def test_error_growth_of_bfloat16_states(on: Callable[..., Any], rule: Rule, steps: int) -> None:
    """The error is what the type costs, and stays bounded where a rule forgets; cut off states drift away."""
    with on():
        found, least = growth(rule, steps, "cuda")
    print(f"{rule.name}: {found:.2e} after {steps} steps; float64 sums rounded to bfloat16 {least:.2e}")
    assert found <= 1.5 * least


def test_bfloat16_states_by_the_public_function(on: Callable[..., Any]) -> None:
    x = make_inputs(GATED_DELTA_RULE, Shape(B=2, T=1, H=1, HV=2, K=32, V=32))
    x.pop("cu_seqlens")
    start = x.pop("initial_state").bfloat16()
    states = [start.clone() for _ in range(2)]
    with on():
        o, S = sleepkern.recurrent_step(**x, state=states[0], backend="cuda")
    expected, _ = sleepkern.recurrent_step(**x, state=states[1], backend="reference")
    assert S is states[0] and S.dtype == torch.bfloat16
    torch.testing.assert_close(o, expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(*states, rtol=1e-2, atol=1e-4)
