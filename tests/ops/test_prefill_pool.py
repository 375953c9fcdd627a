"""Rules that start from rows of a pool of states and end in rows of it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers.backends import HERE
from torch import Tensor

import sleepkern
from sleepkern.rules import GATED_DELTA_RULE, RULES, Rule
from sleepkern.testing import Shape, call, make_inputs, relative_error
from sleepkern.testing.tolerances import SAME_SUMS

BATCH, PACKED = Shape(B=3, T=70, H=1, HV=2, K=16, V=12), Shape(H=1, HV=2, K=16, V=12, lengths=(40, 0, 30))
READ, WRITTEN = torch.tensor([4, 4, -1]), torch.tensor([0, -1, 4], dtype=torch.int32)


def new_pool(dtype: torch.dtype = torch.float32) -> Tensor:
    """A pool of 6 states, each beside one that is not of the pool."""
    return torch.randn(6, 2, 2, 16, 12, generator=torch.Generator().manual_seed(3)).to(dtype)[:, 1]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", [BATCH, PACKED], ids=["batch", "packed"])
@pytest.mark.parametrize("rule", RULES.values(), ids=str)
@pytest.mark.parametrize("backend", HERE)
def test_rows_are_read_and_written(backend: str, rule: Rule, shape: Shape, dtype: torch.dtype) -> None:
    x, pool = make_inputs(rule, shape), new_pool(dtype)
    before = pool.clone()
    start = before[READ.clamp_min(0)].float() * (READ >= 0)[:, None, None, None]
    o_expected, S_expected = call(rule, {**x, "initial_state": start}, backend)
    o, S = call(
        rule, {**x, "initial_state": pool}, backend, state_indices=READ, output_state_indices=WRITTEN,
    )  # fmt: skip
    assert S is pool and S_expected is not None
    assert relative_error(o, o_expected) <= SAME_SUMS
    assert relative_error(pool[[0, 4]], S_expected[[0, 2]].to(dtype)) <= SAME_SUMS
    assert torch.equal(pool[[1, 2, 3, 5]], before[[1, 2, 3, 5]])


def test_rows_that_are_read_are_those_that_are_written_by_default() -> None:
    x, pool = make_inputs(GATED_DELTA_RULE, BATCH), new_pool()
    rows = torch.tensor([5, 2, 0])
    _, expected = call(GATED_DELTA_RULE, {**x, "initial_state": pool[rows]})
    sleepkern.gated_delta_rule(**{**x, "initial_state": pool}, state_indices=rows)
    assert expected is not None and relative_error(pool[rows], expected) <= SAME_SUMS


def test_states_along_the_way_beside_a_pool() -> None:
    x, pool = make_inputs(GATED_DELTA_RULE, BATCH), new_pool()
    rows = torch.tensor([5, 2, 0])
    states = call(GATED_DELTA_RULE, {**x, "initial_state": pool}, state_indices=rows, state_every=32)[2]  # type: ignore[misc]
    assert torch.equal(states[:, -1], pool[rows])


BAD: dict[str, tuple[dict[str, Any], str]] = {
    "twice": ({"state_indices": torch.tensor([1, 1, 2])}, "state_indices: got .* expected every state once"),
    "written twice": (
        {"state_indices": READ, "output_state_indices": torch.tensor([1, 1, 2])},
        "output_state_indices: got .* expected every state once",
    ),
    "beyond": ({"state_indices": torch.tensor([1, 6, 2])}, "state_indices: got 6; expected less than 6"),
    "shape": ({"state_indices": torch.tensor([1])}, r"state_indices: got shape \[1\]; expected \[3\]"),
    "type": ({"state_indices": torch.tensor([1.0, 2, 3])}, "state_indices: got torch.float32; expected torch.int32"),
    "no rows to read": ({"output_state_indices": WRITTEN}, "state_indices: got None; expected the states to start"),
    "no pool": ({"state_indices": READ, "initial_state": None}, "initial_state: got None; expected a pool"),
    "half": ({"state_indices": WRITTEN, "initial_state": new_pool().half()}, "initial_state: got torch.float16"),
    "head sizes": (
        {"state_indices": WRITTEN, "initial_state": torch.zeros(6, 2, 16, 13)},
        r"initial_state: got shape \[6, 2, 16, 13\]; expected \[n, 2, 16, 12\], a pool of n states",
    ),
    "rows that overlap": (
        {"state_indices": WRITTEN, "initial_state": torch.zeros(1, 2, 16, 12).expand(6, 2, 16, 12)},
        "initial_state: got strides .* overlap",
    ),
    "a late fault": ({"state_indices": torch.tensor([1, 2, 3]), "backend": "cuda"}, "backend: got 'cuda'"),
}


@pytest.mark.parametrize("bad", BAD)
def test_bad_pools(bad: str) -> None:
    x, (options, message) = make_inputs(GATED_DELTA_RULE, BATCH), BAD[bad]
    given = {**x, "initial_state": new_pool(), **options}
    pool = given["initial_state"]
    before = None if pool is None else pool.clone()
    with pytest.raises((TypeError, ValueError), match=message):
        sleepkern.gated_delta_rule(**given)
    assert before is None or torch.equal(pool, before)


def test_gradients_are_refused() -> None:
    x, pool = make_inputs(GATED_DELTA_RULE, BATCH), new_pool()
    x["q"].requires_grad_()
    with pytest.raises(ValueError, match="initial_state: got a pool where gradients are wanted"):
        sleepkern.gated_delta_rule(**{**x, "initial_state": pool}, state_indices=WRITTEN)


def test_a_pool_that_is_an_argument_as_well() -> None:
    pool = torch.randn(6, 2, 16, 16)
    x = make_inputs(GATED_DELTA_RULE, Shape(B=1, T=16, H=2, HV=2, K=16, V=16))
    x["v"] = pool[2].view(1, 16, 2, 16)
    with pytest.raises(ValueError, match="initial_state: got memory that v lies in as well"):
        sleepkern.gated_delta_rule(**{**x, "initial_state": pool}, state_indices=torch.tensor([0]))


def test_sizes_without_numbers() -> None:
    x = {name: None if t is None else t.to("meta") for name, t in make_inputs(GATED_DELTA_RULE, BATCH).items()}
    pool, rows = new_pool().to("meta"), READ.to("meta")
    o, S = sleepkern.gated_delta_rule(**{**x, "initial_state": pool}, state_indices=rows)
    assert o.shape == x["v"].shape and S is pool
    assert sleepkern.commit(pool, rows[:, None], rows, rows) is pool


def test_a_compiled_prefill_is_one_graph() -> None:
    x = make_inputs(GATED_DELTA_RULE, BATCH)

    def prefill(pool: Tensor, read: Tensor, written: Tensor) -> Tensor:
        rows = {"state_indices": read, "output_state_indices": written}
        return sleepkern.gated_delta_rule(**{**x, "initial_state": pool}, **rows)[0]

    pool, compiled = new_pool(), new_pool()
    with torch.no_grad():
        expected = prefill(pool, READ, WRITTEN)
        o = torch.compile(prefill, backend="aot_eager", fullgraph=True)(compiled, READ, WRITTEN)
    assert torch.equal(o, expected) and torch.equal(compiled, pool)
