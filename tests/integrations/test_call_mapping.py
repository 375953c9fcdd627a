"""No replacement swallows an argument: what changes the result is used, or sends the call to the original."""

from __future__ import annotations

import inspect
import types
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import pytest
import torch
from helpers.hf_models import CLOSE, FAMILIES, globals_of
from torch import Tensor

from sleepkern.integrations.call_mapping import HARMLESS, replacement
from sleepkern.integrations.transformers import gated_delta as delta
from sleepkern.integrations.transformers import mamba2, patch, unpatch
from sleepkern.integrations.transformers import short_convolution as convolution
from sleepkern.integrations.transformers.packing import NAMES
from sleepkern.rules import KDA
from sleepkern.testing import relative_error


@pytest.fixture(autouse=True)
def _start_and_end_unpatched() -> Iterator[None]:
    unpatch()
    yield
    unpatch()


def random(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))


class Function(NamedTuple):
    """A function that is replaced: where stock is, what replaces it, a call, and another value of each option."""

    family: str
    name: str
    make: Callable[..., Any]
    takes: Any
    given: dict[str, Any]
    others: dict[str, Any]


Q, V, G, S = random(2, 9, 2, 8), random(2, 9, 2, 6), -random(2, 9, 2).abs(), random(2, 2, 8, 6)
DELTA = {"query": Q, "key": Q.flip(1), "value": V, "g": G, "beta": G.exp()}
STATES = {"initial_state": S, "output_final_state": True, "use_qk_l2norm_in_kernel": True}
WITHIN = {"g": -random(2, 9, 2, 8).abs()}
X, W = random(2, 5, 9), random(5, 4)
SCAN = {
    "hidden_states": V, "dt": G, "A": -random(2).abs(), "B": Q[:, :, :1], "C": Q[:, :, 1:], "chunk_size": 4,
}  # fmt: skip
SCANS = {
    "D": random(2), "dt_bias": random(2), "initial_states": S.mT.contiguous(), "dt_softplus": True,
    "dt_limit": (0.1, 0.2), "return_final_states": True,
}  # fmt: skip
STEP = {
    "state": S.mT.contiguous(), "hidden_states": V[:, 0], "dt": G[:, 0, :, None].expand(-1, -1, 6),
    "A": (-random(2).abs())[:, None, None].expand(-1, 6, 8), "B": Q[:, 0, :1], "C": Q[:, 0, 1:],
}  # fmt: skip
STEPS = {
    "D": random(2, 6), "dt_bias": random(2)[:, None].expand(-1, 6), "dt_softplus": True, "z": V[:, 1],
}  # fmt: skip
CHUNK = {"chunk_size": 4}
FUNCTIONS = [
    Function("qwen3_next", "torch_chunk_gated_delta_rule", delta.many_tokens, delta._Many, DELTA, CHUNK | STATES),
    Function("qwen3_next", "torch_recurrent_gated_delta_rule", delta.one_token, delta._One, DELTA, STATES),
    Function(
        "kimi_linear", "chunk_kimi_delta_attention", lambda f: delta.many_tokens(f, KDA), delta._Many,
        DELTA | WITHIN, CHUNK | STATES,
    ),
    Function(
        "kimi_linear", "recurrent_kimi_delta_attention", lambda f: delta.one_token(f, KDA), delta._One,
        DELTA | WITHIN | {"initial_state": None, "output_final_state": False}, STATES,
    ),
    Function(
        "bamba", "causal_conv1d_fn", convolution.many_tokens, convolution._Many, {"hidden_states": X, "weight": W},
        {"bias": random(5), "activation": "silu"},
    ),
    Function(
        "bamba", "causal_conv1d_update", convolution.one_token, convolution._One,
        {"hidden_states": X[..., :1], "conv_state": random(2, 5, 4), "weight": W},
        {"bias": random(5), "activation": "silu"},
    ),
    Function("mamba2", "mamba2_chunk_scan", mamba2.scan, mamba2._Scan, SCAN, SCANS),
    Function("mamba2", "mamba2_selective_state_update", mamba2.one_step, mamba2._Step, STEP, STEPS),
]  # fmt: skip
each_function = pytest.mark.parametrize("function", FUNCTIONS, ids=lambda x: x.name)


def stock_of(function: Function) -> Callable[..., Any]:
    found: Callable[..., Any] = getattr(globals_of(function.family), function.name)
    return found


def same(a: Any, b: Any) -> bool:
    if isinstance(a, tuple) and isinstance(b, tuple):
        return all(same(x, y) for x, y in zip(a, b, strict=True))
    return relative_error(a, b) < CLOSE if isinstance(a, Tensor) and isinstance(b, Tensor) else a is b


def called(function: Callable[..., Any], given: dict[str, Any]) -> tuple[Any, ...]:
    """What a call gives, and the states that it may write."""
    own = {name: x.clone() if name in ("state", "conv_state") else x for name, x in given.items()}
    return function(**own), own.get("state"), own.get("conv_state")


@each_function
def test_every_parameter_of_stock_is_heeded_or_named_harmless(function: Function) -> None:
    """Each field is stock's parameter, in its order and with its default, or a name of packed sequences, or mamba_ssm's
    gate; and each parameter of stock is a field."""
    parameters = inspect.signature(stock_of(function)).parameters.values()
    stock = {x.name: x.default for x in parameters if x.kind is not inspect.Parameter.VAR_KEYWORD}
    fields = {x.name: x.default for x in inspect.signature(function.takes).parameters.values()}
    assert list(fields)[: len(stock)] == list(stock)
    assert all(fields[name] == x for name, x in stock.items() if x is not inspect.Parameter.empty)
    assert fields.keys() - stock.keys() <= {*NAMES, "z"}
    assert stock.keys() == (function.given | function.others).keys(), "a parameter that the next test does not try"


@each_function
def test_every_parameter_changes_what_it_changes_in_stock(function: Function) -> None:
    stock, calls = stock_of(function), []

    def spied(*args: Any, **kwargs: Any) -> Any:
        calls.append(kwargs)
        return stock(*args, **kwargs)

    made = function.make(spied)
    plain = called(stock, function.given)
    assert same(called(made, function.given), plain)
    assert not calls, "ours"
    for name, value in function.others.items():
        expected = called(stock, function.given | {name: value})
        assert name in HARMLESS or not same(expected, plain), f"{name} is not put to the test"
        assert same(called(made, function.given | {name: value}), expected), name
    assert same(called(made, function.given | function.others), called(stock, function.given | function.others))


@each_function
def test_other_arguments_go_to_the_original(function: Function) -> None:
    """An unknown keyword, unless it is None or named harmless, and more arguments by position than mean the same."""
    heard: list[Any] = []

    def original(*args: Any, **kwargs: Any) -> str:
        heard.append((args, kwargs))
        return "original"

    given, made = function.given, function.make(original)
    assert made(**given, surprise=3) == "original"
    assert heard[-1][1].keys() == {*given, "surprise"}
    assert made(*given.values(), *[None] * 20) == "original" and len(heard[-1][0]) == len(given) + 20
    assert made(**{name: x for name, x in given.items() if name != next(iter(given))}) == "original"
    before = len(heard)
    called(made, given | {"surprise": None} | dict.fromkeys(HARMLESS - given.keys(), 1))
    assert len(heard) == before


def test_arguments_by_position_mean_what_the_original_means_by_them() -> None:
    """fla's functions have `scale` where transformers' have `chunk_size`."""

    class Takes(NamedTuple):
        query: int
        chunk_size: int = 64
        g: int = 0

    def flas(q: int, scale: float = 1.0, g: int = 0) -> str:
        return "original"

    def passes_on(*args: Any, **kwargs: Any) -> str:
        return "original"

    made = replacement(flas, Takes, lambda call: None, lambda call: call)
    assert made(1) == (1, 64, 0) and made(1, g=2) == (1, 64, 2)
    assert made(1, 0.5) == "original" and made(1, scale=0.5) == "original"
    assert replacement(passes_on, Takes, lambda call: None, lambda call: call)(1, 2, 3) == (1, 2, 3)


def test_all_that_is_replaced_is_tried_here() -> None:
    """In every family: a function of the table above with the same parameters, a forward that has those of stock, or
    the whole training mixer, which only ever passes on."""
    stock = {(f, name): x for f in FAMILIES for name, x in vars(globals_of(f)).items()}
    tried = {function.name: list(inspect.signature(stock_of(function)).parameters) for function in FUNCTIONS}
    for family in FAMILIES:
        with patch(family):
            now = vars(globals_of(family))
            replaced = {name: x for name, x in now.items() if x is not stock[family, name]}
            for name, x in replaced.items():
                assert name == "mamba2_split_conv1d_scan_combined" or name in tried
                assert name not in tried or list(inspect.signature(x).parameters) == tried[name], (family, name)
            forwards = [x.forward for x in now.values() if isinstance(x, type) and "RMSNormGated" in x.__name__]
        assert replaced and all(isinstance(x, types.FunctionType) for x in forwards)
        for x in forwards:
            ours, stocks = (
                list(inspect.signature(f, follow_wrapped=wrapped).parameters.values())
                for f, wrapped in ((x, False), (x, True))
            )
            assert [p.name for p in ours] == [p.name for p in stocks]


@pytest.mark.parametrize("D", [torch.randn(2, 6), torch.randn(2)], ids=["of channels", "of heads"])
def test_mamba_ssms_scan_by_its_own_order(D: Tensor) -> None:
    """mamba_chunk_scan_combined(x, dt, A, B, C, chunk_size, D, z, dt_bias, ...): other than transformers' from z on."""

    def mamba_chunk_scan_combined(
        x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, chunk_size: int, D: Tensor | None = None,
        z: Tensor | None = None, dt_bias: Tensor | None = None, initial_states: Tensor | None = None,
        seq_idx: Tensor | None = None, cu_seqlens: Tensor | None = None, dt_softplus: bool = False,
        dt_limit: tuple[float, float] = (0.0, float("inf")), return_final_states: bool = False,
        return_varlen_states: bool = False,
    ) -> str:  # fmt: skip
        return "original"

    made, bias = mamba2.fused_scan(mamba_chunk_scan_combined), random(2)
    expected = stock_of(FUNCTIONS[-2])(**SCAN, dt_bias=bias, dt_softplus=True)
    alone = made(*SCAN.values(), None, None, bias, None, None, None, True)
    assert relative_error(alone, expected) < CLOSE
    out = made(*SCAN.values(), D, None, bias)
    assert (out == "original") if D.dim() == 2 else out.shape == V.shape
    assert made(*SCAN.values(), None, V) == "original"
    for option in ({"cu_seqlens": torch.tensor([0, 18])}, {"return_varlen_states": True}):
        assert made(*SCAN.values(), **option) == "original"
