"""Pools without a row: every sequence is a padded one, which starts from zero and is written nowhere."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers.backends import HERE
from torch import Tensor

import sleepkern
from sleepkern.nn import short_convolution_step
from sleepkern.rules import GATED_DELTA_RULE
from sleepkern.testing import Shape, call, make_inputs

B, T = 2, 3
PADDED, NO_SLOTS = torch.tensor([-1, -7]), torch.full((B, T), -1)


def without_state() -> dict[str, Any]:
    x = make_inputs(GATED_DELTA_RULE, Shape(B=B, T=T, H=1, HV=2, K=8, V=8))
    return {name: t for name, t in x.items() if name not in ("initial_state", "cu_seqlens")}


def empty() -> Tensor:
    return torch.zeros(0, 2, 8, 8)


@pytest.mark.parametrize("backend", HERE)
def test_prefill(backend: str) -> None:
    x = without_state()
    o, _ = sleepkern.gated_delta_rule(**x, initial_state=empty(), state_indices=PADDED, backend=backend)
    expected, _ = call(GATED_DELTA_RULE, {**x, "initial_state": None, "cu_seqlens": None}, backend)
    assert torch.equal(o, expected)


@pytest.mark.parametrize("backend", HERE)
def test_decode(backend: str) -> None:
    x, options = without_state(), {"state_indices": PADDED, "backend": backend}
    assert not sleepkern.recurrent_step(**x, state=empty(), **options)[0].any()
    drafts = {"states_out": empty(), "states_out_indices": NO_SLOTS}
    assert not sleepkern.recurrent_step(**x, state=empty(), **drafts, **options)[0].any()
    packed = {name: t.flatten(0, 1)[None] for name, t in x.items()}
    assert not sleepkern.recurrent_step(**packed, state=empty(), cu_seqlens=torch.tensor([0, 2, 6]), **options)[0].any()


def test_commit_and_the_short_convolution() -> None:
    sleepkern.commit(empty(), NO_SLOTS, torch.zeros(B, dtype=torch.int64), PADDED)
    y = short_convolution_step(torch.randn(B, 5), torch.zeros(0, 5, 4), torch.randn(5, 4), state_indices=PADDED)
    assert not y.any()
