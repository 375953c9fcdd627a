"""The operators as torch knows them, which anybody may call, check what they are given."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import sleepkern.nn  # noqa: F401  # defines the operators of short convolutions and gated norms
from sleepkern.rules import GATED_DELTA_RULE
from sleepkern.testing import Shape, make_inputs

SHAPE = Shape(B=2, T=7, H=1, HV=2, K=8, V=8)
STEP = ("q", "k", "v", "g", "beta")
X, WEIGHT = torch.randn(2, 5, 6), torch.randn(6, 4)


def operator_calls() -> dict[str, tuple[Any, list[Any]]]:
    x = make_inputs(GATED_DELTA_RULE, SHAPE)
    tensors = [x[n] for n in (*STEP, "initial_state")] + [None]
    options = ["gated_delta_rule", "cpu", 0.3, True]
    replay = [1, None, "auto"]
    ops = torch.ops.sleepkern
    mixed = [X, WEIGHT, torch.randn(6), torch.randn(2, 3, 6), None, True]
    normed = [X, X + 1, torch.randn(6), 1e-6, True, False]
    return {
        "ingest": (ops.ingest.default, [*tensors, *options, *replay]),
        "ingest_backward": (
            ops.ingest_backward.default, [*tensors, *options, *replay, x["v"], x["initial_state"]],
        ),
        "step": (ops.step.default, [*tensors, *options, None]),
        "convolve": (ops.convolve.default, mixed),
        "convolve_backward": (ops.convolve_backward.default, [*mixed, X, torch.randn(2, 3, 6)]),
        "gated_norm": (ops.gated_norm.default, normed),
        "gated_norm_backward": (ops.gated_norm_backward.default, [*normed, X]),
    }  # fmt: skip


@pytest.mark.parametrize("name", operator_calls())
def test_operators_check_what_anybody_gives_them(name: str) -> None:
    operator, given = operator_calls()[name]
    operator(*given)
    right = {("step", 3), ("step", 4), ("ingest", 3), ("ingest", 4), ("ingest_backward", 3), ("ingest_backward", 4)}
    for i, t in enumerate(given):
        if not isinstance(t, Tensor):
            continue
        wrong = [t[..., :-1], t[:0], t[None], t.long(), t.to_sparse()]
        wrong += [] if (name, i) in right else [t.double()]  # gates may be of any type
        wrong += [] if t.dim() == 1 or (name, i) == ("convolve", 0) else [t[:, :-1]]
        for w in wrong:
            with pytest.raises((ValueError, TypeError, NotImplementedError)):
                operator(*given[:i], w, *given[i + 1 :])
    operator(*given)


def test_operators_check_options() -> None:
    operator, given = operator_calls()["ingest"]
    for i, wrong in ((3, None), (7, "mamba"), (8, "gpu"), (8, "triton"), (9, float("nan")), (11, 0), (13, "power")):
        with pytest.raises((ValueError, TypeError)):
            operator(*given[:i], wrong, *given[i + 1 :])
    x = make_inputs(GATED_DELTA_RULE, Shape(T=70, H=1, HV=1, K=8, V=8))
    with pytest.raises(ValueError, match="method 'rank' needs one chunk"):
        operator(*(x[n] for n in STEP), None, None, "gated_delta_rule", "cpu", 0.3, True, 3, None, "rank")
    operator, given = operator_calls()["convolve"]
    with pytest.raises(ValueError, match="weight: got W = 100; expected at most"):
        operator(X, torch.zeros(6, 100), None, None, None, True)
