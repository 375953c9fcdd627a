"""Every public function on tensors of every kind: the numbers of plain tensors, or one sentence that names an argument.

`pytest --hypothesis-profile=full tests/ops/test_properties.py` takes many more examples than the quick profile.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers.presentations import RIGHT, WRONG, numbers
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import sleepkern
from sleepkern import nn
from sleepkern.nn.gated_rms_norm import gated_rms_norm
from sleepkern.nn.short_convolution import short_convolution, short_convolution_step
from sleepkern.ops import recurrence as ops
from sleepkern.rules import RULES
from sleepkern.sleep import sleep_blocks
from sleepkern.state import KVState, RecurrentState
from sleepkern.testing import Shape, make_inputs, rules_of

Function = Callable[..., Any]
Arguments = dict[str, Any]
FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
SIZES = st.builds(
    lambda B, T, H, groups, K, V: Shape(B=B, T=T, H=H, HV=H * groups, K=K, V=V),
    *map(st.integers, (0, 0, 1, 1, 1, 1), (2, 20, 2, 2, 17, 17)),
)  # fmt: skip
PACKED = st.builds(
    lambda H, groups, K, lengths: Shape(H=H, HV=H * groups, K=K, V=5, lengths=tuple(lengths)),
    st.integers(1, 2), st.integers(1, 2), st.integers(1, 9), st.lists(st.integers(0, 9), min_size=1, max_size=4),
)  # fmt: skip


@st.composite
def rule_calls(draw: st.DrawFn) -> tuple[Function, Arguments, tuple[str, ...]]:
    rule = RULES[draw(st.sampled_from(list(RULES)))]
    shape = draw(st.one_of(SIZES, PACKED))
    x = make_inputs(rule, shape, draw(st.sampled_from(FLOATS)), initial_state=draw(st.booleans()))
    able = [None, *(name for name in ("cpu", "chunked") if rule.name in rules_of(name))]
    options = {
        "use_qk_l2norm_in_kernel": draw(st.booleans()),
        "backend": draw(st.sampled_from(able)),
    }
    if x["q"].dtype == torch.float64 and options["backend"] == "cpu":
        options["backend"] = None
    if draw(st.booleans()):
        return ops.sleep_ingest, {**x, **options, "passes": draw(st.integers(1, 3)), "rule": rule.name}, ()
    if rule.gate == "none":
        del x["g"]
    return getattr(ops, rule.name), {**x, **options, "output_final_state": True}, ()


@st.composite
def step_calls(draw: st.DrawFn) -> tuple[Function, Arguments, tuple[str, ...]]:
    rule = RULES[draw(st.sampled_from(list(RULES)))]
    shape = draw(SIZES)
    x = make_inputs(rule, shape, draw(st.sampled_from(FLOATS)))
    x["state"] = x.pop("initial_state")
    del x["cu_seqlens"]
    if draw(st.booleans()):
        x["state"] = torch.cat([x["state"], x["state"].new_ones(3, *x["state"].shape[1:])])
        x["state_indices"] = torch.randperm(len(x["state"]))[: shape.B]
    inplace = draw(st.booleans())
    return sleepkern.recurrent_step, {**x, "rule": rule, "inplace": inplace}, ("state",) if inplace else ()


@st.composite
def mixer_calls(draw: st.DrawFn) -> tuple[Function, Arguments, tuple[str, ...]]:
    B, T, D, W = (draw(st.integers(low, high)) for low, high in ((0, 2), (0, 9), (0, 20), (1, 5)))
    dtype, generator = draw(st.sampled_from(FLOATS)), torch.Generator().manual_seed(0)

    def normal(*size: int) -> Tensor:
        return torch.randn(*size, generator=generator, dtype=torch.float64).to(dtype)

    kind = draw(st.sampled_from(("convolution", "step", "norm")))
    if kind == "norm":
        x: Arguments = {"x": normal(B, T, 2, D), "gate": normal(B, T, 2, D), "weight": normal(D)}
        return gated_rms_norm, {**x, "gate_first": draw(st.booleans())}, ()
    weights = {"weight": normal(D, W), "bias": draw(st.sampled_from((None, normal(D))))}
    if kind == "step":
        return short_convolution_step, {"x": normal(B, D), "state": normal(B, D, W), **weights}, ("state",)
    x = {"x": normal(B, T, D), **weights, "past": normal(B, W - 1, D)}
    if B == 1:
        x["cu_seqlens"] = torch.tensor([0, T])
    return short_convolution, x, ()


def check(name: str, call: tuple[Function, Arguments, tuple[str, ...]], shown: dict[str, str]) -> None:
    """Call with some arguments shown in other ways, and compare."""
    function, plain, written = call
    arguments = {n: t.clone() if isinstance(t, Tensor) else t for n, t in plain.items()}
    for argument, kind in shown.items():
        arguments[argument] = {**RIGHT, **WRONG}[kind](plain[argument])
    before = _kept({n: t for n, t in arguments.items() if n not in written and shown.get(n) not in WRONG})
    # To write to an inference tensor outside of its mode is refused, as torch refuses it.
    refused = any(kind in WRONG or (kind == "inference" and n in written) for n, kind in shown.items())
    if all(t.is_meta for t in arguments.values() if isinstance(t, Tensor)):
        return  # a call of meta tensors has a meta tensor for a result
    if sum(kind in ("one more", "flat", "one more dimension") for kind in shown.values()) > 1:
        return  # several shapes changed at a time may fit each other
    if {"wrapped", "subclass"} <= set(shown.values()):
        return  # torch does not mix the two: the result of a wrapper's operator has no second class
    alone = plain.get("initial_state", plain.get("past")) is None
    if alone and shown in ({"cu_seqlens": "one more"}, {"v": "one more"}):
        return  # another, empty sequence, or another V
    if refused:
        _refused(function, arguments)
    else:
        expected = {n: t.clone() if isinstance(t, Tensor) else t for n, t in plain.items()}
        pairs = list(zip(_tensors(function(**arguments)), _tensors(function(**expected)), strict=True))
        pairs += [(numbers(arguments[n]), expected[n]) for n in written]
        for a, b in pairs:
            rounding = 4 * torch.finfo(b.dtype).eps if b.is_floating_point() and b.dtype.itemsize == 2 else 1e-5
            torch.testing.assert_close(a, b, rtol=rounding, atol=rounding, msg=lambda m: f"{name} {shown}: {m}")
    after = _kept({n: arguments[n] for n in before})
    assert all(torch.equal(before[n], after[n]) for n in before), "an input was changed"


def _refused(function: Function, arguments: Arguments) -> None:
    """By one sentence that begins with the name of an argument."""
    with pytest.raises((ValueError, TypeError)) as caught:
        function(**arguments)
    names = "|".join((*arguments, "initial_state"))
    assert re.match(rf"({names}): got", str(caught.value)) and "\n" not in str(caught.value), str(caught.value)


def _kept(arguments: Arguments) -> dict[str, Tensor]:
    return {n: numbers(t).nan_to_num() for n, t in arguments.items() if isinstance(t, Tensor)}


def _tensors(result: Any) -> list[Tensor]:
    if isinstance(result, Tensor):
        return [numbers(result)]
    return [t for part in result for t in _tensors(part)] if isinstance(result, (tuple, list)) else []


def shown(data: st.DataObject, arguments: Arguments, kinds: list[str]) -> dict[str, str]:
    names = [n for n, t in arguments.items() if isinstance(t, Tensor)]
    return data.draw(st.dictionaries(st.sampled_from(names), st.sampled_from(kinds), min_size=1, max_size=3))


CALLS = {"rules": rule_calls(), "steps": step_calls(), "mixers": mixer_calls()}


@pytest.mark.parametrize("name", CALLS)
@given(data=st.data())
def test_any_way_to_hold_the_numbers(name: str, data: st.DataObject) -> None:
    call = data.draw(CALLS[name])
    check(name, call, shown(data, call[1], list(RIGHT)))


@pytest.mark.parametrize("name", CALLS)
@given(data=st.data())
def test_what_is_no_such_tensor_is_refused(name: str, data: st.DataObject) -> None:
    call = data.draw(CALLS[name])
    function, plain, written = call
    wrong = shown(data, {n: t for n, t in plain.items() if isinstance(t, Tensor) and t.numel()} or plain, list(WRONG))
    if any(isinstance(t, Tensor) and t.numel() for t in plain.values()):
        check(name, call, wrong)


@given(data=st.data())
def test_one_tensor_may_come_as_two(data: st.DataObject) -> None:
    """But not as one that is read and another that is updated in place."""
    function, plain, written = data.draw(st.one_of(CALLS.values()))
    names = [n for n, t in plain.items() if isinstance(t, Tensor) and t.numel() and t.is_floating_point()]
    one, other = data.draw(st.tuples(*[st.sampled_from(names or ["x"])] * 2))
    if one == other or one not in plain:
        return
    a, b = plain[one], plain[other]
    memory = torch.zeros(a.numel() + b.numel(), dtype=a.dtype).uniform_(-0.2, 0)  # beta * |k|^2 stays below 2
    first, second = memory[: a.numel()].view(a.shape), memory[: b.numel()].view(b.shape)
    if a.dtype != b.dtype:
        return
    shared = {**plain, one: first, other: second}
    separate = {n: t.clone() if isinstance(t, Tensor) else t for n, t in shared.items()}
    if one in written or other in written:
        kept = memory.clone()
        with pytest.raises(ValueError, match=f"^{written[0]}: got memory that ({one}|{other}) lies in as well"):
            function(**shared)
        assert torch.equal(memory, kept)
    else:
        for x, y in zip(_tensors(function(**shared)), _tensors(function(**separate)), strict=True):
            torch.testing.assert_close(x, y, rtol=1e-5, atol=1e-6, equal_nan=True)


torch.manual_seed(0)
STACK = list(nn.SleepLM(8, width=16, heads=2, blocks=2).requires_grad_(False).layers)


def _slept(h: Tensor, keys: Tensor, values: Tensor, conv: Tensor, state: Tensor) -> tuple[Any, ...]:
    return tuple(sleep_blocks(h, STACK, [KVState(keys, values), RecurrentState(conv, state)], passes=2))


@given(data=st.data())
def test_blocks_take_any_way_to_hold_the_numbers(data: st.DataObject) -> None:
    B, L, before = (data.draw(st.integers(1, 9)) for _ in range(3))
    h = torch.randn(B, L, 16, generator=torch.Generator().manual_seed(1))
    slow, fast = sleep_blocks(torch.randn(B, before, 16), STACK).states
    plain = dict(zip(("h", "keys", "values", "conv", "state"), (h, *slow, *fast), strict=True))
    check("blocks", (_slept, plain, ()), shown(data, plain, list(RIGHT)))
