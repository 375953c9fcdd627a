"""States along the sequences, gradients through them, and decode on bfloat16 states, against the float64 reference."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from helpers.states_along import along_errors, decode_errors, growth
from variants import with_variants

import sleepkern
from sleepkern.backends import triton
from sleepkern.backends.triton import launch
from sleepkern.backends.triton.plan import dividing, plan_for
from sleepkern.backends.triton.plan_table import Variant
from sleepkern.measure.cases import Case
from sleepkern.rules import GATED_DELTA_RULE, KDA, Rule
from sleepkern.testing import TOLERANCE, Shape, make_inputs, relative_error, rules_of

RULES = rules_of("triton")
ALL = pytest.mark.parametrize("rule", RULES.values(), ids=RULES)
ONE = {"H": 1, "HV": 1, "K": 16, "V": 16}
CALLS: dict[str, tuple[Shape, int, dict[str, Any]]] = {
    "T=40 n=16": (Shape(T=40, **ONE), 16, {}),
    "T=96 n=48": (Shape(T=96, **ONE), 48, {}),
    "T=70 n=64, states": (Shape(B=2, T=70, **ONE), 64, {"upstream": "states"}),
    "T=33 n=128": (Shape(T=33, **ONE), 128, {"upstream": "states"}),
    "packed n=16": (Shape(H=1, HV=2, K=24, V=37, lengths=(0, 1, 16, 0, 37, 5, 0)), 16, {}),
    "packed n=48": (Shape(**ONE, lengths=(49, 0, 47)), 48, {"upstream": "states"}),
    "no tokens": (Shape(T=0, **ONE), 16, {}),
}
DECAYS: dict[str, Variant] = {"state_pass": "decays", "state_pass_backward": "decays"}
SEGMENTS: dict[str, Variant] = {"state_pass": "segments"}


def within(found: dict[str, float], tolerance: float) -> None:
    assert all(error <= tolerance for error in found.values()), found


@ALL
@pytest.mark.parametrize(("shape", "every", "options"), CALLS.values(), ids=CALLS)
def test_states_along(rule: Rule, shape: Shape, every: int, options: dict[str, Any]) -> None:
    within(along_errors(rule, shape, state_every=every, **options), TOLERANCE[torch.float32])


@pytest.mark.parametrize("rule", [GATED_DELTA_RULE, KDA], ids=["gated_delta_rule", "kda"])
@pytest.mark.parametrize("every", [16, 48, 64, 128])
def test_states_along_in_bfloat16(rule: Rule, every: int) -> None:
    """The plan has chunks of 64: n = 48 takes chunks of 16, and n = 128 stores one state in two chunks."""
    shape = Shape(T=140, H=1, HV=1, K=32, V=32)
    within(along_errors(rule, shape, torch.bfloat16, state_every=every), TOLERANCE[torch.bfloat16])


@pytest.mark.parametrize("variants", [DECAYS, SEGMENTS], ids=["decays", "segments"])
def test_states_along_with_variants(variants: dict[str, Variant]) -> None:
    """A state pass on two levels has no states along a sequence: such a call takes one level."""
    with with_variants(launch, variants):
        within(
            along_errors(GATED_DELTA_RULE, Shape(T=128, **ONE), state_every=32), TOLERANCE[torch.float32]
        )  # fmt: skip


def test_the_public_functions() -> None:
    """States along a sequence, their gradients, and drafts whose states go to the pool that they start in."""
    rule, found = GATED_DELTA_RULE, []
    for backend in ("triton", "reference"):
        x = make_inputs(rule, Shape(B=2, T=40, H=1, HV=2, K=16, V=16), seed=3)
        x.pop("cu_seqlens")
        x = {name: t.double() if backend == "reference" else t for name, t in x.items()}
        leaves = {name: t.clone().requires_grad_() for name, t in x.items()}
        o, S, states = sleepkern.gated_delta_rule(**leaves, state_every=32, backend=backend)
        states.sin().sum().backward()
        assert S is None
        pool = torch.zeros(12, 2, 16, 16, dtype=x["v"].dtype)
        pool[:2] = x.pop("initial_state")
        few = {name: t[:, :4] for name, t in x.items()}
        rows = torch.arange(2, 10).view(2, 4)
        targets = {"states_out": pool, "states_out_indices": rows, "state_indices": torch.arange(2)}
        decoded, _ = sleepkern.recurrent_step(**few, state=pool, **targets, rule=rule, backend=backend)
        found.append(
            [o, states, decoded, pool, *(leaves[name].grad for name in ("k", "v", "g", "beta", "initial_state"))]
        )
    errors = [relative_error(a.detach(), b.detach()) for a, b in zip(*found, strict=True)]
    assert max(errors) <= TOLERANCE[torch.float32], errors


def test_chunks_divide_the_tokens_between_states() -> None:
    for T in (20, 100, 8192):
        for every in (16, 32, 48, 64, 80, 96, 128, 192, 1024):
            for precision in ("bf16", "tf32", "ieee"):
                plan = plan_for(128, 128, precision, False, T, "forward")
                problem = Case("forward", GATED_DELTA_RULE, Shape(T=T, K=128, V=128)).problem()
                made = dividing(plan, problem._replace(state_every=every))
                assert every % made.chunk == 0 and made.chunk >= 16
                assert (made == plan) == (every % plan.chunk == 0)


def test_refuses_states_inside_a_chunk() -> None:
    problem = Case("forward", GATED_DELTA_RULE, Shape(T=64)).problem()
    assert triton.why_not(problem._replace(state_every=48)) is None
    assert "16" in (triton.why_not(problem._replace(state_every=40)) or "")
    assert "chunks of 16" in triton.kernel(problem._replace(state_every=48, dtype=torch.bfloat16))


@ALL
@pytest.mark.parametrize("states", [torch.float32, torch.bfloat16], ids=str)
def test_decode_states(rule: Rule, states: torch.dtype) -> None:
    """In place, in a pool, and with the states after each token, which are those of the reference to the last bit."""
    found = decode_errors(rule, Shape(B=3, T=3, H=1, HV=2, K=24, V=37), states=states)
    within(found, TOLERANCE[torch.float32] if states == torch.float32 else ROUNDED)


@ALL
@pytest.mark.parametrize(
    "steps", [20, *(pytest.param(n, marks=pytest.mark.hardening) for n in (1000, 20_000))]
)  # fmt: skip
def test_error_growth_of_bfloat16_states(rule: Rule, steps: int) -> None:
    """The error is what the type costs: that of float64 sums which each step rounds to bfloat16."""
    found, least = growth(rule, steps, "triton")
    print(f"{rule.name}: {found:.2e} after {steps} steps; float64 sums rounded to bfloat16 {least:.2e}")
    assert found <= 1.5 * least


def test_decode_states_of_sixteen_tokens() -> None:
    """More tokens than a decode in place has."""
    found = decode_errors(GATED_DELTA_RULE, Shape(B=2, T=16, **ONE), torch.bfloat16, torch.bfloat16, in_place=False)
    within(found, TOLERANCE[torch.bfloat16])


def test_chunks_of_a_step_on_bfloat16_states() -> None:
    """A step of more tokens than decode takes one by one goes through chunks, on the same states."""
    x = Shape(B=2, T=20, **ONE)
    within(decode_errors(KDA, replace(x, T=20), torch.bfloat16, torch.bfloat16), TOLERANCE[torch.bfloat16])


ROUNDED = 5e-4
"""A few values of a state lie between two numbers of bfloat16, so that float32 and float64 round them apart. All cut
off in place of rounded are 3e-3 apart."""
