"""The variants of kernels, which plans may choose, against the float64 reference: outputs, states and all gradients."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers.errors import errors
from variants import with_variants

from sleepkern.backends.triton import launch
from sleepkern.backends.triton.plan_table import Variant
from sleepkern.rules import GATED_DELTA_RULE, GLA, SIMPLE_GLA, Rule
from sleepkern.testing import TOLERANCE, Shape

ONE = {"H": 1, "HV": 1, "K": 16, "V": 16}
RULES = (GATED_DELTA_RULE, GLA)
VARIANTS: dict[str, dict[str, Variant]] = {
    "decays": {"state_pass": "decays", "state_pass_backward": "decays"},
    "decays of one state pass": {"state_pass_backward": "decays"},
    "products": {"chunk_backward": "products"},
    "segments": {"state_pass": "segments"},
}
CALLS: dict[str, tuple[Shape, dict[str, Any]]] = {
    "three chunks": (Shape(T=40, **ONE), {}),
    "packed, normalised": (Shape(H=1, HV=2, K=24, V=16, lengths=(1, 37, 0, 5)), {"normalize": True}),
    "grouped, strong decay": (Shape(T=35, H=2, HV=4, K=16, V=40), {"decay": "strong"}),
    "eight chunks": (Shape(B=2, T=128, **ONE), {}),
    "the state alone": (Shape(T=40, **ONE), {"outputs": False}),
    "two passes": (Shape(T=40, **ONE), {"passes": 2}),
}


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.name)
@pytest.mark.parametrize("variants", VARIANTS.values(), ids=VARIANTS)
@pytest.mark.parametrize(("shape", "options"), CALLS.values(), ids=CALLS)
def test_variants_of_every_rule(
    rule: Rule, variants: dict[str, Variant], shape: Shape, options: dict[str, Any]
) -> None:
    with with_variants(launch, variants):
        found = errors(rule, shape, **options)
    assert all(error <= TOLERANCE[torch.float32] for error in found.values()), found


@pytest.mark.parametrize("rule", [GATED_DELTA_RULE, SIMPLE_GLA], ids=lambda rule: rule.name)
@pytest.mark.parametrize("variants", VARIANTS.values(), ids=VARIANTS)
def test_variants_in_bfloat16(rule: Rule, variants: dict[str, Variant]) -> None:
    with with_variants(launch, variants):
        found = errors(rule, Shape(T=256, H=1, HV=1, K=32, V=32), torch.bfloat16)
    assert all(error <= TOLERANCE[torch.bfloat16] for error in found.values()), found
