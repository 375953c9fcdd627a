"""Calls that promise the same bits keep the promise; docs/performance/numerics.md has the table."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from sleepkern.rules import Rule
from sleepkern.testing import Shape, call, make_inputs

BACKENDS = ["cpu", "chunked", "reference"]
TYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
HERE = pytest.mark.parametrize("backend", BACKENDS)
TOKENS = ("q", "k", "v", "g", "beta")
CPU_CHUNK = 32


def of_tokens(x: dict[str, Any], first: int, end: int, state: Tensor | None) -> dict[str, Any]:
    cut = {n: t[:, first:end] if n in TOKENS and t is not None else t for n, t in x.items()}
    return {**cut, "initial_state": state, "cu_seqlens": None}


def in_pieces(rule: Rule, x: dict[str, Any], backend: str, length: int) -> tuple[Tensor, Tensor]:
    state, outputs = x["initial_state"], []
    for first in range(0, x["k"].shape[1], length):
        o, state = call(rule, of_tokens(x, first, first + length, state), backend)
        outputs.append(o)
    return torch.cat(outputs, 1), state


def assert_same(one: tuple[Tensor, Tensor | None], two: tuple[Tensor, Tensor | None]) -> None:
    assert torch.equal(one[0], two[0])
    assert one[1] is not None and two[1] is not None and torch.equal(one[1], two[1])


@HERE
@TYPES
def test_runs_and_places_in_a_batch(rule: Rule, dtype: torch.dtype, backend: str) -> None:
    x = make_inputs(rule, Shape(B=3, T=70, H=1, HV=2, K=32, V=40), dtype, seed=1, decay="slow")
    o, S = call(rule, x, backend)
    assert S is not None
    assert_same((o, S), call(rule, x, backend))
    row = {n: t[1:2] if isinstance(t, Tensor) else t for n, t in x.items()}
    assert_same((o[1:2], S[1:2]), call(rule, row, backend))


@HERE
@TYPES
def test_packed_and_alone(rule: Rule, dtype: torch.dtype, backend: str) -> None:
    x = make_inputs(rule, Shape(H=1, HV=2, K=32, V=40, lengths=(70, 3, 0, 33)), dtype, seed=2, decay="slow")
    o, S = call(rule, x, backend)
    assert S is not None
    for n, (first, end) in enumerate(((0, 70), (70, 73), (73, 73), (73, 106))):
        if first < end:
            alone = call(rule, of_tokens(x, first, end, x["initial_state"][n : n + 1]), backend)
            assert_same((o[:, first:end], S[n : n + 1]), alone)


@HERE
@TYPES
@pytest.mark.parametrize("heads", [1, 4])
def test_threads(rule: Rule, dtype: torch.dtype, backend: str, heads: int) -> None:
    """One head is cut into blocks of value columns, where threads are more than heads."""
    x = make_inputs(rule, Shape(T=70, H=1, HV=heads, K=32, V=100), dtype, seed=3, decay="slow")
    one = call(rule, x, backend)
    torch.set_num_threads(2)
    assert_same(one, call(rule, x, backend))


@TYPES
@pytest.mark.parametrize(("backend", "length"), [("cpu", CPU_CHUNK), ("cpu", 2 * CPU_CHUNK), ("reference", 17)])
def test_in_pieces(rule: Rule, dtype: torch.dtype, backend: str, length: int) -> None:
    """Of whole chunks on the CPU; of any length token by token."""
    x = make_inputs(rule, Shape(T=70, H=1, HV=2, K=32, V=40), dtype, seed=4, decay="slow")
    assert_same(call(rule, x, backend), in_pieces(rule, x, backend, length))


@TYPES
@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_steps(rule: Rule, dtype: torch.dtype, backend: str) -> None:
    """Five tokens at once, which no chunk is made of, are five calls of one."""
    x = make_inputs(rule, Shape(T=5, H=1, HV=2, K=32, V=40), dtype, seed=5, decay="slow")
    assert_same(call(rule, x, backend), in_pieces(rule, x, backend, 1))
