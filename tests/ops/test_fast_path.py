"""The fast path: the same bits as the four steps for plain calls, and the four steps for all others."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers.bad_inputs import RULE, BadInput, refused_calls
from torch import Tensor

import sleepkern
from sleepkern.ops import fast_path
from sleepkern.rules import GATED_DELTA_RULE, KDA, RULES, Rule
from sleepkern.testing import Shape, call, make_inputs

SHAPE = Shape(B=2, T=9, H=2, HV=4, K=24, V=37)


@pytest.fixture
def taken(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """The answer of the fast path to each call."""
    answers: list[bool] = []
    run = fast_path._run

    def record(*arguments: Any) -> bool:
        answers.append(run(*arguments))
        return answers[-1]

    monkeypatch.setattr(fast_path, "_run", record)
    return answers


def long_way(monkeypatch: pytest.MonkeyPatch, rule: Rule, x: dict[str, Any], **options: Any) -> tuple[Tensor, Any]:
    with monkeypatch.context() as patched:
        patched.setattr(fast_path, "_usable", False)
        return call(rule, x, **options)


def variants(x: dict[str, Any]) -> dict[str, dict[str, Any]]:
    wide = torch.cat([x["q"].flatten(2), x["k"].flatten(2)], -1)
    half = wide.shape[-1] // 2
    sliced = {n: wide[..., i * half : (i + 1) * half].unflatten(-1, (2, 24)) for i, n in enumerate("qk")}
    one = {n: t if t is None else t[:1, :1] for n, t in x.items() if n != "initial_state"}
    return {
        "as made": x,
        "no state": {**x, "initial_state": None},
        "slices of a projection": {**x, **sliced},
        "one token": {**one, "initial_state": x["initial_state"][:1]},
        "no batch": {n: t if t is None else t[:1] for n, t in x.items()},
    }


@pytest.mark.computed_by("cpu")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_plain_calls_give_the_same_bits(
    rule: Rule, dtype: torch.dtype, taken: list[bool], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, x in variants(make_inputs(rule, SHAPE, dtype, seed=1)).items():
        for options in ({}, {"use_qk_l2norm_in_kernel": True, "scale": 0.3}, {"backend": "cpu"}):
            expected_o, expected_S = long_way(monkeypatch, rule, x, **options)
            taken.clear()
            o, S = call(rule, x, **options)
            assert taken == [True], name
            assert torch.equal(o, expected_o) and torch.equal(S, expected_S), name
            assert o.dtype == dtype and o.is_contiguous()


@pytest.mark.computed_by("cpu")
def test_a_step_is_taken_in_place(rule: Rule, taken: list[bool]) -> None:
    x = make_inputs(rule, SHAPE, seed=2)
    expected_o, expected_S = call(rule, x)
    state = x["initial_state"].clone()
    taken.clear()
    o, same = sleepkern.recurrent_step(*(x[n] for n in ("q", "k", "v", "g", "beta")), state, rule=rule)
    assert taken == [True] and same is state
    assert torch.equal(o, expected_o) and torch.equal(state, expected_S)


def others() -> dict[str, dict[str, Any]]:
    """Calls that are right, but not plain."""
    x = make_inputs(GATED_DELTA_RULE, SHAPE, seed=3)
    transposed = {n: x[n].transpose(1, 2).contiguous().transpose(1, 2) for n in "qkv"}
    return {
        "double": make_inputs(GATED_DELTA_RULE, SHAPE, torch.float64),
        "wide heads": make_inputs(GATED_DELTA_RULE, Shape(T=3, K=300, V=8)),
        "packed": make_inputs(GATED_DELTA_RULE, Shape(K=8, V=8, lengths=(3, 4))),
        "no tokens": make_inputs(GATED_DELTA_RULE, Shape(T=0, K=8, V=8)),
        "transposed": {**x, **transposed},
        "state transposed": {**x, "initial_state": x["initial_state"].transpose(2, 3).contiguous().transpose(2, 3)},
        "gates in double": {**x, "g": x["g"].double()},
        "gradient": {**x, "v": x["v"].clone().requires_grad_()},
        "parameter": {**x, "v": torch.nn.Parameter(x["v"], requires_grad=False)},
    }


@pytest.mark.parametrize("name", list(others()))
def test_others_take_the_long_way(name: str, taken: list[bool], monkeypatch: pytest.MonkeyPatch) -> None:
    x = others()[name]
    expected, _ = long_way(monkeypatch, GATED_DELTA_RULE, x)
    o, _ = call(GATED_DELTA_RULE, x)
    assert True not in taken
    assert torch.equal(o, expected)
    assert o.requires_grad == (name == "gradient")


def test_modes_and_other_backends_take_the_long_way(taken: list[bool]) -> None:
    x = make_inputs(GATED_DELTA_RULE, SHAPE, seed=4)
    with torch.autocast("cpu", torch.bfloat16):
        assert call(GATED_DELTA_RULE, x)[0].dtype == torch.bfloat16
    call(GATED_DELTA_RULE, x, "chunked")
    assert taken == []


BAD_CALLS = refused_calls()


@pytest.mark.parametrize(("bad", "x"), BAD_CALLS.values(), ids=BAD_CALLS)
def test_bad_input_gets_the_sentence_of_the_long_way(
    bad: BadInput, x: dict[str, Any], taken: list[bool], monkeypatch: pytest.MonkeyPatch
) -> None:
    """C++ takes none of the calls that the checks in Python refuse, so that each gets its sentence from there."""
    tensors = [x[n] for n in ("q", "k", "v", "g", "beta", "initial_state")]
    assert fast_path.forward(RULE, (*tensors, x["cu_seqlens"]), None, False, None) is None
    with pytest.raises(bad.error, match=f"^{bad.message}") as short:
        call(RULE, x)
    with pytest.raises(bad.error) as long:
        long_way(monkeypatch, RULE, x)
    assert str(short.value) == str(long.value)
    assert True not in taken


@pytest.mark.parametrize(("bad", "x"), BAD_CALLS.values(), ids=BAD_CALLS)
def test_a_bad_step_gets_the_sentence_of_the_long_way(
    bad: BadInput, x: dict[str, Any], taken: list[bool], monkeypatch: pytest.MonkeyPatch
) -> None:
    if x.pop("cu_seqlens") is not None:
        pytest.skip("a step has no packed sequences")
    state = x.pop("initial_state")
    before = state.clone()
    sentences = []
    for usable in (fast_path._usable, False):
        monkeypatch.setattr(fast_path, "_usable", usable)
        with pytest.raises(bad.error, match=f"^{bad.message.replace('initial_state', 'state')}") as caught:
            sleepkern.recurrent_step(**x, state=state, rule=RULE)
        sentences.append(str(caught.value))
    assert sentences[0] == sentences[1] and True not in taken
    assert torch.equal(state, before)


@pytest.mark.parametrize("rule", RULES.values(), ids=str)
def test_what_does_not_fit_is_refused_as_ever(rule: Rule, taken: list[bool]) -> None:
    x = make_inputs(rule, SHAPE, seed=5)
    wrong: dict[str, Any] = {
        "q": x["q"][:, :-1], "k": x["k"][0], "v": x["v"][:, :, :3], "beta": x["beta"][:, :-1],
        "initial_state": x["initial_state"].double(),
    }  # fmt: skip
    if rule.gate != "none":
        wrong["g"] = -x["g"]
    for name, t in wrong.items():
        kept = x["initial_state"].clone()
        with pytest.raises((ValueError, TypeError)):
            call(rule, {**x, name: t})
        assert torch.equal(kept, x["initial_state"])
    assert True not in taken


def test_a_gate_above_zero_in_any_type_is_refused() -> None:
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        x = make_inputs(KDA, SHAPE, seed=6)
        g = x["g"].to(dtype)
        g[-1, -1, -1, -1] = 1e-3
        with pytest.raises(ValueError, match="g: got a log decay of"):
            call(KDA, {**x, "g": g})
        g[-1, -1, -1, -1] = -0.0
        call(KDA, {**x, "g": g})
