"""Every backend x rule x shape against the float64 reference: outputs, final state, all gradients."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers.backends import HERE
from helpers.errors import gradients
from torch import Tensor

import sleepkern
from sleepkern.backends.native.views import rows
from sleepkern.rules import RULES, Rule
from sleepkern.testing import AWKWARD_SHAPES, TOLERANCE, Shape, call, make_inputs, relative_error, to_float64
from sleepkern.testing.tolerances import IN_PIECES

FAST = [name for name in HERE if name != "reference"]
TYPES = [torch.float32, torch.bfloat16, torch.float16]
SETTINGS: dict[str, dict[str, Any]] = {
    "slow": {},
    "no decay": {"decay": "zero"},
    "strong": {"decay": "strong"},
    "extreme": {"decay": "extreme"},
    "mixed": {"decay": "mixed"},
    "beta 2, correlated": {"beta_max": 2.0, "correlation": 0.9},
    "from zero": {"initial_state": False},
}


def check(rule: Rule, x: dict[str, Any], backend: str, dtype: torch.dtype, **options: Any) -> None:
    o, S = call(rule, x, backend, **options)
    expected_o, expected_S = call(rule, to_float64(x), "reference", **options)
    assert o.dtype == dtype and o.shape == x["v"].shape and S is not None and expected_S is not None
    assert S.dtype == torch.float32
    assert relative_error(o, expected_o) <= TOLERANCE[dtype]
    assert relative_error(S, expected_S) <= TOLERANCE[dtype]


@pytest.mark.parametrize("shape", AWKWARD_SHAPES.values(), ids=AWKWARD_SHAPES)
@pytest.mark.parametrize("backend", FAST)
def test_shapes(rule: Rule, backend: str, shape: Shape) -> None:
    check(rule, make_inputs(rule, shape, seed=1), backend, torch.float32)


@pytest.mark.parametrize("setting", SETTINGS.values(), ids=SETTINGS)
@pytest.mark.parametrize("backend", FAST)
def test_settings(rule: Rule, backend: str, setting: dict[str, Any]) -> None:
    check(rule, make_inputs(rule, Shape(T=150, H=1, HV=2), seed=2, **setting), backend, torch.float32)


@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize("backend", FAST)
@pytest.mark.parametrize("T", [2, 100])
def test_types_and_normalisation(rule: Rule, backend: str, dtype: torch.dtype, T: int) -> None:
    x = make_inputs(rule, Shape(T=T, H=1, HV=2, K=40, V=24), dtype, seed=3)
    x["q"], x["k"] = 3 * x["q"], 0.5 * x["k"]
    check(rule, x, backend, dtype, use_qk_l2norm_in_kernel=True)


@pytest.mark.parametrize("backend", FAST)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("packed", [False, True])
def test_gradients(rule: Rule, backend: str, dtype: torch.dtype, packed: bool) -> None:
    shape = Shape(H=1, HV=2, K=24, V=16, lengths=(3, 65, 12)) if packed else Shape(B=2, T=80, H=1, HV=2, K=24, V=16)
    x = make_inputs(rule, shape, dtype, seed=4)
    torch.manual_seed(0)
    do = torch.randn_like(x["v"])
    dS = torch.randn(shape.sequences, shape.HV, shape.K, shape.V)
    actual, expected = gradients(rule, x, backend, do, dS), gradients(rule, to_float64(x), "reference", do, dS)
    assert actual.keys() == expected.keys()
    for name in expected:
        assert relative_error(actual[name], expected[name]) <= TOLERANCE[dtype], name
        assert actual[name].dtype == x[name].dtype


DECAYS: dict[str, tuple[float, float, Shape]] = {
    "to 20": (-20.0, 0.0, Shape(T=70, H=1, HV=2, K=24, V=16)),
    "to 20, long": (-20.0, 0.0, Shape(T=257, H=1, HV=1, K=128, V=8)),
    "20": (-20.0, -20.0, Shape(T=70, H=1, HV=2, K=24, V=16)),
    "50": (-50.0, -50.0, Shape(T=40, H=1, HV=2, K=24, V=16)),
    "40 to 60": (-60.0, -40.0, Shape(T=40, H=1, HV=2, K=24, V=16)),
}


@pytest.mark.parametrize("decays", DECAYS.values(), ids=DECAYS)
@pytest.mark.parametrize("rule", [r for r in RULES.values() if r.gate != "none"], ids=lambda rule: rule.name)
def test_gradients_of_strong_decays(rule: Rule, decays: tuple[float, float, Shape]) -> None:
    """dg relative to its own size, which is a tenth to 1e-22 of the other gradients'."""
    low, high, shape = decays
    x = make_inputs(rule, shape, seed=4)
    x["g"] = low + (high - low) * torch.rand(x["g"].shape, generator=torch.Generator().manual_seed(7))
    torch.manual_seed(0)
    do, dS = torch.randn_like(x["v"]), torch.randn(shape.sequences, shape.HV, shape.K, shape.V)
    expected = gradients(rule, to_float64(x), "reference", do, dS)
    assert 1e-24 < float(expected["g"].norm()) < 2
    for backend in FAST:
        actual = gradients(rule, x, backend, do, dS)
        for name in expected:
            assert relative_error(actual[name], expected[name]) <= TOLERANCE[torch.float32], (backend, name)


@pytest.mark.parametrize("backend", HERE)
def test_one_call_is_several_chained_calls(rule: Rule, backend: str) -> None:
    x = make_inputs(rule, Shape(T=97, H=1, HV=2, K=32, V=32), seed=5)
    whole_o, whole_S = call(rule, x, backend)
    outputs, state = [], x["initial_state"]
    for a, b in ((0, 20), (20, 21), (21, 23), (23, 97)):
        cut = {n: t[:, a:b] if n in ("q", "k", "v", "g", "beta") and t is not None else t for n, t in x.items()}
        o, state = call(rule, {**cut, "initial_state": state}, backend)
        outputs.append(o)
    assert whole_S is not None and state is not None
    assert relative_error(torch.cat(outputs, 1), whole_o) < IN_PIECES
    assert relative_error(state, whole_S) < IN_PIECES
    forgetful, _ = call(rule, {**x, "initial_state": None}, backend)
    assert relative_error(forgetful, whole_o) > 0.05  # the state matters, so the test above could fail


@pytest.mark.parametrize("backend", HERE)
def test_no_tokens_return_the_initial_state(rule: Rule, backend: str) -> None:
    x = make_inputs(rule, Shape(B=2, T=0, K=8, V=8))
    o, S = call(rule, x, backend)
    assert o.shape == (2, 0, 2, 8) and S is not None
    assert torch.equal(S, x["initial_state"]) and S.data_ptr() != x["initial_state"].data_ptr()


@pytest.mark.parametrize("backend", HERE)
@pytest.mark.parametrize("shape", [Shape(B=2, T=0, K=8, V=8), Shape(lengths=(0, 0), K=8, V=8)], ids=["rows", "packed"])
@pytest.mark.parametrize("initial_state", [False, True])
def test_no_tokens_have_gradients(rule: Rule, backend: str, shape: Shape, initial_state: bool) -> None:
    x = make_inputs(rule, shape, initial_state=initial_state)
    leaves = {n: t.requires_grad_() for n, t in x.items() if isinstance(t, Tensor) and n != "cu_seqlens"}
    for output in (0, 1):
        made = call(rule, x, backend)[output]
        assert made is not None and made.requires_grad
        grads = torch.autograd.grad(made.sum(), list(leaves.values()), allow_unused=True)
        for (name, t), d in zip(leaves.items(), grads, strict=True):
            ones = output == 1 and name == "initial_state"
            assert d is None or torch.equal(d, torch.full_like(t, float(ones))), name
    slept = sleepkern.sleep_ingest(**x, passes=3, rule=rule, backend=backend)
    assert slept.output is not None
    (slept.output.sum() + slept.final_state.sum()).backward()


@pytest.mark.parametrize("backend", HERE)
def test_inputs_and_initial_state_are_left_alone(rule: Rule, backend: str) -> None:
    x = make_inputs(rule, Shape(T=3, K=8, V=8))
    before = {n: t.clone() for n, t in x.items() if isinstance(t, Tensor)}
    call(rule, x, backend)
    assert all(torch.equal(x[n], t) for n, t in before.items())


@pytest.mark.parametrize("backend", FAST)
def test_a_log_decay_of_minus_infinity_forgets(rule: Rule, backend: str) -> None:
    x = make_inputs(rule, Shape(T=80, H=1, HV=2), seed=9)
    if x["g"] is not None:
        x["g"][:, 20] = -torch.inf
    check(rule, x, backend, torch.float32)


@pytest.mark.parametrize("T", [1, 3, 16, 70])
@pytest.mark.parametrize("backend", HERE)
def test_step_updates_the_state_in_place(rule: Rule, backend: str, T: int) -> None:
    x = make_inputs(rule, Shape(B=2, T=T, H=1, HV=2, K=24, V=37), seed=6)
    expected_o, expected_S = call(rule, to_float64(x), "reference")
    state = x["initial_state"]
    arguments = (x["q"], x["k"], x["v"], x["g"], x["beta"])
    kept = state.clone()
    o, after = sleepkern.recurrent_step(*arguments, kept, rule=rule, inplace=False, backend=backend)
    assert torch.equal(kept, state) and after.data_ptr() != kept.data_ptr()
    o2, same = sleepkern.recurrent_step(*arguments, state, rule=rule, backend=backend)
    assert same is state and expected_S is not None
    for actual in (o, o2):
        assert relative_error(actual, expected_o) < TOLERANCE[torch.float32]
    for actual in (after, same):
        assert relative_error(actual, expected_S) < TOLERANCE[torch.float32]


@pytest.mark.parametrize("backend", FAST)
def test_strided_inputs(rule: Rule, backend: str) -> None:
    """Slices of one wide projection, transposed layouts, an expanded batch and a strided state."""
    x = make_inputs(rule, Shape(B=2, T=70, H=2, HV=2, K=16, V=16), seed=7)
    expected_o, expected_S = call(rule, x, backend)
    wide = torch.cat([x["q"].flatten(2), x["k"].flatten(2), x["v"].flatten(2)], -1)
    sliced = {n: wide[..., i * 32 : (i + 1) * 32].unflatten(-1, (2, 16)) for i, n in enumerate("qkv")}
    state = x["initial_state"].transpose(2, 3).contiguous().transpose(2, 3)
    transposed = {n: t.transpose(1, 2).contiguous().transpose(1, 2) for n, t in x.items() if n in "qkv"}
    for other in (sliced, transposed):
        o, S = call(rule, {**x, **other, "initial_state": state}, backend)
        assert torch.equal(o, expected_o) and S is not None and torch.equal(S, expected_S)
    strided = state.clone(memory_format=torch.preserve_format)
    assert not strided.is_contiguous()
    sleepkern.recurrent_step(*(x[n] for n in ("q", "k", "v", "g", "beta")), strided, rule=rule, backend=backend)
    assert torch.equal(strided, expected_S)


def test_a_slice_of_a_projection_is_read_in_place() -> None:
    wide = torch.randn(2, 9, 3 * 32)
    q = wide[..., 32:64].unflatten(-1, (2, 16))
    kept, (address, stride, _) = rows(q, 32)
    assert kept is q and address == q.data_ptr() and stride == 96


@pytest.mark.computed_by("cpu")
def test_mixed_gate_types(rule: Rule) -> None:
    """q, k, v, beta in bfloat16 with g in float32, bfloat16 or float64, as models hand them over."""
    x = make_inputs(rule, Shape(T=70, K=32, V=32), torch.bfloat16, seed=8)
    for gate_type in (torch.float32, torch.bfloat16, torch.float64):
        y = {**x, "g": None if x["g"] is None else x["g"].to(gate_type), "beta": x["beta"].to(gate_type)}
        check(rule, y, "cpu", torch.bfloat16)
