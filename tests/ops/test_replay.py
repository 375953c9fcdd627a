"""Looped ingestion: N passes are N calls, all methods agree, heads stop soundly, divergence is refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers.backends import HERE
from torch import Tensor

import sleepkern
from sleepkern import rules
from sleepkern.backends.replay import backward as replay_backward
from sleepkern.rules import Rule
from sleepkern.testing import AWKWARD_SHAPES, TOLERANCE, Shape, call, make_inputs, relative_error, to_float64

SHAPE = Shape(B=2, T=40, H=1, HV=2, K=48, V=16)
LONG = Shape(T=150, H=1, HV=2, K=16, V=16)
PACKED = Shape(H=1, HV=2, K=16, V=8, lengths=(5, 70, 1))
STATE_PASSES = ["one token", "T=15", "T=17", "T=65", "K=96 V=256", "grouped", "packed", "K=5 V=3"]
SETTINGS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "slow": ({}, {}),
    "no decay": ({"decay": "zero"}, {}),
    "beta 2, correlated": ({"beta_max": 2.0, "correlation": 0.9}, {}),
    "normalised": ({}, {"use_qk_l2norm_in_kernel": True}),
    "state only": ({}, {"outputs": False}),
    "tol": ({}, {"tol": 0.3}),
}
"""Options of `make_inputs` and of `replay`."""


def replay(rule: Rule, x: dict[str, Any], passes: int, **options: Any) -> sleepkern.SleepResult:
    arguments = {n: t for n, t in x.items() if n != "q" or options.pop("outputs", True)}
    return sleepkern.sleep_ingest(**arguments, passes=passes, rule=rule, **options)


def expected(rule: Rule, x: dict[str, Any], passes: int) -> tuple[Tensor, Tensor]:
    """`passes` calls of the rule, one after the other, by the reference in float64."""
    x = to_float64(x)
    for _ in range(passes):
        o, state = call(rule, x, "reference")
        x = {**x, "initial_state": state}
    assert state is not None
    return o, state


def methods(rule: Rule, backend: str, shape: Shape) -> list[str]:
    if backend == "reference":
        return ["auto", "repeat"]
    rank = ["rank"] if rule.gate != "channel" and shape.T <= 64 else []
    return ["auto", "repeat", "wy", "affine", *rank]


@pytest.mark.parametrize("passes", [1, 2, 7])
@pytest.mark.parametrize("shape", [SHAPE, LONG, PACKED], ids=["one chunk", "chunks", "packed"])
@pytest.mark.parametrize("backend", HERE)
def test_passes_are_calls(rule: Rule, backend: str, shape: Shape, passes: int) -> None:
    x = make_inputs(rule, shape, seed=1)
    o, S = expected(rule, x, passes)
    for method in methods(rule, backend, shape):
        r = replay(rule, x, passes, backend=backend, method=method)
        assert r.passes == passes and r.residual is None and r.output is not None
        assert relative_error(r.final_state, S) < TOLERANCE[torch.float32], method
        assert relative_error(r.output, o) < TOLERANCE[torch.float32], method
        state_only = replay(rule, x, passes, backend=backend, method=method, outputs=False)
        assert state_only.output is None
        assert relative_error(state_only.final_state, S) < TOLERANCE[torch.float32], method


@pytest.mark.parametrize("method", ["auto", "wy", "affine", "rank"])
def test_gradients_through_all_passes(rule: Rule, method: str) -> None:
    if method == "rank" and rule.gate == "channel":
        with pytest.raises(ValueError, match="rank"):
            replay(rule, make_inputs(rule, SHAPE), 3, backend="chunked", method="rank")
        return
    grads = {}
    for backend, how in (("chunked", method), ("reference", "auto")):
        x = make_inputs(rule, Shape(T=30, H=1, HV=2, K=32, V=4), torch.float64, seed=2)
        leaves = {n: t.requires_grad_() for n, t in x.items() if t is not None}
        r = replay(rule, leaves, 5, backend=backend, method=how)
        assert r.output is not None
        (r.output.sin().sum() + r.final_state.cos().sum()).backward()
        grads[backend] = {n: t.grad for n, t in leaves.items()}
    for name, grad in grads["reference"].items():
        assert relative_error(grads["chunked"][name], grad) < TOLERANCE[torch.float64], name


def gradients(
    rule: Rule, x: dict[str, Any], passes: int, **options: Any
) -> tuple[dict[str, Tensor], sleepkern.SleepResult]:
    """Gradients of q, k, v, g, beta and the initial state, under random gradients of outputs and final state."""
    leaves = {n: t.detach().clone().requires_grad_() for n, t in x.items() if t is not None and t.is_floating_point()}
    r = replay(rule, {**x, **leaves}, passes, **options)
    generator = torch.Generator().manual_seed(0)
    results = [t for t in (r.final_state, r.output) if t is not None]
    weights = [torch.randn(t.shape, generator=generator, dtype=torch.float64).to(t) for t in results]
    torch.autograd.backward(results, weights)
    return {n: t.grad for n, t in leaves.items() if t.grad is not None}, r


@pytest.mark.computed_by("cpu")
@pytest.mark.parametrize("setting", SETTINGS)
def test_cpu_gradients_through_all_passes(rule: Rule, setting: str) -> None:
    """Every shape, one to seven passes; over the settings each shape meets each number of passes."""
    inputs, options = SETTINGS[setting]
    for i, name in enumerate(STATE_PASSES):
        shape, passes = AWKWARD_SHAPES[name], (1, 2, 7)[(i + list(SETTINGS).index(setting)) % 3]
        x = make_inputs(rule, shape, seed=i, **inputs)
        slow = shape.T > 65 and "tol" not in options  # then chunked in float64, which agrees to 1e-10, see above
        reference = "chunked" if slow else "reference"
        actual, r = gradients(rule, x, passes, backend="cpu", **options)
        expected, r64 = gradients(rule, to_float64(x), passes, backend=reference, **options)
        assert actual.keys() == expected.keys()
        assert torch.equal(torch.as_tensor(r.passes), torch.as_tensor(r64.passes))
        for n, grad in expected.items():
            error = relative_error(actual[n], grad) if grad.norm() > 1e-30 else float(actual[n].norm())
            assert error < TOLERANCE[torch.float32], f"{n}, {name}, {passes} passes"


@pytest.mark.computed_by("cpu")
def test_ways_back_through_the_passes_agree(rule: Rule, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each way is taken where it costs the least, and gives what every other one would have given."""
    find = replay_backward._Replay._method
    found: list[str] = []

    def spy(replay: replay_backward._Replay) -> str:
        found.append(find(replay))
        return found[-1]

    x = make_inputs(rule, Shape(T=40, H=1, HV=2, K=32, V=16), seed=6)
    for passes, tol, taken in ((2, None, "state_pass"), (40, None, "affine"), (3, 1e-9, "state_pass")):
        monkeypatch.setattr(replay_backward._Replay, "_method", spy)
        expected, _ = gradients(rule, x, passes, backend="cpu", tol=tol)
        assert found.pop() == ("closed" if tol is None and not rule.delta else taken)
        for other in ("state_pass", "affine"):
            monkeypatch.setattr(replay_backward._Replay, "_method", lambda replay, other=other: other)
            actual, _ = gradients(rule, x, passes, backend="cpu", tol=tol)
            for n, grad in expected.items():
                assert relative_error(actual[n], grad) < TOLERANCE[torch.float32], (n, passes, other)


@pytest.mark.parametrize("backend", HERE)
def test_tol_stops_each_head_at_its_fixed_point(backend: str) -> None:
    """Heads that decay faster stop earlier; what is left is no more than a few times the estimate."""
    x = make_inputs(rules.GATED_DELTA_RULE, Shape(T=32, H=2, HV=2, K=32, V=8), seed=3)
    x["g"][..., 0] = -0.2
    x["g"][..., 1] = -0.02
    _, limit = expected(rules.GATED_DELTA_RULE, x, 200)
    r = replay(rules.GATED_DELTA_RULE, x, 100, backend=backend, tol=1e-3)
    assert isinstance(r.passes, Tensor) and r.residual is not None and r.output is not None
    assert r.passes.shape == (1, 2) and int(r.passes[0, 0]) < int(r.passes[0, 1]) < 100
    assert bool((r.residual <= 1e-3).all())
    for head in range(2):
        assert relative_error(r.final_state[0, head], limit[0, head]) < 5e-3
        o, S = expected(rules.GATED_DELTA_RULE, x, int(r.passes[0, head]))
        assert relative_error(r.final_state[0, head], S[0, head]) < TOLERANCE[torch.float32]
        assert relative_error(r.output[:, :, head], o[:, :, head]) < TOLERANCE[torch.float32]


def test_the_plain_relative_change_would_stop_too_early() -> None:
    """Near g = 0 steps are small long before the end is near; the estimate knows."""
    x = make_inputs(rules.DELTA_RULE, Shape(T=48, H=1, HV=1, K=48, V=4), seed=4, correlation=0.5)
    _, limit = expected(rules.DELTA_RULE, x, 400)
    r = replay(rules.DELTA_RULE, x, 30, tol=1e-2)
    assert r.residual is not None
    _, before = expected(rules.DELTA_RULE, x, 29)
    change = relative_error(before, r.final_state)
    error = relative_error(r.final_state, limit)
    assert change < error / 3
    assert float(r.residual) > error / 10


@pytest.mark.parametrize("backend", HERE)
def test_divergence_is_refused(backend: str) -> None:
    x = make_inputs(rules.GATED_DELTA_RULE, SHAPE, beta_max=2.0)
    x["k"] = 2 * x["k"]
    with pytest.raises(ValueError, match=r"beta: got beta \* \|k\|\^2 up to .*expected at most 2"):
        replay(rules.GATED_DELTA_RULE, x, 2, backend=backend)
    replay(rules.GATED_DELTA_RULE, x, 1, backend=backend)
    replay(rules.GATED_DELTA_RULE, x, 2, backend=backend, use_qk_l2norm_in_kernel=True)


def test_bfloat16_keys_of_unit_length_at_beta_2_are_not_refused() -> None:
    x = make_inputs(rules.DELTA_RULE, SHAPE, torch.bfloat16)
    x["beta"] = torch.full_like(x["beta"], 2.0)
    replay(rules.DELTA_RULE, x, 3)


@pytest.mark.parametrize("passes", [8, 16, 23])
@pytest.mark.parametrize("T", [17, 40, 64])
@pytest.mark.parametrize("correlation", [0.99, 1.0])
@pytest.mark.parametrize("initial_state", [True, False])
def test_rank_is_as_exact_as_wy_when_keys_resemble_each_other(
    T: int, passes: int, correlation: float, initial_state: bool
) -> None:
    """At beta = 2 and hardly any decay; without balanced factors it is several times as far off."""
    rule, shape = rules.GATED_DELTA_RULE, Shape(T=T, H=1, HV=2, K=96, V=128)
    x = make_inputs(rule, shape, seed=passes, decay="slow", correlation=correlation)
    x |= {"g": 0.05 * x["g"], "beta": torch.full_like(x["beta"], 2 - 1e-5)}
    x |= {} if initial_state else {"initial_state": None}
    truth = replay(rule, to_float64(x), passes, backend="reference", outputs=False).final_state
    rank, wy = (
        relative_error(replay(rule, x, passes, backend="cpu", method=m, outputs=False).final_state, truth)
        for m in ("rank", "wy")
    )
    assert rank < 1.5 * wy + 1e-6


@pytest.mark.parametrize(("T", "K", "passes"), [(64, 1, 3), (3, 3, 60), (1, 1, 4)])
@pytest.mark.parametrize("method", ["auto", "rank"])
def test_rank_keeps_its_digits_where_passes_forget_nearly_all(method: str, T: int, K: int, passes: int) -> None:
    """The last state is a ten-thousandth of the first one and smaller, which the rank form takes from it in one sum."""
    x = make_inputs(rules.DELTA_RULE, Shape(T=T, H=1, HV=2, K=K, V=17), seed=9)
    x |= {"initial_state": 1000 * x["initial_state"], "v": 0.01 * x["v"], "beta": 0.9 + 0.1 * x["beta"]}
    truth = replay(rules.DELTA_RULE, to_float64(x), passes, backend="reference", outputs=False).final_state
    state = replay(rules.DELTA_RULE, x, passes, backend="cpu", method=method, outputs=False).final_state
    assert relative_error(state, truth) < TOLERANCE[torch.float32]


def test_method_is_reported() -> None:
    x = make_inputs(rules.SIMPLE_GLA, LONG)
    assert replay(rules.SIMPLE_GLA, x, 8, backend="chunked").method == "closed"
    assert replay(rules.SIMPLE_GLA, x, 8, backend="cpu").method == "closed"
    x = make_inputs(rules.KDA, LONG)
    assert replay(rules.KDA, x, 16, backend="chunked").method == "affine"
    assert replay(rules.KDA, x, 16, backend="cpu").method == "affine"
    assert replay(rules.KDA, x, 2, backend="cpu").method == "wy"
    assert replay(rules.KDA, x, 16, backend="reference").method == "repeat"
    assert replay(rules.KDA, x, 2, backend="chunked").method == "wy"
    assert replay(rules.KDA, x, 2, method="wy").method == "wy"
    x = make_inputs(rules.DELTA_RULE, Shape(T=24, K=64, V=64))
    assert replay(rules.DELTA_RULE, x, 4, backend="cpu").method == "rank"
