"""States along the way, of every rule, by every backend that runs here, against plain calls in float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers.backends import heeding
from torch import Tensor

import sleepkern
from sleepkern.rules import GATED_DELTA_RULE, KDA, RULES, Rule
from sleepkern.testing import Shape, call, make_inputs, relative_error
from sleepkern.testing.inputs import to_float64
from sleepkern.testing.tolerances import SAME_GRADIENTS, TOLERANCE

SHAPES = {
    "no token": (Shape(B=2, T=0, K=8, V=8), 16),
    "less than n": (Shape(B=2, T=15, K=8, V=12), 16),
    "one more than n": (Shape(T=65, H=1, HV=2, K=32, V=8), 64),
    "48 of 100": (Shape(B=2, T=100, H=1, HV=2, K=12, V=20), 48),
    "80 of 170": (Shape(T=170, H=1, HV=1, K=96, V=16), 80),
    "packed": (Shape(H=1, HV=2, K=16, V=16, lengths=(0, 1, 64, 65, 17, 0, 130)), 32),
}
NAMES = ("q", "k", "v", "g", "beta", "initial_state")


def plain_states(rule: Rule, x: dict[str, Any], every: int) -> Tensor:
    """The same states as the final ones of plain calls on the beginnings of each sequence, in float64."""
    x = to_float64(x)
    offsets = x["cu_seqlens"]
    spans = (
        [(0, x["k"].shape[1])] if offsets is None else list(zip(offsets.tolist(), offsets.tolist()[1:], strict=False))
    )
    rows = []
    for i, (first, last) in enumerate(spans):
        state = x["initial_state"] if offsets is None else x["initial_state"][i : i + 1]
        for end in [*range(first + every, last, every), *([last] if last > first else [])]:
            part = {name: t if t is None else t[:, first:end] for name, t in x.items() if name in NAMES[:5]}
            rows.append(call(rule, {**part, "initial_state": state, "cu_seqlens": None}, "reference")[1])
    if rows:
        return torch.stack(rows, 1)
    B, _, HV, V = x["v"].shape
    return torch.empty(B, 0, HV, x["k"].shape[3], V, dtype=torch.float64)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("rule", RULES.values(), ids=str)
@pytest.mark.parametrize("backend", heeding("state_every"))
def test_they_are_the_final_states_of_shorter_calls(backend: str, rule: Rule, shape: str) -> None:
    size, every = SHAPES[shape]
    x = make_inputs(rule, size)
    o, S, states = call(rule, x, backend, state_every=every)  # type: ignore[misc]
    expected = plain_states(rule, x, every)
    assert states.dtype == torch.float32 and states.shape == expected.shape
    assert relative_error(states, expected) <= TOLERANCE[torch.float32]
    o_plain, S_plain = call(rule, x, backend)
    assert relative_error(o, o_plain) <= SAME_GRADIENTS and relative_error(S, S_plain) <= SAME_GRADIENTS
    if size.lengths is None and size.T:
        assert torch.equal(states[:, -1], S)


@pytest.mark.parametrize("lengths", [None, (40, 0, 30)], ids=["batch", "packed"])
@pytest.mark.parametrize("rule", RULES.values(), ids=str)
@pytest.mark.parametrize("backend", heeding("state_every"))
def test_gradients_through_them(backend: str, rule: Rule, lengths: tuple[int, ...] | None) -> None:
    x = make_inputs(rule, Shape(B=2, T=70, H=1, HV=2, K=16, V=12, lengths=lengths))
    weights: list[Tensor] = []

    def gradients(x: dict[str, Any], backend: str) -> list[Tensor]:
        leaves = {name: t.clone().requires_grad_() for name, t in x.items() if name in NAMES and t is not None}
        o, S, states = call(rule, {**x, **leaves}, backend, state_every=32)  # type: ignore[misc]
        if not weights:
            torch.manual_seed(1)
            weights.extend(torch.randn(t.shape, dtype=torch.float64) for t in (o, S, states))
        loss = sum((t * w.to(t.dtype)).sum() for t, w in zip((o, S, states), weights, strict=True))
        return list(torch.autograd.grad(loss, list(leaves.values())))  # type: ignore[arg-type]

    expected = gradients(to_float64(x), "reference")
    for name, a, b in zip(NAMES, gradients(x, backend), expected, strict=False):
        assert relative_error(a, b) <= TOLERANCE[torch.float32], name


@pytest.mark.parametrize("backend", heeding("state_every"))
def test_a_loss_of_one_state_alone(backend: str) -> None:
    x = make_inputs(GATED_DELTA_RULE, Shape(T=100, H=1, HV=1, K=16, V=16))
    k, v = (x[name].requires_grad_() for name in ("k", "v"))
    states = call(GATED_DELTA_RULE, x, backend, state_every=32)[2]  # type: ignore[misc]
    dk, dv = torch.autograd.grad(states[:, 1].square().sum(), (k, v))
    assert dk[:, :64].any() and not dk[:, 64:].any() and not dv[:, 64:].any()
    shorter = {name: t if t is None or name in ("initial_state", "cu_seqlens") else t[:, :64] for name, t in x.items()}
    S = call(GATED_DELTA_RULE, shorter, "reference")[1]
    assert S is not None
    for a, b in zip((dk, dv), torch.autograd.grad(S.square().sum(), (k, v)), strict=True):
        assert relative_error(a, b) <= SAME_GRADIENTS


def test_graphs_and_second_gradients() -> None:
    x = make_inputs(KDA, Shape(T=40, H=1, HV=1, K=8, V=8))
    leaves = [x[name].requires_grad_() for name in ("q", "k", "v", "g", "beta")]

    def states(*leaves: Tensor) -> Tensor:
        return sleepkern.kda(*leaves, state_every=16)[2]

    compiled = torch.compile(states, backend="aot_eager", fullgraph=True)
    plain, traced = states(*leaves), compiled(*leaves)
    assert torch.equal(plain, traced)
    for a, b in zip(*(torch.autograd.grad(y.square().sum(), leaves[1:]) for y in (plain, traced)), strict=True):
        assert torch.equal(a, b)
    once = torch.autograd.grad(states(*leaves).square().sum(), leaves[1:], create_graph=True)
    assert all(t.isfinite().all() for t in torch.autograd.grad(sum(d.square().sum() for d in once), leaves[1:]))  # type: ignore[arg-type]


def test_where_states_of_packed_sequences_are() -> None:
    offsets = torch.tensor([0, 0, 1, 17, 50], dtype=torch.int32)
    assert sleepkern.state_offsets(offsets, 16).tolist() == [0, 0, 1, 2, 5]
    assert sleepkern.state_offsets(offsets, 2**63 - 1).tolist() == [0, 0, 1, 2, 3]
    with pytest.raises(ValueError, match="state_every: got .* expected an integer below 2"):
        sleepkern.state_offsets(offsets, 2**63)


@pytest.mark.parametrize(
    ("every", "backend", "message"),
    [
        (0, None, "state_every: got 0; expected None or an integer of at least 1"),
        (True, None, "state_every: got bool; expected None or an integer"),
        (1.5, None, "state_every: got float; expected None or an integer"),
        (24, "chunked", "after every multiple of 16 tokens, got state_every = 24"),
    ],
)
def test_bad_numbers_of_tokens(every: Any, backend: str | None, message: str) -> None:
    with pytest.raises((TypeError, ValueError), match=message):
        call(GATED_DELTA_RULE, make_inputs(GATED_DELTA_RULE, Shape(T=40)), backend, state_every=every)


def test_any_number_of_tokens_has_a_backend() -> None:
    x = make_inputs(GATED_DELTA_RULE, Shape(T=10, K=8, V=8))
    assert call(GATED_DELTA_RULE, x, state_every=3)[2].shape[1] == 4  # type: ignore[misc]
