"""The Triton backend as torch sees it: operators, compilation without graph breaks, nothing read by the host."""

from __future__ import annotations

import pytest
import torch

import sleepkern
from sleepkern.rules import GATED_DELTA_RULE, GLA, KDA, Rule
from sleepkern.testing import Shape, call, make_inputs, relative_error
from sleepkern.testing.tolerances import SAME_SUMS

PACKED = Shape(H=1, HV=1, K=16, V=16, lengths=(3, 0, 18))


@pytest.mark.parametrize("rule", [GATED_DELTA_RULE, GLA], ids=["gated_delta_rule", "gla"])
def test_compiled_without_graph_breaks(rule: Rule) -> None:
    x = make_inputs(rule, PACKED)
    expected, _ = call(rule, x, "triton")
    compiled = torch.compile(lambda y: call(rule, y, "triton")[0], fullgraph=True, backend="eager")
    assert relative_error(compiled(x), expected) < SAME_SUMS


def test_operators_are_well_behaved() -> None:
    x = make_inputs(KDA, Shape(T=3, H=1, HV=1, K=16, V=16))
    tensors = [None if t is None else t.requires_grad_() for t in x.values()]
    options = ("kda", "triton", 0.25, False, 1, None, "auto")
    torch.library.opcheck(torch.ops.sleepkern.ingest.default, (*tensors, *options))


def test_explain_names_the_kernel() -> None:
    x = make_inputs(KDA, Shape(T=100, H=1, HV=1, K=16, V=16), torch.bfloat16)
    assert sleepkern.explain(KDA, **x, backend="triton").kernel == "Triton, chunks of 64, bf16 products"
    assert "replay by wy" in sleepkern.explain(KDA, **x, passes=2, backend="triton").kernel
    few = make_inputs(KDA, Shape(T=5, H=1, HV=1, K=16, V=16), torch.bfloat16)
    assert sleepkern.explain(KDA, **few, backend="triton").kernel == "Triton, token by token"


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"tol": 1e-3, "passes": 3}, "cannot stop heads early"),
        ({"method": "affine", "passes": 3}, "not by affine"),
    ],
)
def test_refusals_are_sentences(options: dict[str, object], reason: str) -> None:
    x = make_inputs(KDA, Shape(T=5, H=1, HV=1, K=16, V=16))
    with pytest.raises(ValueError, match=reason):
        sleepkern.sleep_ingest(**x, rule=KDA, backend="triton", **options)
