"""Gates that a call makes of raw projections: the definition, every backend against it, and what is refused."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from helpers.backends import HERE
from helpers.errors import gradients, results
from helpers.raw_gates import raw_inputs, with_made_gates

import sleepkern
from sleepkern.backends.torch_gates import log_decay
from sleepkern.rules import DELTA_RULE, GATED_DELTA_RULE, KDA, RULES, SIMPLE_GLA, Rule
from sleepkern.testing import TOLERANCE, Shape, call, relative_error, to_float64
from sleepkern.testing.tolerances import REORDERED_DOUBLE

FAST = [name for name in HERE if name != "reference"]
SHAPES = {
    "T=0": Shape(B=2, T=0, K=8, V=8),
    "T=1": Shape(B=2, T=1, H=1, HV=2, K=24, V=16),
    "T=15": Shape(T=15, H=1, HV=3, K=5, V=3),
    "T=17": Shape(T=17, K=96, V=32),
    "T=63": Shape(B=2, T=63, H=2, HV=4, K=16, V=24),
    "T=65": Shape(T=65, H=1, HV=2, K=40, V=17),
    "packed": Shape(H=1, HV=2, K=24, V=16, lengths=(1, 64, 65, 0, 17, 3)),
}
OPTIONS: dict[str, dict[str, Any]] = {
    "softplus": {},
    "bounded": {"lower_bound": -5.0},
    "doubled": {"allow_neg_eigval": True},
    "fast rates": {"rate": (1.0, 16.0)},
}


def upstream(x: dict[str, Any], shape: Shape) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(5)
    do = torch.randn(x["v"].shape, generator=generator).to(x["v"].dtype)
    return do, torch.randn(shape.sequences, shape.HV, shape.K, shape.V, generator=generator)


def compare(rule: Rule, x: dict[str, Any], shape: Shape, backend: str, tolerance: float, **options: Any) -> None:
    do, dstate = upstream(x, shape)
    actual = results(rule, x, backend, do, dstate, **options)
    expected = results(rule, to_float64(x), "reference", do, dstate, **options)
    assert actual.keys() == expected.keys()
    for name in expected:
        assert actual[name].dtype == (torch.float32 if name == "state" else x["v" if name == "o" else name].dtype), name
        if shape.T or name in ("o", "state", "initial_state"):
            assert relative_error(actual[name], expected[name]) <= tolerance, name
        else:
            assert not actual[name].any(), name


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_the_definition_is_the_formula(rule: Rule, options: dict[str, Any]) -> None:
    shape = SHAPES["T=17"]
    x = raw_inputs(rule, shape, torch.float64, seed=1, **options)
    do, dstate = upstream(x, shape)
    names = [n for n, t in x.items() if isinstance(t, torch.Tensor) and t.is_floating_point()]
    leaves = {n: x[n].clone().requires_grad_() for n in names}
    o, S = call(rule, with_made_gates({**x, **leaves}), "reference")
    torch.autograd.backward([o, S], [do.double(), dstate.double()])
    actual = results(rule, x, "reference", do, dstate)
    assert relative_error(actual["o"], o) <= REORDERED_DOUBLE
    for name in names:
        assert leaves[name].grad is not None and relative_error(actual[name], leaves[name].grad) <= 1e-13, name


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("backend", FAST)
def test_shapes(rule: Rule, backend: str, shape: Shape) -> None:
    compare(rule, raw_inputs(rule, shape, seed=2), shape, backend, TOLERANCE[torch.float32])


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("backend", FAST)
def test_options(rule: Rule, backend: str, options: dict[str, Any]) -> None:
    shape = Shape(B=2, T=130, H=1, HV=2, K=24, V=16)
    compare(rule, raw_inputs(rule, shape, seed=3, **options), shape, backend, TOLERANCE[torch.float32])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("backend", FAST)
def test_types(rule: Rule, backend: str, dtype: torch.dtype) -> None:
    shape = Shape(B=2, T=80, H=1, HV=2, K=40, V=24)
    compare(rule, raw_inputs(rule, shape, dtype, seed=4), shape, backend, TOLERANCE[dtype], normalize=True)


GATED = [r for r in RULES.values() if r.gate != "none"]


@pytest.mark.parametrize("rule", GATED, ids=lambda rule: rule.name)
@pytest.mark.parametrize("backend", FAST)
def test_slow_decay_of_a_far_raw_gate(rule: Rule, backend: str) -> None:
    """exp(-80) to exp(-20) of a decay, which 1 + exp(x) would lose; the gradients are as small, and as exact."""
    shape = Shape(T=70, H=1, HV=2, K=24, V=16)
    x = raw_inputs(rule, shape, seed=5)
    x["g"] = -20 - 30 * torch.rand(x["g"].shape, generator=torch.Generator().manual_seed(7))
    compare(rule, x, shape, backend, TOLERANCE[torch.float32])


@pytest.mark.parametrize("bound", [None, -5.0])
@pytest.mark.parametrize("rule", GATED, ids=lambda rule: rule.name)
@pytest.mark.parametrize("backend", HERE)
def test_large_raw_gates_do_not_overflow(rule: Rule, backend: str, bound: float | None) -> None:
    shape = Shape(T=40, H=1, HV=2, K=8, V=8)
    x = raw_inputs(rule, shape, seed=6, lower_bound=bound)
    x["g"] = x["g"].sign() * 200
    x["beta"] = x["beta"].sign() * 200
    do, dstate = upstream(x, shape)
    actual = results(rule, x, backend, do, dstate)
    expected = results(rule, to_float64(x), "reference", do, dstate)
    for name in ("o", "state", "v", "A_log", "dt_bias"):
        apart = (actual[name].double() - expected[name]).norm()
        assert float(apart) <= 1e-4 * float(expected[name].norm()) + 1e-12, name
    assert all(t.isfinite().all() for t in actual.values())


@pytest.mark.parametrize("rule", GATED, ids=lambda rule: rule.name)
@pytest.mark.parametrize("backend", FAST)
def test_one_gate_alone_and_no_bias(rule: Rule, backend: str) -> None:
    shape = Shape(T=33, H=1, HV=2, K=16, V=8)
    x = raw_inputs(rule, shape, seed=7, lower_bound=-3.0)
    made = with_made_gates(x)
    for changes in (
        {"dt_bias": None},
        {"A_log": None},
        {"A_log": None, "dt_bias": None},
        {"beta": made["beta"], "use_beta_sigmoid_in_kernel": False},
        {"g": made["g"], "use_gate_in_kernel": False, "A_log": None, "dt_bias": None, "lower_bound": None},
        *([{"dt_bias": x["dt_bias"].flatten()}] if rule.gate == "channel" else []),
    ):
        compare(rule, {**x, **changes}, shape, backend, TOLERANCE[torch.float32])


@pytest.mark.parametrize("backend", HERE)
def test_decode(rule: Rule, backend: str) -> None:
    x = raw_inputs(rule, Shape(B=2, T=3, H=1, HV=2, K=24, V=17), seed=8)
    expected_o, expected_S = call(rule, to_float64(x), "reference")
    arguments = {n: t for n, t in x.items() if n not in ("initial_state", "cu_seqlens")} | {"g": x["g"]}
    state = x["initial_state"].clone()
    o, same = sleepkern.recurrent_step(**arguments, state=state, rule=rule, backend=backend)
    assert same is state
    pool = torch.zeros(4, *state.shape[1:]).index_copy_(0, torch.tensor([2, 1]), x["initial_state"])
    places = torch.tensor([2, 1])
    pool_o, _ = sleepkern.recurrent_step(**arguments, state=pool, rule=rule, backend=backend, state_indices=places)
    for one_o, one_S in ((o, state), (pool_o, pool[places])):
        assert relative_error(one_o, expected_o) <= TOLERANCE[torch.float32]
        assert relative_error(one_S, expected_S) <= TOLERANCE[torch.float32]


@pytest.mark.parametrize("backend", HERE)
def test_replay(rule: Rule, backend: str) -> None:
    shape = Shape(T=20, H=1, HV=2, K=16, V=8)
    x = raw_inputs(rule, shape, seed=9)
    do, dstate = upstream(x, shape)
    actual = results(rule, x, backend, do, dstate, passes=3)
    expected = results(rule, with_made_gates(to_float64(x)), "reference", do, dstate, passes=3)
    assert relative_error(actual["o"], expected["o"]) <= TOLERANCE[torch.float32]
    assert relative_error(actual["state"], expected["state"]) <= TOLERANCE[torch.float32]


@pytest.mark.parametrize("rule", [GATED_DELTA_RULE, KDA], ids=lambda rule: rule.name)
def test_a_decode_step_is_differentiable_in_the_parameters(rule: Rule) -> None:
    shape = Shape(B=2, T=1, H=1, HV=2, K=8, V=8)
    x = raw_inputs(rule, shape, seed=10)
    do, _ = upstream(x, shape)
    expected = gradients(rule, to_float64(x), "reference", do, torch.zeros(2, 2, 8, 8))
    arguments = {n: t for n, t in x.items() if n not in ("initial_state", "cu_seqlens")}
    for name in ("A_log", "dt_bias"):
        arguments[name] = x[name].clone().requires_grad_()
    o, _ = sleepkern.recurrent_step(**arguments, state=x["initial_state"].clone(), rule=rule)
    o.backward(do)
    for name in ("A_log", "dt_bias"):
        assert relative_error(arguments[name].grad, expected[name]) <= TOLERANCE[torch.float32]


@pytest.mark.parametrize(
    "rule", [GATED_DELTA_RULE, pytest.param(KDA, marks=pytest.mark.hardening)], ids=lambda rule: rule.name
)
@pytest.mark.parametrize("bound", [None, -5.0])
def test_second_derivatives(rule: Rule, bound: float | None) -> None:
    x = raw_inputs(rule, Shape(T=5, H=1, HV=1, K=3, V=2), torch.float64, seed=11, lower_bound=bound)
    names = ("g", "beta", "A_log", "dt_bias")

    def run(*tensors: torch.Tensor) -> torch.Tensor:
        return call(rule, {**x, **dict(zip(names, tensors, strict=True))})[0]

    leaves = [x[n].requires_grad_() for n in names]
    assert torch.autograd.gradgradcheck(run, leaves, rtol=1e-4)
    single = [t.detach().float().requires_grad_() for t in leaves]
    narrow = {n: t.float() if isinstance(t, torch.Tensor) and t.is_floating_point() else t for n, t in x.items()}
    o = call(rule, {**narrow, **dict(zip(names, single, strict=True))})[0]
    first = torch.autograd.grad(o.sin().sum(), single, create_graph=True)
    second = torch.autograd.grad(sum(d.sin().sum() for d in first), single)
    wide = torch.autograd.grad(run(*leaves).sin().sum(), leaves, create_graph=True)
    expected = torch.autograd.grad(sum(d.sin().sum() for d in wide), leaves)
    for name, a, e in zip(names, second, expected, strict=True):
        assert relative_error(a, e) < 1e-4, name


@pytest.mark.parametrize("rule", [GATED_DELTA_RULE, KDA], ids=lambda rule: rule.name)
def test_transforms_differentiate_raw_gates(rule: Rule) -> None:
    x = raw_inputs(rule, Shape(T=5, H=1, HV=1, K=3, V=2), torch.float64, seed=12)

    def loss(A_log: torch.Tensor) -> torch.Tensor:
        return call(rule, {**x, "A_log": A_log})[0].sin().sum()

    leaf = x["A_log"].clone().requires_grad_()
    (expected,) = torch.autograd.grad(loss(leaf), leaf)
    assert relative_error(torch.func.grad(loss)(x["A_log"]), expected) < 1e-12


@pytest.mark.parametrize("rule", [GATED_DELTA_RULE, KDA], ids=lambda rule: rule.name)
def test_a_compiled_graph_is_whole(rule: Rule) -> None:
    shape = Shape(T=33, H=1, HV=2, K=16, V=8)
    x = raw_inputs(rule, shape, seed=13)
    names = ("q", "k", "v", "g", "beta", "A_log", "dt_bias")
    rest = {n: t for n, t in x.items() if n not in names}

    def run(*tensors: torch.Tensor) -> torch.Tensor:
        return call(rule, {**rest, **dict(zip(names, tensors, strict=True))})[0]

    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    leaves, same = ([x[n].clone().requires_grad_() for n in names] for _ in range(2))
    o, expected = compiled(*leaves), run(*same)
    assert relative_error(o, expected) < 1e-6
    o.sin().sum().backward()
    expected.sin().sum().backward()
    for name, a, e in zip(names, leaves, same, strict=True):
        assert relative_error(a.grad, e.grad) < 1e-5, name


@pytest.mark.parametrize("rule", [GATED_DELTA_RULE, KDA], ids=lambda rule: rule.name)
def test_the_operators_are_what_torch_expects(rule: Rule) -> None:
    x = raw_inputs(rule, Shape(T=7, H=1, HV=2, K=4, V=3), seed=14)
    names = ("q", "k", "v", "g", "beta", "initial_state", "A_log", "dt_bias")
    tensors = [x[n].requires_grad_() for n in names]
    gates = (None, True, 1.0)
    arguments = (*tensors, None, rule.name, "cpu", 0.5, True, *gates)
    checks = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(torch.ops.sleepkern.ingest_of_raw.default, arguments, test_utils=checks)
    with pytest.raises(ValueError, match="backend: got 'chunked', whose kernels make no gates; expected cpu or triton"):
        torch.ops.sleepkern.ingest_of_raw(*tensors, None, rule.name, "chunked", 0.5, True, *gates)


def test_the_formula_at_its_ends() -> None:
    g = torch.tensor([-200.0, -1e-30, 0.0, 200.0], dtype=torch.float64).view(1, 4, 1).requires_grad_()
    made = log_decay(g, torch.zeros(1), None)
    expected = torch.tensor([-math.exp(-200), -0.6931471805599453, -0.6931471805599453, -200.0], dtype=torch.float64)
    assert torch.allclose(made.flatten(), expected, rtol=1e-15, atol=0)
    (slope,) = torch.autograd.grad(made.sum(), g)
    assert torch.allclose(slope.flatten(), -torch.sigmoid(g.detach().flatten()), rtol=1e-14, atol=0)
    assert slope.flatten()[2] == -0.5


BAD: dict[str, tuple[type[Exception], str, dict[str, Any]]] = {
    "flag": (TypeError, r"use_gate_in_kernel: got int; expected a bool", {"use_gate_in_kernel": 1}),
    "sigmoid flag": (TypeError, r"use_beta_sigmoid_in_kernel: got NoneType", {"use_beta_sigmoid_in_kernel": None}),
    "doubled flag": (TypeError, r"allow_neg_eigval: got float; expected a bool", {"allow_neg_eigval": 1.0}),
    "doubled alone": (
        ValueError,
        r"allow_neg_eigval: got True; expected use_beta_sigmoid_in_kernel=True",
        {"allow_neg_eigval": True, "use_beta_sigmoid_in_kernel": False},
    ),
    "no A_log": (ValueError, r"A_log: got None; expected a tensor \[HV\]", {"A_log": None}),
    "A_log list": (TypeError, r"A_log: got list; expected a torch.Tensor", {"A_log": [0.0]}),
    "A_log shape": (ValueError, r"A_log: got shape \[3\]; expected \[2\]", {"A_log": torch.zeros(3)}),
    "A_log integers": (TypeError, r"A_log: got torch.int64; expected one of", {"A_log": torch.zeros(2).long()}),
    "A_log device": (ValueError, r"A_log: got device meta; expected cpu", {"A_log": torch.zeros(2, device="meta")}),
    "A_log of made gates": (
        ValueError,
        r"A_log: got Tensor; expected use_gate_in_kernel=True beside it, or None",
        {"use_gate_in_kernel": False},
    ),
    "dt_bias shape": (ValueError, r"dt_bias: got shape \[2, 8\]; expected \[2\]", {"dt_bias": torch.zeros(2, 8)}),
    "bound above": (ValueError, r"lower_bound: got 0.0; expected a log decay below 0", {"lower_bound": 0.0}),
    "bound text": (TypeError, r"lower_bound: got str; expected a number", {"lower_bound": "-5"}),
    "no g": (ValueError, r"g: gated_delta_rule needs it, got None", {"g": None}),
}


@pytest.mark.parametrize(("error", "message", "change"), BAD.values(), ids=BAD)
def test_bad_input(error: type[Exception], message: str, change: dict[str, Any]) -> None:
    x = raw_inputs(GATED_DELTA_RULE, Shape(T=3, H=1, HV=2, K=8, V=8))
    with pytest.raises(error, match=f"^{message}"):
        call(GATED_DELTA_RULE, {**x, **change})
    x = {n: t for n, t in {**x, **change}.items() if n != "cu_seqlens"}
    with pytest.raises(error, match=f"^{message}"):
        sleepkern.recurrent_step(**{n: t for n, t in x.items() if n != "initial_state"}, state=x["initial_state"])


def test_options_that_a_rule_has_not() -> None:
    x = raw_inputs(DELTA_RULE, Shape(T=3, H=1, HV=2, K=8, V=8))
    more = {"g": None, "use_gate_in_kernel": True, "A_log": torch.zeros(2), "rule": DELTA_RULE}
    arguments = {n: t for n, t in x.items() if n not in ("initial_state", "cu_seqlens")}
    with pytest.raises(ValueError, match="use_gate_in_kernel: delta_rule has no decay, got True; expected False"):
        sleepkern.recurrent_step(**{**arguments, **more}, state=x["initial_state"])
    x = raw_inputs(SIMPLE_GLA, Shape(T=3, H=1, HV=2, K=8, V=8))
    with pytest.raises(ValueError, match=r"beta: got None; expected a tensor \[1, 3, 2\] beside"):
        call(SIMPLE_GLA, {**x, "beta": None})
    x = raw_inputs(KDA, Shape(T=3, H=1, HV=2, K=8, V=8))
    with pytest.raises(ValueError, match=r"dt_bias: got shape \[2\]; expected \[2, 8\] or \[16\]"):
        call(KDA, {**x, "dt_bias": torch.zeros(2)})
