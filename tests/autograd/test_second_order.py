"""Derivatives beyond the first reverse one: gradients of gradients are right, forward mode is refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad

import sleepkern
from sleepkern.backends import reference
from sleepkern.problems.recurrence import Tensors, describe
from sleepkern.rules import DELTA_RULE, GATED_DELTA_RULE, GLA, KDA, RULES, SIMPLE_GLA, Rule
from sleepkern.testing import Shape, make_inputs, relative_error, to_float64
from sleepkern.testing.tolerances import BLOCK_GRADIENTS, SAME_GRADIENTS

NAMES = ("q", "k", "v", "g", "beta", "initial_state")


def penalised(o: Tensor, S: Tensor, leaves: list[Tensor]) -> list[Tensor]:
    """Gradients of a loss with a penalty on its gradients."""
    weights = torch.linspace(-1, 1, o.numel(), dtype=o.dtype).view(o.shape)
    loss = (o * weights).sum() + S.square().mean()
    first = torch.autograd.grad(loss, leaves, create_graph=True)
    return list(torch.autograd.grad(loss + sum(d.square().sum() for d in first), leaves))


@pytest.mark.parametrize("passes", [1, 3])
@pytest.mark.parametrize("rule", [GATED_DELTA_RULE, KDA, DELTA_RULE, SIMPLE_GLA, GLA], ids=lambda r: r.name)
def test_gradients_of_gradients(rule: Rule, passes: int) -> None:
    x = make_inputs(rule, Shape(T=20, H=1, HV=2, K=6, V=5))
    results = []
    for inputs, exact in ((x, False), (to_float64(x), True)):
        leaves = {n: inputs[n].detach().requires_grad_() for n in NAMES if inputs[n] is not None}
        full: dict[str, Any] = {**inputs, **leaves}
        if exact:
            tensors = Tensors(*(full[n] for n in NAMES), None)
            made = reference.forward(describe(RULES[rule.name], tensors, 6**-0.5, False, passes), tensors)
            o, S = made.o, made.state
        else:
            made = sleepkern.sleep_ingest(**full, rule=rule, passes=passes)
            o, S = made.output, made.final_state
        assert o is not None
        results.append(penalised(o, S, list(leaves.values())))
    for ours, true in zip(*results, strict=True):
        assert relative_error(ours, true) < BLOCK_GRADIENTS


def test_one_tensor_as_two_inputs() -> None:
    x = make_inputs(GATED_DELTA_RULE, Shape(T=9, H=1, HV=1, K=6, V=6))
    k = x["k"].requires_grad_()

    def grad(create_graph: bool) -> Tensor:
        o, _ = sleepkern.gated_delta_rule(**(x | {"q": k, "k": k}))
        return torch.autograd.grad(o.square().sum(), k, create_graph=create_graph)[0]

    assert relative_error(grad(True), grad(False).double()) < SAME_GRADIENTS


def test_forward_mode_is_refused() -> None:
    x = make_inputs(GATED_DELTA_RULE, Shape(T=9, H=1, HV=1, K=6, V=6))
    with forward_ad.dual_level(), pytest.raises(NotImplementedError, match="reverse mode only"):
        sleepkern.gated_delta_rule(**(x | {"k": forward_ad.make_dual(x["k"], torch.randn_like(x["k"]))}))
    with pytest.raises(NotImplementedError, match="reverse mode only"):
        torch.func.jvp(lambda k: sleepkern.gated_delta_rule(**(x | {"k": k}))[0], (x["k"],), (x["k"],))
    with forward_ad.dual_level():
        assert sleepkern.gated_delta_rule(**x)[0].isfinite().all()
