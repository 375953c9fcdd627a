"""The definition itself: against a recurrence written out in plain Python, closed forms, and gradcheck."""

from __future__ import annotations

import math

import pytest
import torch

import sleepkern
from sleepkern import rules
from sleepkern.rules import Rule
from sleepkern.testing import Shape, call, make_inputs, relative_error
from sleepkern.testing.tolerances import REORDERED_DOUBLE


def written_out(rule: Rule, x: dict, head: int, scale: float) -> tuple[list[list[float]], list[list[float]]]:
    """S_t = (I - b k k^T) diag(a) S + b k v^T and o = scale S^T q for one head of batch 0, in Python floats."""
    K, V = x["k"].shape[3], x["v"].shape[3]
    key_head = head // (x["v"].shape[2] // x["k"].shape[2])
    S = x["initial_state"][0, head].tolist()
    outputs = []
    for t in range(x["k"].shape[1]):
        q, k, v = x["q"][0, t, key_head].tolist(), x["k"][0, t, key_head].tolist(), x["v"][0, t, head].tolist()
        b = x["beta"][0, t, head].item()
        a = [1.0] * K
        if rule.gate == "head":
            a = [math.exp(x["g"][0, t, head].item())] * K
        if rule.gate == "channel":
            a = [math.exp(g) for g in x["g"][0, t, head].tolist()]
        S = [[a[d] * S[d][j] for j in range(V)] for d in range(K)]
        held = [sum(k[d] * S[d][j] for d in range(K)) if rule.delta else 0.0 for j in range(V)]
        S = [[S[d][j] + b * k[d] * (v[j] - held[j]) for j in range(V)] for d in range(K)]
        outputs.append([scale * sum(q[d] * S[d][j] for d in range(K)) for j in range(V)])
    return outputs, S


def test_reference_is_the_written_equation(rule: Rule) -> None:
    x = make_inputs(rule, Shape(T=9, H=2, HV=4, K=5, V=3), torch.float64, beta_max=2.0)
    o, S = call(rule, x, "reference", scale=0.7)
    assert S is not None
    for head in range(4):
        outputs, state = written_out(rule, x, head, 0.7)
        assert relative_error(o[0, :, head], torch.tensor(outputs, dtype=torch.float64)) < REORDERED_DOUBLE
        assert relative_error(S[0, head], torch.tensor(state, dtype=torch.float64)) < REORDERED_DOUBLE


def test_scale_defaults_to_inverse_root_of_K(rule: Rule) -> None:
    x = make_inputs(rule, Shape(T=4, K=16), torch.float64)
    assert torch.equal(call(rule, x, "reference")[0], call(rule, x, "reference", scale=0.25)[0])


def test_normalisation_divides_by_the_length(rule: Rule) -> None:
    x = make_inputs(rule, Shape(T=5, K=8), torch.float64)
    longer = {**x, "q": 3 * x["q"], "k": 5 * x["k"]}
    o, _ = call(rule, longer, "reference", use_qk_l2norm_in_kernel=True)
    assert relative_error(o, call(rule, x, "reference")[0]) < 1e-5  # the eps under the root


@pytest.mark.parametrize("decay", ["slow", "zero"])
def test_gradcheck(rule: Rule, decay: str) -> None:
    x = make_inputs(rule, Shape(T=4, H=1, HV=2, K=3, V=2), torch.float64, decay=decay)
    names = [n for n, t in x.items() if isinstance(t, torch.Tensor)]
    if decay == "zero":
        names = [n for n in names if n != "g"]  # a finite difference would step to g > 0

    def run(*tensors: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        return call(rule, {**x, **dict(zip(names, tensors, strict=True))}, "reference")

    assert torch.autograd.gradcheck(run, [x[n].clone().requires_grad_() for n in names])


def test_unit_beta_erases_what_a_key_held() -> None:
    """With b = 1, |k| = 1, no decay, the delta rule replaces the value stored under k exactly."""
    k = torch.eye(4, dtype=torch.float64)[None, [0, 0], None]
    v = torch.randn(1, 2, 1, 3, dtype=torch.float64)
    o, S = sleepkern.delta_rule(k, k, v, torch.ones(1, 2, 1, dtype=torch.float64), scale=1.0, output_final_state=True)
    assert S is not None
    torch.testing.assert_close(S[0, 0, 0], v[0, 1, 0])
    torch.testing.assert_close(o, v)


def test_rules_are_one_family() -> None:
    """A head decay is a channel decay of equal channels; no decay is g = 0."""
    x = make_inputs(rules.GATED_DELTA_RULE, Shape(T=20), torch.float64)
    spread = {**x, "g": x["g"][..., None].expand(-1, -1, -1, 64)}
    still = {**x, "g": torch.zeros_like(x["g"])}
    head, _ = call(rules.GATED_DELTA_RULE, x, "reference")
    assert relative_error(call(rules.KDA, spread, "reference")[0], head) < REORDERED_DOUBLE
    none, _ = call(rules.DELTA_RULE, x, "reference")
    assert relative_error(call(rules.GATED_DELTA_RULE, still, "reference")[0], none) < REORDERED_DOUBLE
