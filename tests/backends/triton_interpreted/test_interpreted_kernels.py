"""Every kernel, every rule, against the float64 reference: outputs, states and all gradients, at awkward shapes."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any
from unittest import mock

import pytest
import torch
from helpers.errors import errors, results

import sleepkern
from sleepkern.backends.triton import launch
from sleepkern.backends.triton.plan import plan_for
from sleepkern.backends.triton.plan_table import PLAIN_HOPPER, Direction, Precision, TilePlan
from sleepkern.problems.recurrence import Problem
from sleepkern.rules import GATED_DELTA_RULE, KDA, Rule
from sleepkern.testing import TOLERANCE, Shape, call, make_inputs, relative_error, rules_of, to_float64
from sleepkern.testing.tolerances import IN_PIECES

RULES = rules_of("triton")
ALL = pytest.mark.parametrize("rule", RULES.values(), ids=RULES)
TF32 = 2e-3
ONE = {"H": 1, "HV": 1}
SHAPES: dict[str, Shape] = {
    "one token": Shape(T=1, K=16, V=16),
    "T=9 K=5 V=3": Shape(B=2, T=9, K=5, V=3, **ONE),
    "T=15": Shape(T=15, K=32, V=48, **ONE),
    "T=17": Shape(T=17, K=48, V=32, **ONE),
    "T=63": Shape(T=63, K=16, V=32, **ONE),
    "T=65": Shape(T=65, K=32, V=16, **ONE),
    "T=130": Shape(T=130, K=16, V=16, **ONE),
    "grouped": Shape(T=20, H=2, HV=4, K=16, V=16),
    "packed": Shape(H=1, HV=2, K=16, V=16, lengths=(1, 16, 17, 0, 5)),
}
WIDE: dict[str, Shape] = {
    "K=96 V=40": Shape(T=20, K=96, V=40, **ONE),
    "K=200 V=37": Shape(T=18, K=200, V=37, **ONE),
}
VARIANTS: dict[str, dict[str, Any]] = {
    "no decay": {"decay": "zero"},
    "strong": {"decay": "strong"},
    "extreme": {"decay": "extreme"},
    "beta 2, correlated": {"beta_max": 2.0, "correlation": 0.9},
    "from zero": {"initial_state": False},
    "only outputs": {"upstream": "o"},
    "only the state": {"upstream": "state"},
    "state only": {"outputs": False},
    "normalised": {"normalize": True},
    "minus infinity": {"forget": True},
}
REPLAYS: dict[str, tuple[Shape, dict[str, Any]]] = {
    "1": (Shape(T=18, K=16, V=16, **ONE), {"passes": 1}),
    "2, packed": (Shape(K=16, V=16, **ONE, lengths=(3, 0, 20)), {"passes": 2}),
    "2, state only": (Shape(K=16, V=16, **ONE, lengths=(3, 0, 20)), {"passes": 2, "outputs": False}),
    "7": (Shape(T=18, H=1, HV=2, K=16, V=16), {"passes": 7}),
}


@pytest.fixture
def tf32() -> Iterator[None]:
    """float32 products may use tf32, as torch.set_float32_matmul_precision says."""
    torch.set_float32_matmul_precision("high")
    yield
    torch.set_float32_matmul_precision("highest")


def within(found: dict[str, float], tolerance: float) -> None:
    assert all(error <= tolerance for error in found.values()), found


@ALL
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_shapes(rule: Rule, shape: Shape) -> None:
    within(errors(rule, shape), TOLERANCE[torch.float32])


@ALL
@pytest.mark.parametrize("shape", WIDE.values(), ids=WIDE)
def test_wide_heads(rule: Rule, shape: Shape) -> None:
    within(errors(rule, shape), TOLERANCE[torch.float32])


@pytest.mark.parametrize("rule", [GATED_DELTA_RULE, KDA], ids=["gated_delta_rule", "kda"])
@pytest.mark.parametrize("shape", WIDE.values(), ids=WIDE)
def test_wide_heads_in_bfloat16(rule: Rule, shape: Shape) -> None:
    within(errors(rule, shape, torch.bfloat16), TOLERANCE[torch.bfloat16])


@ALL
@pytest.mark.parametrize("variant", VARIANTS.values(), ids=VARIANTS)
def test_variants(rule: Rule, variant: dict[str, Any]) -> None:
    if variant.keys() & {"decay", "forget"} and rule.gate == "none":
        pytest.skip("no gate")
    within(errors(rule, Shape(T=20, H=1, HV=2, K=16, V=16), **variant), TOLERANCE[torch.float32])


@ALL
@pytest.mark.parametrize(
    ("dtype", "T"),
    [(torch.bfloat16, 24), (torch.bfloat16, 64), (torch.bfloat16, 150), (torch.float16, 24), (torch.float16, 70)],
    ids=str,
)
def test_types(rule: Rule, dtype: torch.dtype, T: int) -> None:
    """One window and several chunks of the plans that run on matrix units: 64 rows of bfloat16, 16 or 32 of float16."""
    within(errors(rule, Shape(T=T, K=32, V=32, **ONE), dtype), TOLERANCE[dtype])


@ALL
def test_packed_sequences_in_bfloat16(rule: Rule) -> None:
    """Chunks of 64 rows: one sequence ends inside its second one, and slots stay empty."""
    shape = Shape(K=16, V=16, **ONE, lengths=(1, 70, 0, 5))
    within(errors(rule, shape, torch.bfloat16), TOLERANCE[torch.bfloat16])


@pytest.mark.parametrize("rule", [GATED_DELTA_RULE, KDA], ids=["gated_delta_rule", "kda"])
@pytest.mark.parametrize(("capability", "T"), [(90, 70), (PLAIN_HOPPER, 24), (PLAIN_HOPPER, 70)])
def test_plans_of_hopper(rule: Rule, capability: int, T: int) -> None:
    """Which of two tables a Hopper takes depends on its assembler: neither is what this device would take."""

    def plan_of(p: Problem, precision: Precision, direction: Direction) -> TilePlan:
        return plan_for(p.K, p.V, precision, p.rule.gate == "channel", p.T, direction, capability)

    with mock.patch.object(launch, "plan_of", plan_of):
        within(errors(rule, Shape(T=T, K=32, V=32, **ONE), torch.bfloat16), TOLERANCE[torch.bfloat16])


@ALL
def test_tf32(rule: Rule, tf32: None) -> None:
    found = errors(rule, Shape(T=80, K=32, V=32, **ONE))
    within(found, TF32)
    assert max(found.values()) > 2e-5  # it did round


@ALL
@pytest.mark.parametrize(("shape", "options"), REPLAYS.values(), ids=REPLAYS)
def test_replay(rule: Rule, shape: Shape, options: dict[str, Any]) -> None:
    within(errors(rule, shape, **options), TOLERANCE[torch.float32])


@ALL
def test_replay_in_bfloat16(rule: Rule) -> None:
    within(errors(rule, Shape(T=40, K=32, V=32, **ONE), torch.bfloat16, passes=3), TOLERANCE[torch.bfloat16])


@ALL
@pytest.mark.parametrize("T", [1, 3, 16, 20])
def test_steps_in_place(rule: Rule, T: int) -> None:
    x = make_inputs(rule, Shape(B=2, T=T, H=1, HV=2, K=24, V=37), seed=6)
    expected_o, expected_S = call(rule, to_float64(x), "reference")
    state = x["initial_state"].clone()
    given = (x["q"], x["k"], x["v"], x["g"], x["beta"])
    o, same = sleepkern.recurrent_step(*given, state, rule=rule, backend="triton")
    assert same is state and expected_S is not None
    assert (
        relative_error(o, expected_o) < TOLERANCE[torch.float32]
        and relative_error(state, expected_S) < TOLERANCE[torch.float32]
    )
    strided = x["initial_state"].transpose(2, 3).contiguous().transpose(2, 3)
    sleepkern.recurrent_step(*given, strided, rule=rule, backend="triton")
    assert torch.equal(strided, state)


@ALL
def test_slices_of_one_projection_are_read_in_place(rule: Rule) -> None:
    """q, k, v, g and beta side by side, and a transposed state: bit for bit what contiguous tensors give."""
    shape = Shape(B=2, T=20, K=16, V=16, **ONE)
    x = make_inputs(rule, shape, seed=7)
    do, dstate = torch.randn(x["v"].shape), torch.randn(2, 1, 16, 16)
    expected = results(rule, x, "triton", do, dstate)
    names = [n for n in ("q", "k", "v", "g", "beta") if x[n] is not None]
    wide = torch.cat([x[n].flatten(2) for n in names], -1).requires_grad_()
    parts = wide.split([x[n].flatten(2).shape[-1] for n in names], -1)
    sliced = {n: part.unflatten(-1, x[n].shape[2:]) for n, part in zip(names, parts, strict=True)}
    state = x["initial_state"].transpose(2, 3).contiguous().transpose(2, 3).requires_grad_()
    assert not any(t.is_contiguous() for t in (*sliced.values(), state))
    o, S = call(rule, {**x, **sliced, "initial_state": state}, "triton")
    assert S is not None
    torch.autograd.backward([o, S], [do, dstate])
    assert torch.equal(o, expected["o"]) and torch.equal(S, expected["state"])
    assert wide.grad is not None and state.grad is not None
    assert torch.equal(wide.grad, torch.cat([expected[n].flatten(2) for n in names], -1))
    assert torch.equal(state.grad, expected["initial_state"])


@ALL
def test_one_call_is_several_chained_calls(rule: Rule) -> None:
    x = make_inputs(rule, Shape(T=41, K=16, V=16, **ONE), seed=5)
    whole_o, whole_S = call(rule, x, "triton")
    outputs, state = [], x["initial_state"]
    for a, b in ((0, 20), (20, 21), (21, 41)):
        cut = {n: t[:, a:b] if n in ("q", "k", "v", "g", "beta") and t is not None else t for n, t in x.items()}
        o, state = call(rule, {**cut, "initial_state": state}, "triton")
        outputs.append(o)
    assert whole_S is not None and state is not None
    assert relative_error(torch.cat(outputs, 1), whole_o) < IN_PIECES and relative_error(state, whole_S) < IN_PIECES


@ALL
def test_no_tokens_return_the_initial_state(rule: Rule) -> None:
    x = make_inputs(rule, Shape(B=2, T=0, K=8, V=8))
    o, S = call(rule, x, "triton")
    assert o.shape == (2, 0, 2, 8) and S is not None and torch.equal(S, x["initial_state"])
    dstate = torch.randn(S.shape)
    found = results(rule, x, "triton", torch.empty(o.shape), dstate)
    assert torch.equal(found["initial_state"], dstate)
    assert all(found[n].shape == x[n].shape for n in ("q", "k", "v", "beta"))


@ALL
def test_two_runs_are_equal_bit_for_bit(rule: Rule) -> None:
    """No atomics: one program makes a sum, in one order. Grouped heads and normalisation sum over value heads."""
    x = make_inputs(rule, Shape(T=20, H=1, HV=2, K=16, V=16), seed=8)
    do, dstate = torch.randn(x["v"].shape), torch.randn(1, 2, 16, 16)
    first, second = (results(rule, x, "triton", do, dstate, normalize=True) for _ in range(2))
    assert first.keys() == second.keys() and all(torch.equal(first[n], second[n]) for n in first)


@pytest.mark.parametrize("precision", ["bf16", "tf32", "ieee"])
def test_every_chunk_length_is_met(precision: Any) -> None:
    """The shapes above run chunks of 16 to 64 rows; a plan whose chunk they miss would go untested."""
    chunks = {plan_for(32, 32, precision, channel, 150, "backward").chunk for channel in (False, True)}
    assert chunks <= {16, 32, 64}
