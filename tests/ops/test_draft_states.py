"""Decode that stores the state after each token, commits of what was accepted, and the short convolution's."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers.backends import HERE, heeding
from torch import Tensor

import sleepkern
from sleepkern.nn import short_convolution_step
from sleepkern.rules import GATED_DELTA_RULE, RULES, Rule
from sleepkern.testing import Shape, call, make_inputs, relative_error
from sleepkern.testing.tolerances import SAME_GRADIENTS, TOLERANCE

B, T = 3, 5
SHAPE = Shape(B=B, T=T, H=1, HV=2, K=16, V=24)
ROWS = torch.tensor([3, -1, 7])
SLOTS = torch.arange(10, 10 + B * T).view(B, T)

TYPES = [
    *((backend, torch.float32) for backend in HERE),
    *((backend, torch.bfloat16) for backend in heeding("state_bf16")),
]


def inputs(rule: Rule = GATED_DELTA_RULE) -> dict[str, Any]:
    x = make_inputs(rule, SHAPE)
    return {name: x[name] for name in ("q", "k", "v", "g", "beta")}


def new_pool(dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(10 + B * T, 2, 16, 24, generator=torch.Generator().manual_seed(3)).to(dtype)


@pytest.mark.parametrize("rule", RULES.values(), ids=str)
@pytest.mark.parametrize(("backend", "dtype"), TYPES)
def test_a_draft_in_a_pool(backend: str, rule: Rule, dtype: torch.dtype) -> None:
    x, pool, slots = inputs(rule), new_pool(dtype), SLOTS.clone()
    slots[0, 2] = -1
    before = pool.clone()
    options: dict[str, Any] = {"states_out": pool, "states_out_indices": slots, "backend": backend}
    o, out = sleepkern.recurrent_step(**x, state=pool, rule=rule, state_indices=ROWS, **options)
    start = {**x, "initial_state": before[ROWS.clamp_min(0)].float(), "cu_seqlens": None}
    o_expected, _, states = call(rule, start, "reference", state_every=1)  # type: ignore[misc]
    rounding = TOLERANCE[dtype]
    assert out is pool and relative_error(o[[0, 2]], o_expected[[0, 2]]) <= TOLERANCE[torch.float32] and not o[1].any()
    assert relative_error(pool[slots[2]], states[2]) <= rounding
    assert relative_error(pool[slots[0, [0, 1, 3, 4]]], states[0, [0, 1, 3, 4]]) <= rounding
    kept = [*range(10), *SLOTS[1].tolist(), int(SLOTS[0, 2])]
    assert torch.equal(pool[kept], before[kept])


@pytest.mark.parametrize("backend", HERE)
def test_a_draft_in_a_tensor_of_its_own(backend: str) -> None:
    x, state = inputs(), new_pool()[:B]
    before, out = state.clone(), torch.full((B, T, 2, 16, 24), torch.nan)
    sleepkern.recurrent_step(**x, state=state, states_out=out, backend=backend)
    states = call(GATED_DELTA_RULE, {**x, "initial_state": state, "cu_seqlens": None}, "reference", state_every=1)[2]  # type: ignore[misc]
    assert relative_error(out, states) <= SAME_GRADIENTS and torch.equal(state, before)


def test_raw_gates_of_a_draft() -> None:
    x, state, out = inputs(), new_pool()[:B], torch.zeros(B, T, 2, 16, 24)
    made = {**x, "beta": x["beta"].sigmoid()}
    sleepkern.recurrent_step(**x, state=state, states_out=out, use_beta_sigmoid_in_kernel=True)
    o, S = sleepkern.recurrent_step(**made, state=state, inplace=False)
    assert relative_error(out[:, -1], S) <= SAME_GRADIENTS


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_what_was_accepted_is_kept(dtype: torch.dtype) -> None:
    pool = new_pool(dtype)
    before = pool.clone()
    assert sleepkern.commit(pool, SLOTS, torch.tensor([2, 4, 0]), ROWS) is pool
    assert torch.equal(pool[3], before[SLOTS[0, 1]])
    assert torch.equal(pool[[i for i in range(25) if i != 3]], before[[i for i in range(25) if i != 3]])
    sleepkern.commit(pool, SLOTS.int(), torch.tensor([5, 1, 1], dtype=torch.int32), torch.tensor([0, 1, 2]))
    assert torch.equal(pool[[0, 1, 2]], before[[int(SLOTS[0, 4]), int(SLOTS[1, 0]), int(SLOTS[2, 0])]])


def test_a_draft_may_end_in_the_row_it_starts_from() -> None:
    x, pool = inputs(), new_pool()
    start, slots = pool.clone(), SLOTS.clone()
    slots[:, -1] = torch.tensor([3, 4, 7])
    sleepkern.recurrent_step(
        **x, state=pool, state_indices=torch.tensor([3, 4, 7]), states_out=pool, states_out_indices=slots
    )
    _, S = sleepkern.recurrent_step(**x, state=start[[3, 4, 7]])
    assert relative_error(pool[[3, 4, 7]], S) <= SAME_GRADIENTS


@pytest.mark.parametrize("rule", RULES.values(), ids=str)
@pytest.mark.parametrize(("backend", "dtype"), TYPES)
def test_steps_on_states_of_both_types(backend: str, rule: Rule, dtype: torch.dtype) -> None:
    x, state, pool = inputs(rule), new_pool(dtype)[:B], new_pool(dtype)
    expected = state.clone().float()
    for _ in range(3):
        o, S = sleepkern.recurrent_step(**x, state=state, rule=rule, backend=backend)
        sleepkern.recurrent_step(**x, state=pool, rule=rule, state_indices=torch.arange(B), backend=backend)
        o_expected, _ = sleepkern.recurrent_step(**x, state=expected, rule=rule, backend="reference")
        expected = expected.to(dtype).float()
        assert S is state and relative_error(S, expected) <= TOLERANCE[dtype]
        assert relative_error(o, o_expected) <= TOLERANCE[dtype] and torch.equal(pool[:B], state)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_packed_tokens_on_a_pool(dtype: torch.dtype) -> None:
    x = make_inputs(GATED_DELTA_RULE, Shape(H=1, HV=2, K=16, V=24, lengths=(2, 0, 3)))
    offsets, pool = x.pop("cu_seqlens"), new_pool(dtype)
    del x["initial_state"]
    before, rows = pool.clone(), torch.tensor([4, 5, -1])
    o, S = sleepkern.recurrent_step(**x, state=pool, state_indices=rows, cu_seqlens=offsets)
    first = {name: t[:, :2] for name, t in x.items()}
    o_expected, expected = sleepkern.recurrent_step(**first, state=before[4:5].clone())
    assert S is pool and relative_error(o[:, :2], o_expected) <= SAME_GRADIENTS and not o[:, 2:].any()
    assert relative_error(pool[4:5], expected) <= TOLERANCE[dtype]
    assert torch.equal(pool[[0, 1, 2, 3, 5]], before[[0, 1, 2, 3, 5]])
    state = before[:3].clone()
    o, S = sleepkern.recurrent_step(**x, state=state, cu_seqlens=offsets)
    o_expected, expected = call(GATED_DELTA_RULE, {**x, "initial_state": before[:3].float(), "cu_seqlens": offsets})  # type: ignore[assignment]
    assert S is state and relative_error(o, o_expected) <= SAME_GRADIENTS
    assert relative_error(S, expected) <= TOLERANCE[dtype]


POOL = new_pool()
BAD: dict[str, tuple[dict[str, Any], str]] = {
    "no pool": ({"states_out_indices": SLOTS}, "states_out: got None; expected the pool that states_out_indices"),
    "shape": ({"states_out": POOL}, r"states_out: got shape \[25, 2, 16, 24\]; expected \[3, 5, 2, 16, 24\]"),
    "type": (
        {"states_out": POOL.bfloat16(), "states_out_indices": SLOTS},
        "states_out: got torch.bfloat16; expected torch.float32, the type of state",
    ),
    "twice": (
        {"states_out": POOL, "states_out_indices": torch.zeros_like(SLOTS)},
        "states_out_indices: got .* expected every state once",
    ),
    "beyond": (
        {"states_out": POOL, "states_out_indices": SLOTS + 1},
        "states_out_indices: got 25; expected less than 25",
    ),
    "another's start": (
        {"states_out": POOL, "states_out_indices": torch.cat([SLOTS[:, :4], torch.tensor([[7], [8], [9]])], 1)},
        "states_out_indices: got 7 for sequence 0, a state that another sequence starts from",
    ),
    "packed": ({"states_out": POOL, "cu_seqlens": torch.tensor([0, 5])}, "states_out: got it with cu_seqlens"),
}


def test_a_row_that_two_sequences_start_from_is_written_by_neither() -> None:
    slots = SLOTS.clone()
    slots[0, 4] = 3
    options = {"state": POOL, "states_out": POOL, "states_out_indices": slots}
    with pytest.raises(ValueError, match="states_out_indices: got 3 for sequence 0, a state that another sequence"):
        sleepkern.recurrent_step(**inputs(), state_indices=torch.tensor([3, 3, 7]), **options)


@pytest.mark.parametrize("bad", BAD)
def test_bad_drafts(bad: str) -> None:
    options, message = BAD[bad]
    before = POOL.clone()
    with pytest.raises((TypeError, ValueError), match=message):
        sleepkern.recurrent_step(**inputs(), state=POOL, state_indices=ROWS, **options)
    assert torch.equal(POOL, before)


def test_long_drafts_and_gradients_are_refused() -> None:
    x = make_inputs(GATED_DELTA_RULE, Shape(B=1, T=17, H=1, HV=2, K=16, V=24))
    long = {name: x[name] for name in ("q", "k", "v", "g", "beta")}
    with pytest.raises(ValueError, match="states_out: got T = 17 tokens; expected at most 16"):
        sleepkern.recurrent_step(**long, state=POOL[:1], states_out=torch.zeros(1, 17, 2, 16, 24))
    short = inputs()
    short["v"].requires_grad_()
    with pytest.raises(ValueError, match="states_out: got it where gradients are wanted"):
        sleepkern.recurrent_step(**short, state=POOL[:B], states_out=torch.zeros(B, T, 2, 16, 24))


def test_gradients_of_what_is_written_and_of_raw_gates_are_refused() -> None:
    out = torch.zeros(B, T, 2, 16, 24, requires_grad=True)
    with pytest.raises(ValueError, match="states_out: got it where gradients are wanted"):
        sleepkern.recurrent_step(**inputs(), state=POOL[:B], states_out=out)
    assert not out.any()
    packed = {name: t.flatten(0, 1)[None] for name, t in inputs().items()}
    raw = {"use_gate_in_kernel": True, "A_log": torch.zeros(2, requires_grad=True)}
    pool, offsets = new_pool(), torch.arange(B + 1) * T
    with pytest.raises(ValueError, match="state: got a pool where gradients are wanted"):
        sleepkern.recurrent_step(**packed, state=pool, state_indices=ROWS, cu_seqlens=offsets, **raw)
    assert not pool.requires_grad and torch.equal(pool, new_pool())


def test_offsets_in_the_memory_of_the_states_are_refused() -> None:
    packed, pool = {name: t.flatten(0, 1)[None] for name, t in inputs().items()}, new_pool()
    offsets = pool.view(-1)[: 2 * (B + 1)].view(torch.int64)
    offsets.copy_(torch.arange(B + 1) * T)
    rows = {"state_indices": ROWS, "cu_seqlens": offsets}
    with pytest.raises(ValueError, match="state: got memory that cu_seqlens lies in as well"):
        sleepkern.recurrent_step(**packed, state=pool, **rows)
    with pytest.raises(ValueError, match="initial_state: got memory that cu_seqlens lies in as well"):
        sleepkern.gated_delta_rule(**packed, initial_state=pool, **rows)


@pytest.mark.parametrize(
    ("slots", "accepted", "rows", "message"),
    [
        (SLOTS, torch.tensor([6, 0, 0]), ROWS, "accepted: got 6 for sequence 0; expected 0 to T = 5"),
        (SLOTS - 24, torch.tensor([0, 0, 1]), ROWS, "slots: got -4 for token 1 of sequence 2, which is accepted"),
        (SLOTS + 9, torch.tensor([0, 0, 1]), ROWS, "slots: got 33; expected less than 25"),
        (SLOTS, torch.tensor([1, 1, 1]), torch.tensor([2, 2, 3]), "state_indices: got .* expected every state once"),
        (SLOTS, torch.tensor([1, 1]), ROWS, r"accepted: got shape \[2\]; expected \[3\]"),
        (SLOTS[0], torch.tensor([1, 1]), ROWS, r"slots: got shape \[5\]; expected \[B,T\]"),
        (SLOTS.float(), torch.tensor([1, 1]), ROWS, "slots: got torch.float32; expected torch.int32 or torch.int64"),
    ],
)
def test_bad_commits(slots: Tensor, accepted: Tensor, rows: Tensor, message: str) -> None:
    before = POOL.clone()
    with pytest.raises((TypeError, ValueError), match=message):
        sleepkern.commit(POOL, slots, accepted, rows)
    assert torch.equal(POOL, before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_short_convolution(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    D, W = 6, 4
    x, weight, bias = torch.randn(B, T, D).to(dtype), torch.randn(D, W), torch.randn(D)
    start = torch.randn(B, D, W).to(dtype)
    state, outputs, states = start.clone(), [], []
    for t in range(T):
        outputs.append(short_convolution_step(x[:, t], state, weight, bias))
        states.append(state.clone())
    tensor = torch.zeros(B, T, D, W, dtype=dtype)
    y = short_convolution_step(x, start, weight, bias, states_out=tensor)
    assert relative_error(y, torch.stack(outputs, 1)) <= TOLERANCE[dtype] and torch.equal(
        tensor, torch.stack(states, 1)
    )
    moved = start.clone()
    short_convolution_step(x, moved, weight, bias)
    assert torch.equal(moved, state)
    pool = torch.randn(10 + B * T, D, W).to(dtype)
    pool[[3, 7]] = start[[0, 2]]
    before = pool.clone()
    y = short_convolution_step(x, pool, weight, bias, state_indices=ROWS, states_out=pool, states_out_indices=SLOTS)
    assert not y[1].any() and torch.equal(pool[SLOTS[0]], tensor[0]) and torch.equal(pool[SLOTS[2]], tensor[2])
    assert torch.equal(pool[[*range(10), *SLOTS[1].tolist()]], before[[*range(10), *SLOTS[1].tolist()]])
    sleepkern.commit(pool, SLOTS, torch.tensor([2, 1, 0]), ROWS)
    assert torch.equal(pool[3], tensor[0, 1]) and torch.equal(pool[7], start[2])
    y = short_convolution_step(x[:, 0], pool, weight, bias, state_indices=ROWS)
    assert y.shape == (B, D) and torch.equal(pool[7], tensor[2, 0])


def test_bad_drafts_of_the_convolution() -> None:
    x, weight, state = torch.randn(B, T, 6), torch.randn(6, 4), torch.randn(B, 6, 4)
    cases: list[tuple[dict[str, Any], str]] = [
        ({"states_out": torch.zeros(B, T, 6, 5)}, r"states_out: got torch.float32 \[3, 5, 6, 5\]; expected"),
        ({"state_indices": torch.tensor([0, 1])}, r"state_indices: got torch.int64 \[2\] on cpu; expected"),
        ({"state_indices": torch.tensor([0, 1, 1])}, "state_indices: got .* expected every state once"),
        ({"states_out_indices": SLOTS}, "states_out: got None"),
        ({"states_out": state, "states_out_indices": SLOTS - 10}, "states_out_indices: got 14; expected less than 3"),
    ]
    for options, message in cases:
        before = state.clone()
        with pytest.raises((TypeError, ValueError), match=message):
            short_convolution_step(x, state, weight, **options)
        assert torch.equal(state, before)
