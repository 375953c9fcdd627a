"""Decode on states that lie in a pool, by every backend that runs here."""

from __future__ import annotations

import pytest
import torch
from helpers.backends import HERE

import sleepkern
from sleepkern.rules import GATED_DELTA_RULE
from sleepkern.testing import Shape, make_inputs, relative_error
from sleepkern.testing.tolerances import SAME_GRADIENTS


def inputs(rows: int = 3) -> dict[str, torch.Tensor]:
    x = make_inputs(GATED_DELTA_RULE, Shape(B=rows, T=2, H=1, HV=2, K=16, V=24))
    return {name: x[name] for name in ("q", "k", "v", "g", "beta")}


@pytest.mark.parametrize("inplace", [True, False])
@pytest.mark.parametrize("backend", HERE)
def test_rows_go_on_from_their_states(backend: str, inplace: bool) -> None:
    x, dtype = inputs(), torch.float32
    pool = torch.randn(5, 2, 16, 24, dtype=dtype)
    before, places = pool.clone(), torch.tensor([4, -1, 1])
    o, S = sleepkern.recurrent_step(**x, state=pool, state_indices=places, inplace=inplace, backend=backend)
    picked = before[[4, 0, 1]].clone()
    o_expected, picked = sleepkern.recurrent_step(**x, state=picked, backend="reference")
    assert (S is pool) == inplace
    assert torch.equal(pool, before) or inplace
    assert relative_error(o[[0, 2]], o_expected[[0, 2]]) <= SAME_GRADIENTS and not o[1].any()
    assert relative_error(S[[4, 1]], picked[[0, 2]]) <= SAME_GRADIENTS
    assert torch.equal(S[[0, 2, 3]], before[[0, 2, 3]])


def test_gradients_reach_the_pool() -> None:
    x, pool = inputs(2), torch.randn(4, 2, 16, 24).requires_grad_()
    o, S = sleepkern.recurrent_step(**x, state=pool, state_indices=torch.tensor([3, 0]), inplace=False)
    (o.sum() + S.sum()).backward()
    picked = pool.detach()[[3, 0]].requires_grad_()
    o, S = sleepkern.recurrent_step(**x, state=picked, inplace=False, backend="reference")
    (o.sum() + S.sum()).backward()
    assert relative_error(pool.grad[[3, 0]], picked.grad) <= SAME_GRADIENTS
    assert torch.equal(pool.grad[[1, 2]], torch.ones_like(pool.grad[[1, 2]]))


def test_under_torch_compile() -> None:
    x, pool = inputs(), torch.randn(5, 2, 16, 24)
    places, expected = torch.tensor([4, 2, 1]), pool.clone()
    o_expected, _ = sleepkern.recurrent_step(**x, state=expected, state_indices=places)
    compiled = torch.compile(sleepkern.recurrent_step, backend="aot_eager", fullgraph=True)
    o, _ = compiled(**x, state=pool, state_indices=places)
    assert torch.equal(o, o_expected) and torch.equal(pool, expected)


@pytest.mark.parametrize(
    ("places", "message"),
    [
        (torch.tensor([0, 1]), r"state_indices: got shape \[2\]; expected \[3\]"),
        (torch.tensor([0.0, 1, 2]), "state_indices: got torch.float32; expected torch.int32 or torch.int64"),
        (torch.tensor([0, 1, 5]), "state_indices: got 5; expected less than 5"),
        (torch.tensor([0, 1, 1]), "expected every state once"),
        ([0, 1, 2], "state_indices: got list; expected a torch.Tensor"),
    ],
)
def test_bad_indices(places: object, message: str) -> None:
    with pytest.raises((ValueError, TypeError), match=message):
        sleepkern.recurrent_step(**inputs(), state=torch.zeros(5, 2, 16, 24), state_indices=places)


def test_bad_pool() -> None:
    with pytest.raises(ValueError, match=r"state: got shape \[5, 2, 16, 8\]; expected \[n, 2, 16, 24\]"):
        sleepkern.recurrent_step(**inputs(), state=torch.zeros(5, 2, 16, 8), state_indices=torch.tensor([0, 1, 2]))
