"""Trees of packed segments against the same texts one by one, forward and gradients."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers.backends import HERE
from torch import Tensor

import sleepkern
from sleepkern.nn import short_convolution
from sleepkern.rules import GATED_DELTA_RULE, RULES, Rule
from sleepkern.testing import Shape, call, make_inputs, relative_error
from sleepkern.testing.inputs import to_float64
from sleepkern.testing.tolerances import SAME_GRADIENTS, SAME_SUMS, TOLERANCE

LENGTHS, PARENTS = (40, 0, 20, 33, 7, 9, 16), [-1, 0, 0, -1, 1, 2, 0]
SHAPE = Shape(H=1, HV=2, K=16, V=12, lengths=LENGTHS)
ROOTS = [i for i, parent in enumerate(PARENTS) if parent < 0]
NAMES = ("q", "k", "v", "g", "beta", "initial_state")


def path_to(segment: int) -> list[int]:
    return [segment] if PARENTS[segment] < 0 else [*path_to(PARENTS[segment]), segment]


def one_by_one(rule: Rule, x: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """Outputs and final states of the segments, each computed from the root on, in float64."""
    offsets = x["cu_seqlens"].tolist()
    outputs, states = [], []
    for segment in range(len(PARENTS)):
        path = path_to(segment)
        tokens = torch.cat([torch.arange(offsets[i], offsets[i + 1]) for i in path])
        part = {name: t if t is None else t[:, tokens] for name, t in x.items() if name in NAMES[:5]}
        root = ROOTS.index(path[0])
        state = None if x["initial_state"] is None else x["initial_state"][root : root + 1]
        o, S = call(rule, {**part, "initial_state": state, "cu_seqlens": None}, "reference")
        outputs.append(o[:, len(tokens) - LENGTHS[segment] :])
        assert S is not None
        states.append(S)
    return torch.cat(outputs, 1), torch.cat(states)


def tree_inputs(rule: Rule, state: bool = True) -> dict[str, Any]:
    x = make_inputs(rule, SHAPE)
    return {**x, "initial_state": x["initial_state"][: len(ROOTS)] if state else None}


@pytest.mark.parametrize("rule", RULES.values(), ids=str)
@pytest.mark.parametrize("backend", HERE)
def test_results_and_gradients(backend: str, rule: Rule) -> None:
    x = tree_inputs(rule)
    leaves = {name: t.requires_grad_() for name, t in x.items() if name in NAMES and t is not None}
    doubles = {name: t.detach().double().requires_grad_() for name, t in leaves.items()}
    o, S = call(rule, x, backend, parents=PARENTS)
    expected = one_by_one(rule, {**x, **doubles})
    assert S is not None
    for a, b in zip((o, S), expected, strict=True):
        assert a.shape == b.shape and relative_error(a, b) <= TOLERANCE[torch.float32]
    torch.manual_seed(1)
    weights = [torch.randn(t.shape, dtype=torch.float64) for t in expected]
    losses = [sum((t * w.to(t.dtype)).sum() for t, w in zip(y, weights, strict=True)) for y in ((o, S), expected)]
    found = torch.autograd.grad(losses[0], list(leaves.values()))  # type: ignore[arg-type]
    for name, a, b in zip(leaves, found, torch.autograd.grad(losses[1], list(doubles.values())), strict=True):  # type: ignore[arg-type]
        assert relative_error(a, b) <= TOLERANCE[torch.float32], name


def test_from_zero_with_states_along_the_way() -> None:
    x = tree_inputs(GATED_DELTA_RULE, state=False)
    o, S, states = call(GATED_DELTA_RULE, x, parents=torch.tensor(PARENTS), state_every=16)  # type: ignore[misc]
    expected_o, expected_S = one_by_one(GATED_DELTA_RULE, to_float64(x))
    assert relative_error(o, expected_o) <= TOLERANCE[torch.float32]
    ends = sleepkern.state_offsets(x["cu_seqlens"], 16)
    assert states.shape[1] == ends[-1]
    for segment, length in enumerate(LENGTHS):
        if length:
            assert relative_error(states[0, ends[segment + 1] - 1], expected_S[segment]) <= TOLERANCE[torch.float32]


def test_raw_gates_on_a_tree() -> None:
    x = tree_inputs(GATED_DELTA_RULE)
    raw = {**x, "g": torch.randn_like(x["g"]), "beta": torch.randn_like(x["beta"])}
    A_log = torch.zeros(2, requires_grad=True)
    options: dict[str, Any] = {"use_gate_in_kernel": True, "use_beta_sigmoid_in_kernel": True}
    o, S = call(GATED_DELTA_RULE, raw, parents=PARENTS, A_log=A_log, **options)
    made = {**x, "g": -torch.nn.functional.softplus(raw["g"]), "beta": raw["beta"].sigmoid()}
    expected_o, _ = one_by_one(GATED_DELTA_RULE, to_float64(made))
    assert relative_error(o, expected_o) <= TOLERANCE[torch.float32]
    (grad,) = torch.autograd.grad(o.sum(), A_log)
    assert grad.isfinite().all() and grad.any()


def test_a_tree_that_ends_in_a_pool() -> None:
    x = tree_inputs(GATED_DELTA_RULE)
    _, expected = call(GATED_DELTA_RULE, x, parents=PARENTS)
    pool = torch.randn(12, 2, 16, 12)
    pool[[3, 5]] = x["initial_state"]
    before, rows = pool.clone(), torch.tensor([0, -1, 2, 3, 9, -1, 11])
    _, S = call(
        GATED_DELTA_RULE,
        {**x, "initial_state": pool},
        state_indices=torch.tensor([3, 5]),
        output_state_indices=rows,
        parents=PARENTS,
    )
    assert S is pool and expected is not None
    assert relative_error(pool[rows[rows >= 0]], expected[rows >= 0]) <= SAME_SUMS
    untouched = [i for i in range(12) if i not in rows.tolist()]
    assert torch.equal(pool[untouched], before[untouched])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_short_convolution(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    T, D, W = sum(LENGTHS), 6, 4
    offsets = torch.tensor([0, *LENGTHS]).cumsum(0)
    x = torch.randn(1, T, D).to(dtype).requires_grad_()
    past = torch.randn(len(ROOTS), W - 1, D).to(dtype).requires_grad_()
    weight, bias = torch.randn(D, W), torch.randn(D)
    y, last = short_convolution(x, weight, bias, past, cu_seqlens=offsets, parents=PARENTS)
    outputs, ends = [], []
    for segment in range(len(PARENTS)):
        path = path_to(segment)
        tokens = torch.cat([torch.arange(offsets[i], offsets[i + 1]) for i in path])
        start = past[ROOTS.index(path[0])][None]
        part, end = short_convolution(x[:, tokens], weight, bias, start, backend="torch")
        outputs.append(part[:, len(tokens) - LENGTHS[segment] :])
        ends.append(end)
    expected = (torch.cat(outputs, 1), torch.cat(ends))
    for a, b in zip((y, last), expected, strict=True):
        assert relative_error(a, b) <= TOLERANCE[dtype]
    for a, b in zip(
        *(torch.autograd.grad(p[0].sum() + p[1].sum(), (x, past)) for p in ((y, last), expected)), strict=True
    ):
        assert relative_error(a, b) <= max(TOLERANCE[dtype], SAME_GRADIENTS)


@pytest.mark.parametrize(
    ("parents", "message"),
    [
        ([-1, 0], r"parents: got 2 parents; expected 7, one for each segment"),
        ([-1, 0, 2, -1, 0, 0, 0], r"parents: got parents\[2\] = 2; expected -1, or a segment before 2"),
        ([-1, -2, 0, 0, 0, 0, 0], r"parents: got parents\[1\] = -2; expected -1"),
        (torch.zeros(7), r"parents: got torch.float32 \[7\]; expected \[n\] of int32 or int64"),
        ("tree", "parents: got str; expected a tensor or a list of integers"),
        ([-1, 0.0, 0, 0, 0, 0, 0], "parents: got float among them; expected integers"),
    ],
)
def test_bad_parents(parents: Any, message: str) -> None:
    x = tree_inputs(GATED_DELTA_RULE)
    with pytest.raises((TypeError, ValueError), match=message):
        call(GATED_DELTA_RULE, x, parents=parents)
    tokens = torch.zeros(1, sum(LENGTHS), 2)
    with pytest.raises((TypeError, ValueError), match=message):
        short_convolution(tokens, torch.zeros(2, 4), cu_seqlens=x["cu_seqlens"], parents=parents)


def test_parents_need_segments_and_a_state_for_each_root() -> None:
    x = tree_inputs(GATED_DELTA_RULE)
    with pytest.raises(ValueError, match="parents: got parents without cu_seqlens"):
        call(GATED_DELTA_RULE, {**x, "cu_seqlens": None}, parents=PARENTS)
    with pytest.raises(ValueError, match=r"initial_state: got shape \[3, 2, 16, 12\]; expected \[2, 2, 16, 12\]"):
        call(GATED_DELTA_RULE, {**x, "initial_state": torch.zeros(3, 2, 16, 12)}, parents=PARENTS)


@pytest.mark.parametrize(
    ("name", "bad", "message"),
    [
        ("k", None, "k: got NoneType; expected a torch.Tensor"),
        ("k", torch.zeros(5), r"k: got shape \[5\]; expected \[B, T, H, K\]"),
        ("q", torch.zeros(1, 6, 1, 16), r"q: got shape \[1, 6, 1, 16\]"),
        ("v", torch.zeros(1, 4, 2, 12), r"v: got shape \[1, 4, 2, 12\]"),
        ("g", torch.zeros(1), r"g: got shape \[1\]"),
        ("beta", [1.0], "beta: got list; expected a torch.Tensor"),
    ],
)
def test_tensors_that_do_not_fit_are_named_before_they_are_split(name: str, bad: Any, message: str) -> None:
    with pytest.raises((TypeError, ValueError), match=message):
        call(GATED_DELTA_RULE, {**tree_inputs(GATED_DELTA_RULE), name: bad}, parents=PARENTS)


def test_a_tree_under_autocast() -> None:
    x = tree_inputs(GATED_DELTA_RULE)
    with torch.autocast("cpu", torch.bfloat16):
        o, _ = call(GATED_DELTA_RULE, {**x, "q": x["q"].bfloat16()}, parents=PARENTS)
    assert o.dtype == torch.bfloat16
