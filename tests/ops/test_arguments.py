"""What torch alone knows of a tensor, memory that is not there or not its own, options, and calls of operators."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from helpers.wrapping import Wrapped
from torch import Tensor

import sleepkern
from sleepkern import settings
from sleepkern.nn.gated_rms_norm import gated_rms_norm
from sleepkern.nn.short_convolution import short_convolution, short_convolution_step
from sleepkern.rules import GATED_DELTA_RULE, KDA, Rule
from sleepkern.testing import Shape, call, make_inputs, relative_error

SHAPE = Shape(B=2, T=7, H=1, HV=2, K=8, V=8)
STEP = ("q", "k", "v", "g", "beta")
BACKENDS = (None, "cpu", "chunked", "reference")
X, WEIGHT = torch.randn(2, 5, 6), torch.randn(6, 4)
MIXERS: dict[str, tuple[Callable[..., Any], list[Tensor]]] = {
    "convolution": (short_convolution, [X, WEIGHT, torch.randn(6), torch.randn(2, 3, 6)]),
    "norm": (gated_rms_norm, [X, X + 1, torch.randn(6)]),
    "step": (short_convolution_step, [X[:, 0], torch.randn(2, 6, 4), WEIGHT]),
}


def negative(t: Tensor) -> Tensor:
    """The same numbers, whose opposites lie in memory."""
    return torch._neg_view(-t)


def freed(t: Tensor) -> Tensor:
    """A view into a storage that has been freed, as FSDP frees parameters."""
    storage = torch.cat([t.flatten(), t.flatten()])
    view = storage[t.numel() :].view(t.shape)
    storage.untyped_storage().resize_(0)
    return view


def step(x: dict[str, Any], state: Tensor, rule: Rule | str = GATED_DELTA_RULE, **options: Any) -> Tensor:
    return sleepkern.recurrent_step(*(x[n] for n in STEP), state, rule=rule, **options)[0]


@pytest.mark.parametrize("disguise", [negative, Wrapped, torch.nn.Parameter])
def test_numbers_are_read_as_torch_shows_them(rule: Rule, disguise: Callable[[Tensor], Tensor]) -> None:
    for T in (1, 7, 80):
        x = make_inputs(rule, Shape(B=2, T=T, H=1, HV=2, K=8, V=8), seed=1)
        expected_o, expected_S = call(rule, x)
        for name in (n for n, t in x.items() if t is not None):
            o, S = call(rule, {**x, name: disguise(x[name].clone())})
            assert torch.equal(o, expected_o) and torch.equal(S, expected_S), (T, name)


def test_a_sign_in_the_view_of_complex_numbers_is_read() -> None:
    x = make_inputs(GATED_DELTA_RULE, Shape(T=12, H=1, HV=1, K=8, V=8))
    g = torch.complex(torch.zeros(1, 12, 1), -x["g"]).conj().imag
    assert g.is_neg() and torch.equal(call(GATED_DELTA_RULE, {**x, "g": g})[0], call(GATED_DELTA_RULE, x)[0])


@pytest.mark.parametrize("disguise", [negative, Wrapped])
def test_a_step_updates_what_the_state_stands_for(disguise: Callable[[Tensor], Tensor]) -> None:
    for T in (1, 7):
        x = make_inputs(GATED_DELTA_RULE, Shape(B=2, T=T, H=1, HV=2, K=8, V=8), seed=2)
        expected = x["initial_state"].clone()
        o = step(x, expected)
        for name in STEP:
            state = x["initial_state"].clone()
            assert torch.equal(step({**x, name: disguise(x[name].clone())}, state), o) and torch.equal(state, expected)
        state = disguise(x["initial_state"].clone())
        assert torch.equal(step(x, state), o)
        assert torch.equal(state.inner if isinstance(state, Wrapped) else state, expected)
        pool = negative(torch.cat([x["initial_state"]] * 2))
        assert torch.equal(step(x, pool, state_indices=torch.tensor([3, 0])[:2]), step(x, x["initial_state"][[1, 0]]))


@pytest.mark.parametrize("name", MIXERS)
@pytest.mark.parametrize("disguise", [negative, Wrapped])
def test_mixers_read_numbers_as_torch_shows_them(name: str, disguise: Callable[[Tensor], Tensor]) -> None:
    function, given = MIXERS[name]
    expected = function(*(t.clone() for t in given))
    for i, t in enumerate(given):
        arguments = [u.clone() for u in given]
        arguments[i] = disguise(t.clone())
        torch.testing.assert_close(function(*arguments), expected)


def test_offsets_with_a_sign_are_read() -> None:
    x = make_inputs(GATED_DELTA_RULE, Shape(H=1, HV=1, K=8, V=8, lengths=(3, 4)))
    offsets = negative(x["cu_seqlens"])
    assert torch.equal(call(GATED_DELTA_RULE, {**x, "cu_seqlens": offsets})[0], call(GATED_DELTA_RULE, x)[0])
    expected = short_convolution(X[:1], WEIGHT, cu_seqlens=torch.tensor([0, 2, 5]))[0]
    assert torch.equal(short_convolution(X[:1], WEIGHT, cu_seqlens=negative(torch.tensor([0, 2, 5])))[0], expected)


def test_a_tensor_without_memory_is_refused() -> None:
    x = make_inputs(GATED_DELTA_RULE, Shape(B=2, T=7, H=1, HV=2, K=8, V=8))
    for name in (*STEP, "initial_state"):
        empty = torch.empty(x[name].shape)
        empty.untyped_storage().resize_(0)
        with pytest.raises(ValueError, match=f"^{name}: got a tensor without memory"):
            call(GATED_DELTA_RULE, {**x, name: empty})
        with pytest.raises(ValueError, match=f"^{name}: got a tensor without memory"):
            sleepkern.sleep_ingest(**{**x, name: freed(x[name])})
    for function, given in MIXERS.values():
        for i, t in enumerate(given):
            with pytest.raises(ValueError, match="got a tensor without memory"):
                function(*given[:i], freed(t), *given[i + 1 :])


def test_an_update_in_place_is_seen_by_autograd() -> None:
    """As torch's own are: a gradient that needs what was overwritten raises."""
    x = make_inputs(GATED_DELTA_RULE, SHAPE)
    W = torch.randn(8, 8, requires_grad=True)
    token = {n: x[n][:, :1] for n in STEP}
    strided = torch.zeros(2, 2, 8, 16)[..., :8]
    for state in (x["initial_state"], strided, torch.zeros(3, 2, 8, 8)):
        for y in (x, token):
            loss = (state @ W).sum()
            places = {"state_indices": torch.tensor([2, 0])} if state.shape[0] == 3 else {}
            step(y, state, **places)
            with pytest.raises(RuntimeError, match="modified by an inplace operation"):
                torch.autograd.grad(loss, W)
    state = torch.zeros(2, 6, 4)
    version = state._version
    short_convolution_step(X[:, 0], state, WEIGHT)
    assert state._version == version + 1


def test_an_inference_tensor_is_not_updated_outside() -> None:
    x = make_inputs(GATED_DELTA_RULE, SHAPE)
    with torch.inference_mode():
        state, past = torch.zeros(2, 2, 8, 8), torch.zeros(2, 6, 4)
        step(x, state)
        short_convolution_step(X[:, 0], past, WEIGHT)
    kept = state.clone()
    with pytest.raises(ValueError, match=r"^state: got a tensor made in torch.inference_mode"):
        step(x, state)
    with pytest.raises(ValueError, match=r"^state: got a tensor made in torch.inference_mode"):
        short_convolution_step(X[:, 0], past, WEIGHT)
    with pytest.raises(ValueError, match=r"^state: got a tensor made in torch.inference_mode"):
        short_convolution_step(Wrapped(X[:, 0]), past, WEIGHT)
    assert torch.equal(state, kept)


@pytest.mark.parametrize("width", [4, 9])
def test_a_convolution_of_any_width_looks_for_memory(width: int) -> None:
    """The widest are torch's, which reads what is not there."""
    weight = torch.zeros(6, width)
    weight.untyped_storage().resize_(0)
    with pytest.raises(ValueError, match="^weight: got a tensor without memory"):
        short_convolution(torch.ones(1, 5, 6), weight)


def test_offsets_may_be_wrapped() -> None:
    x, weight = torch.randn(1, 5, 6, dtype=torch.float64), torch.randn(6, 4, dtype=torch.float64)
    offsets = torch.tensor([0, 2, 5])
    wrapped, plain = (short_convolution(x, weight, cu_seqlens=o) for o in (Wrapped(offsets), offsets))
    assert torch.equal(wrapped[0], plain[0]) and torch.equal(wrapped[1], plain[1])


def test_a_state_has_memory_of_its_own() -> None:
    for T in (1, 7):
        x = make_inputs(GATED_DELTA_RULE, Shape(B=2, T=T, H=2, HV=2, K=8, V=8))
        for name in STEP:
            memory = torch.zeros(2000)
            state = memory[:256].view(2, 2, 8, 8)
            y = {**x, name: memory[255 : 255 + x[name].numel()].view(x[name].shape)}
            for grad in (False, True):
                y["v"] = y["v"].detach().requires_grad_(grad)
                with pytest.raises(ValueError, match=f"^state: got memory that {name} lies in as well"):
                    step(y, state)
            apart = memory[256 : 256 + x[name].numel()].view(x[name].shape).copy_(x[name])
            step({**x, name: apart}, state)
        for state in (
            torch.zeros(1, 2, 8, 8).expand(2, 2, 8, 8),
            torch.zeros(300).as_strided((2, 2, 8, 8), (32, 64, 8, 1)),
        ):
            with pytest.raises(ValueError, match=r"^state: got strides .* by which its numbers overlap"):
                step(x, state)
            with pytest.raises(ValueError, match=r"^state: got strides .* by which its numbers overlap"):
                step(x, state, state_indices=torch.tensor([0, 1]))
        woven = torch.zeros(2, 2, 8, 16)
        step({**x, "v": x["v"]}, woven[..., ::2])
        values = woven[:, :T, :, 1].transpose(1, 2)[:, :T] if T == 1 else None
        assert values is None or step({**x, "q": x["q"]}, woven[..., ::2]).isfinite().all()
    memory = torch.zeros(60)
    with pytest.raises(ValueError, match="^state: got memory that x lies in as well"):
        short_convolution_step(memory[40:52].view(2, 6), memory[:48].view(2, 6, 4), WEIGHT)
    with pytest.raises(ValueError, match="^state: got strides"):
        short_convolution_step(X[:, 0], torch.zeros(1, 6, 4).expand(2, 6, 4), WEIGHT)


def test_offsets_that_change_behind_torchs_back_do_no_harm() -> None:
    x = make_inputs(GATED_DELTA_RULE, Shape(H=1, HV=1, K=8, V=8, lengths=(3, 4)))
    grads = []
    for change in (False, True):
        offsets = np.array([0, 3, 7])
        v, y = x["v"].clone().requires_grad_(), X[:1].clone().requires_grad_()
        o, _ = call(GATED_DELTA_RULE, {**x, "v": v, "cu_seqlens": torch.from_numpy(offsets)})
        short = np.array([0, 2, 5])
        z, _ = short_convolution(y, WEIGHT, cu_seqlens=torch.from_numpy(short))
        if change:
            offsets[1] = short[1] = 2**40
        (o.square().sum() + z.square().sum()).backward()
        grads.append((v.grad, y.grad))
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


BAD_OPTIONS: list[tuple[type[Exception], str, dict[str, Any]]] = [
    (TypeError, "scale: got str; expected a number", {"scale": "1"}),
    (TypeError, "scale: got bool; expected a number", {"scale": True}),
    (ValueError, "scale: got nan; expected a finite number", {"scale": float("nan")}),
    (ValueError, "scale: got inf; expected a finite number", {"scale": float("inf")}),
    (TypeError, "use_qk_l2norm_in_kernel: got int; expected a bool", {"use_qk_l2norm_in_kernel": 3}),
    (TypeError, "v: got NoneType; expected a torch.Tensor", {"v": None}),
    (ValueError, "q: got layout torch.sparse_coo; expected torch.strided", {"q": torch.zeros(2, 7, 1, 8).to_sparse()}),
    (ValueError, "v: got layout torch._mkldnn; expected torch.strided", {"v": torch.zeros(2, 7, 2, 8).to_mkldnn()}),
    (ValueError, "cu_seqlens: got device meta; expected cpu", {"cu_seqlens": torch.tensor([0, 7], device="meta")}),
]  # fmt: skip


@pytest.mark.filterwarnings("ignore:torch.quantize")
def test_quantised_numbers_are_refused() -> None:
    x = make_inputs(GATED_DELTA_RULE, SHAPE)
    for name in "qkv":
        with pytest.raises(TypeError, match=f"^{name}: got torch.qint8; expected"):
            call(GATED_DELTA_RULE, {**x, name: torch.quantize_per_tensor(x[name], 0.1, 0, torch.qint8)})


@pytest.mark.parametrize("backend", BACKENDS)
def test_options_of_the_wrong_kind_are_refused(backend: str | None) -> None:
    x = make_inputs(GATED_DELTA_RULE, SHAPE)
    for error, message, wrong in BAD_OPTIONS:
        with pytest.raises(error, match=f"^{message}"):
            call(GATED_DELTA_RULE, {**x, **wrong}, backend)
    with pytest.raises(TypeError, match="^output_final_state: got str; expected a bool"):
        call(GATED_DELTA_RULE, x, backend, output_final_state="yes")
    assert torch.equal(call(GATED_DELTA_RULE, x, scale=np.float32(0.5))[0], call(GATED_DELTA_RULE, x, scale=0.5)[0])
    call(GATED_DELTA_RULE, x, scale=1)


def test_passes_tol_and_method_of_the_wrong_kind_are_refused() -> None:
    x = make_inputs(GATED_DELTA_RULE, SHAPE)
    for error, message, options in (
        (ValueError, "passes: got True; expected an integer", {"passes": True}),
        (ValueError, "passes: got 2147483648; expected .* at most 2147483647", {"passes": 2**31}),
        (ValueError, "passes: got '3'; expected an integer", {"passes": "3"}),
        (ValueError, "tol: got nan; expected None or a number above 0", {"tol": float("nan")}),
        (TypeError, "tol: got str; expected None or a number above 0", {"tol": "1"}),
        (TypeError, "method: got int; expected one of auto", {"method": 3}),
        (TypeError, "rule: got NoneType; expected one of sleepkern.rules, or its name", {"rule": None}),
        (ValueError, "rule: got 'mamba'; expected one of gated_delta_rule, kda", {"rule": "mamba"}),
    ):
        with pytest.raises(error, match=f"^{message}"):
            sleepkern.sleep_ingest(**x, **options)
    passes = sleepkern.sleep_ingest(**x, passes=np.int64(4)).passes
    assert type(passes) is int and passes == 4


def test_a_rule_may_be_named() -> None:
    x = make_inputs(KDA, SHAPE)
    state = x["initial_state"].clone()
    assert torch.equal(step(x, state, rule="kda"), call(KDA, x)[0])
    assert torch.equal(sleepkern.sleep_ingest(**x, rule="kda").final_state, state)
    assert sleepkern.explain("kda", *(x[n] for n in STEP)).chosen == "cpu"
    for wrong, message in ((None, "^rule: got NoneType"), (3, "^rule: got int")):
        with pytest.raises(TypeError, match=message):
            step(x, state, rule=wrong)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="^inplace: got str; expected a bool"):
        step(x, state, rule="kda", inplace="yes")
    with pytest.raises(TypeError, match="^state: got NoneType; expected a torch.Tensor"):
        step(x, None, rule="kda")  # type: ignore[arg-type]


def test_nan_hides_nothing_that_is_refused() -> None:
    x = make_inputs(GATED_DELTA_RULE, SHAPE)
    g = x["g"].clone()
    g[0, 0, 0], g[1, 1, 1] = torch.nan, 0.5
    for backend in BACKENDS:
        with pytest.raises(ValueError, match="g: got a log decay of 0.5"):
            call(GATED_DELTA_RULE, {**x, "g": g}, backend)
    k = 3 * x["k"]
    k[0, 0] = torch.nan
    with pytest.raises(ValueError, match="beta: got beta \\* .k.\\^2 up to"):
        sleepkern.sleep_ingest(k, x["v"], x["g"], x["beta"], passes=2)
    barely = torch.full_like(x["beta"], 2.0001)
    with pytest.raises(ValueError, match=r"up to 2\.000\d+; expected at most 2"):
        sleepkern.sleep_ingest(x["k"], x["v"], x["g"], barely, passes=2)


@pytest.mark.parametrize("backend", ["cpu", "chunked", "reference"])
def test_lengths_whose_squares_leave_the_type_are_normalised(rule: Rule, backend: str) -> None:
    for dtype, factor in ((torch.float32, 2.0**100), (torch.bfloat16, 2.0**100), (torch.float64, 2.0**600)):
        for T in (1, 80) if dtype != torch.float64 or backend != "cpu" else ():
            x = make_inputs(rule, Shape(T=T, H=1, HV=1, K=24, V=8), dtype, seed=3)
            long = {**x, "q": x["q"] * factor, "k": x["k"] * factor}
            for a, b in zip(*(call(rule, y, backend, use_qk_l2norm_in_kernel=True) for y in (long, x)), strict=True):
                assert relative_error(a, b) < (1e-2 if dtype == torch.bfloat16 else 1e-4), (dtype, T)
    x = make_inputs(rule, Shape(T=80, H=1, HV=1, K=24, V=8), seed=3)
    short = {n: t if t is None else t.clone().requires_grad_() for n, t in x.items()}
    long = {
        n: (t.detach() * 2.0**70 if n in "qk" else t.detach()).requires_grad_()
        for n, t in short.items()
        if t is not None
    }
    for y in (long, short):
        o, S = call(rule, {**short, **y}, backend, use_qk_l2norm_in_kernel=True)
        (o.square().sum() + S.square().sum()).backward()
    for n, t in long.items():
        expected = short[n].grad / 2.0**70 if n in "qk" else short[n].grad
        assert relative_error(t.grad, expected) < 1e-3, n


def test_infinities_are_found_when_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not a log decay of -inf, which forgets the state."""
    monkeypatch.setattr(settings, "DEBUG", True)
    x = make_inputs(GATED_DELTA_RULE, SHAPE)
    for name in ("q", "k", "v", "beta", "initial_state"):
        wrong = x[name].clone()
        wrong.view(-1)[3] = -torch.inf
        with pytest.raises(ValueError, match=f"^{name}: got an infinity; expected finite numbers"):
            call(GATED_DELTA_RULE, {**x, name: wrong})
    x["g"][0, 3] = -torch.inf
    o, _ = call(GATED_DELTA_RULE, x)
    assert bool(o.isfinite().all())


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_batch_of_none(rule: Rule, backend: str | None) -> None:
    x = {n: t if t is None else t[:0].requires_grad_() for n, t in make_inputs(rule, SHAPE).items()}
    o, S = call(rule, x, backend)
    (o.sum() + S.sum()).backward()
    assert o.shape == (0, 7, 2, 8) and S.shape == (0, 2, 8, 8)
    assert all(t is None or t.grad.shape == t.shape for t in x.values())
    y = {n: t if t is None else t.detach() for n, t in x.items()}
    slept = sleepkern.sleep_ingest(**y, passes=3, tol=0.1, rule=rule, backend=backend)
    assert slept.final_state.shape == S.shape and slept.residual.shape == (0, 2)
    assert step(y, y["initial_state"], rule, backend=backend).shape == o.shape
    pool = torch.ones(3, 2, 8, 8)
    none = torch.zeros(0, dtype=torch.int64)
    assert step(y, pool, rule, backend=backend, state_indices=none).shape == o.shape and bool((pool == 1).all())


def test_mixers_of_no_sequence_and_no_channel() -> None:
    for B, T, D in ((0, 5, 6), (2, 0, 6), (2, 5, 0)):
        x, weight = torch.zeros(B, T, D, requires_grad=True), torch.ones(D, 4, requires_grad=True)
        y, last = short_convolution(x, weight, torch.ones(D))
        z = gated_rms_norm(x, x, weight[:, 0])
        (y.sum() + last.sum() + z.sum()).backward()
        assert y.shape == z.shape == x.shape and last.shape == (B, 3, D) and not weight.grad.any()
    assert short_convolution_step(torch.zeros(0, 6), torch.zeros(0, 6, 4), WEIGHT).shape == (0, 6)


@pytest.mark.parametrize("name", MIXERS)
def test_mixers_refuse_what_is_no_tensor_of_floats(name: str) -> None:
    function, given = MIXERS[name]
    names = {"convolution": ("x", "weight", "bias", "past"), "norm": ("x", "gate", "weight"),
             "step": ("x", "state", "weight")}[name]  # fmt: skip
    for i, argument in enumerate(names):
        for wrong in (None, [1.0], given[i].long(), given[i].to_sparse(), given[i].to("meta")):
            if wrong is None and argument in ("bias", "past"):
                continue
            blamed = "(x|weight|gate|state|bias|past)" if isinstance(wrong, Tensor) and wrong.is_meta else argument
            with pytest.raises((TypeError, ValueError), match=f"^{blamed}: got"):
                function(*given[:i], wrong, *given[i + 1 :])
