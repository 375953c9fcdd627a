"""Decode by the C++ kernels on states where they are: pools, strides, bfloat16, and the state after each token."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers.raw_gates import raw_inputs
from torch import Tensor

import sleepkern
from sleepkern.backends.cpu import recurrence as cpu
from sleepkern.ops import fast_path
from sleepkern.problems.recurrence import Problem, Tensors, describe
from sleepkern.rules import GATED_DELTA_RULE, SIMPLE_GLA, Rule
from sleepkern.testing import TOLERANCE, Shape, call, make_inputs, relative_error, to_float64

ROUNDED_ONCE = 2.0**-8
"""A bfloat16 that was rounded once has 8 bits; the error in norm is about a third of this."""
LENGTHS = (1, 2, 5, 9)
"""One token is decoded in place, a few on a copy; those beyond the limit of decode go through chunks where they can."""
HEADS = ((24, 16), (37, 19), (96, 40))


def drawn(rule: Rule, T: int, K: int, V: int, B: int = 3) -> tuple[Problem, Tensors]:
    x = make_inputs(rule, Shape(B=B, T=T, H=1, HV=2, K=K, V=V), seed=2, initial_state=False)
    tensors = Tensors(x["q"], x["k"], x["v"], x["g"], x["beta"], None, None)
    return describe(rule, tensors, K**-0.5, True), tensors


def expected(rule: Rule, x: Tensors, state: Tensor) -> tuple[Tensor, Tensor]:
    """o [B,T,HV,V] and the states after each token [B,T,HV,K,V], from float64."""
    tensors = dict(zip(("q", "k", "v", "g", "beta", "initial_state", "cu_seqlens"), x, strict=True))
    given = to_float64({**tensors, "initial_state": state})
    o, _, states = call(rule, given, "reference", state_every=1, use_qk_l2norm_in_kernel=True)  # type: ignore[misc]
    return o, states


def close(actual: Tensor, truth: Tensor) -> bool:
    tolerance = ROUNDED_ONCE if actual.dtype == torch.bfloat16 else TOLERANCE[torch.float32]
    return relative_error(actual.float(), truth) <= tolerance


@pytest.mark.computed_by("cpu")
@pytest.mark.parametrize("T", LENGTHS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_of_a_pool_are_updated_in_place(rule: Rule, T: int, dtype: torch.dtype, isa: str) -> None:
    """Row 1 is padded. A pool may be a slice of a wider one's heads: its rows and heads have strides of their own."""
    for K, V in HEADS:
        problem, x = drawn(rule, T, K, V)
        problem = problem._replace(state_bf16=dtype == torch.bfloat16)
        wide = torch.randn(8, 5, K, V, generator=torch.Generator().manual_seed(1)).to(dtype)
        for pool in (wide[:, :2].contiguous(), wide[:, 1:5:2]):
            before, indices = pool.clone(), torch.tensor([6, -1, 2], dtype=torch.int32)
            o = cpu.step_in_pool(problem, x._replace(state=pool), indices)
            true_o, states = expected(rule, x, before[[6, 0, 2]])
            used = [0, 2]
            assert relative_error(o[used], true_o[used]) <= TOLERANCE[torch.float32] and not o[1].any()
            assert close(pool[[6, 2]], states[used, -1])
            others = [0, 1, 3, 4, 5, 7]
            assert torch.equal(pool[others], before[others])


@pytest.mark.computed_by("cpu")
@pytest.mark.parametrize("T", LENGTHS)
def test_a_step_updates_states_of_any_kind(rule: Rule, T: int) -> None:
    problem, x = drawn(rule, T, 24, 19)
    drawn_states = torch.randn(3, 4, 24, 19, generator=torch.Generator().manual_seed(1))
    for dtype in (torch.float32, torch.bfloat16):
        states = drawn_states.to(dtype)
        for state in (states[:, :2].contiguous(), states[:, ::2], states[:, :2].mT.contiguous().mT):
            true_o, true_states = expected(rule, x, state.clone())
            o = cpu.step(problem._replace(state_bf16=dtype == torch.bfloat16), x._replace(state=state))
            assert relative_error(o, true_o) <= TOLERANCE[torch.float32] and close(state, true_states[:, -1])


@pytest.mark.computed_by("cpu")
@pytest.mark.parametrize("T", [1, 4, 16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_state_after_each_token_is_stored(rule: Rule, T: int, dtype: torch.dtype) -> None:
    """In a tensor, in a part of a longer one, in one whose matrices are strided, and in rows of the pool itself."""
    problem, x = drawn(rule, T, 24, 19)
    pool = torch.randn(60, 2, 24, 19, generator=torch.Generator().manual_seed(1)).to(dtype)
    before, indices, used = pool.clone(), torch.tensor([6, -1, 2]), [0, 2]
    x = x._replace(state=pool)
    true_o, states = expected(rule, x, before[[6, 0, 2]])
    whole, longer = (torch.full((3, T + more, 2, 24, 19), 7.0, dtype=dtype) for more in (0, 3))
    strided = torch.full((3, T, 2, 24, 38), 7.0, dtype=dtype)
    for out in (whole, longer[:, :T], strided[..., ::2]):
        o = cpu.step_states(problem, x, indices, out, None)
        assert relative_error(o[used], true_o[used]) <= TOLERANCE[torch.float32] and not o[1].any()
        assert close(out[used], states[used]) and bool((out[1] == 7).all()) and torch.equal(pool, before)
    rows = torch.arange(10, 10 + 3 * T, dtype=torch.int32).view(3, T)
    rows[0, 0], rows[2, T // 2], rows[2, T - 1] = 6, -1, -1
    cpu.step_states(problem, x, indices, pool, rows)
    written = {int(rows[b, t]): states[b, t] for b in used for t in range(T) if rows[b, t] >= 0}
    assert close(pool[list(written)], torch.stack(list(written.values())))
    others = [n for n in range(60) if n not in written]
    assert torch.equal(pool[others], before[others])


@pytest.mark.computed_by("cpu")
def test_states_of_a_batch_after_each_token(rule: Rule) -> None:
    problem, x = drawn(rule, 3, 24, 19)
    state = torch.randn(3, 2, 24, 19, generator=torch.Generator().manual_seed(1))
    out = torch.empty(3, 3, 2, 24, 19)
    cpu.step_states(problem, x._replace(state=state), None, out, None)
    assert close(out, expected(rule, x, state)[1])


def test_a_bfloat16_state_is_rounded_to_nearest_even(isa: str) -> None:
    """S + v without decay is one addition of floats, which torch rounds the same way: ties, infinities, NaN."""
    tie = 2.0**-8
    S = torch.tensor([1.0, 1.0, 1.0 + 2 * tie, -1.0, 3e38, 0.0, float("nan"), float("inf"), 1e-40, 2.0, 5.0])
    v = torch.tensor([tie, tie * 1.01, tie, -tie, 2.9e38, 1e-30, 1.0, 1.0, 1e-41, tie, -5.0])
    state = S.bfloat16().view(1, 1, 1, -1).clone()
    one, zero = torch.ones(1, 1, 1, 1), torch.zeros(1, 1, 1)
    sleepkern.recurrent_step(one, one, v.view(1, 1, 1, -1), zero, None, state, rule=SIMPLE_GLA, backend="cpu")
    exact = S.bfloat16().float() + v
    assert torch.equal(state.flatten().nan_to_num(7.0), exact.bfloat16().nan_to_num(7.0))


@pytest.mark.computed_by("cpu")
def test_the_fast_path_takes_a_bfloat16_state(rule: Rule, monkeypatch: pytest.MonkeyPatch) -> None:
    taken: list[bool] = []
    run = fast_path._run

    def record(*arguments: Any) -> bool:
        taken.append(run(*arguments))
        return taken[-1]

    monkeypatch.setattr(fast_path, "_run", record)
    for T, plain in ((1, True), (5, True), (6, False)):
        x = make_inputs(rule, Shape(B=2, T=T, H=1, HV=2, K=24, V=37), seed=3)
        tensors = {n: x[n] for n in ("q", "k", "v", "g", "beta")}
        states = [x["initial_state"].bfloat16() for _ in range(2)]
        with torch.no_grad():
            first, _ = sleepkern.recurrent_step(**tensors, state=states[0], rule=rule)
            assert taken.pop() == plain
            with monkeypatch.context() as slow:
                slow.setattr(fast_path, "_usable", False)
                second, _ = sleepkern.recurrent_step(**tensors, state=states[1], rule=rule)
        assert torch.equal(first, second) and torch.equal(states[0], states[1])
    with torch.no_grad(), pytest.raises(TypeError, match="state"):
        call(rule, {**x, "initial_state": states[0]}, "cpu")
    assert not any(taken)


@pytest.mark.computed_by("cpu")
@pytest.mark.parametrize("T", [1, 7])
def test_raw_gates_on_a_bfloat16_state(rule: Rule, T: int) -> None:
    """All is computed as on a float32 state, which is then rounded."""
    x = raw_inputs(rule, Shape(B=2, T=T, H=1, HV=2, K=24, V=37), seed=3)
    arguments = {n: t for n, t in x.items() if n not in ("initial_state", "cu_seqlens")}
    narrow = x["initial_state"].bfloat16()
    wide = narrow.float()
    outputs = [sleepkern.recurrent_step(**arguments, state=state, rule=rule)[0] for state in (narrow, wide)]
    assert torch.equal(*outputs) and torch.equal(narrow, wide.bfloat16())


def grown_errors(rule: Rule, steps: int, marks: tuple[int, ...]) -> dict[int, float]:
    """Errors of a bfloat16 state after so many steps with slow decay, against float64 in chunks."""
    shape = Shape(T=steps, H=1, HV=1, K=32, V=32)
    x = make_inputs(rule, shape, seed=4)
    state, found, last = x["initial_state"].bfloat16(), {}, 0
    exact = {**to_float64(x), "initial_state": state.double()}
    with torch.no_grad():
        for mark in marks:
            for t in range(last, mark):
                token = {n: None if x[n] is None else x[n][:, t : t + 1] for n in ("q", "k", "v", "g", "beta")}
                sleepkern.recurrent_step(**token, state=state, rule=rule, use_qk_l2norm_in_kernel=True)
            part = {n: t if t is None or n == "initial_state" else t[:, last:mark] for n, t in exact.items()}
            _, exact["initial_state"] = call(rule, part, "chunked", use_qk_l2norm_in_kernel=True)
            found[mark], last = relative_error(state.float(), exact["initial_state"]), mark
    return found


@pytest.mark.computed_by("cpu")
def test_errors_of_bfloat16_states_do_not_grow_without_bound(rule: Rule) -> None:
    found = grown_errors(rule, 1000, (1, 1000))
    assert found[1] < ROUNDED_ONCE and found[1000] < GROWN[rule.name], found


@pytest.mark.hardening
@pytest.mark.computed_by("cpu")
def test_errors_of_bfloat16_states_after_many_steps(rule: Rule) -> None:
    found = grown_errors(rule, 20_000, (1, 1000, 20_000))
    assert found[20_000] < GROWN[rule.name], found


GROWN = {"gated_delta_rule": 1e-2, "kda": 1e-2, "delta_rule": 2.5e-2, "simple_gla": 1e-2, "gla": 1e-2}
"""Largest errors seen are a half of these."""


def test_a_pool_of_a_float32_state_is_not_copied() -> None:
    """The rows that no sequence names are never touched: a pool as large as memory allows costs nothing."""
    problem, x = drawn(GATED_DELTA_RULE, 1, 24, 19, B=1)
    pool = torch.full((4, 2, 24, 19), float("nan"))
    pool[2] = 1.0
    o = cpu.step_in_pool(problem, x._replace(state=pool), torch.tensor([2]))
    assert bool(o.isfinite().all()) and bool(pool[2].isfinite().all()) and bool(pool[[0, 1, 3]].isnan().all())
