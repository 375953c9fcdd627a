"""A plain replay goes to the CUDA kernels past the checks in Python; every other call takes them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import replace as changed
from types import ModuleType
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor

import sleepkern
from sleepkern import backends, settings
from sleepkern.backends.cuda import recurrence as cuda
from sleepkern.ops import fast_path, fast_replay
from sleepkern.problems import recurrence as problems
from sleepkern.rules import DELTA_RULE, GATED_DELTA_RULE, KDA, Rule
from sleepkern.testing import TOLERANCE, Shape, make_inputs, relative_error

NAMES = ("q", "k", "v", "g", "beta", "initial_state")
SHAPES = {
    "one chunk": Shape(B=2, T=15, H=1, HV=2, K=24, V=37),
    "many chunks": Shape(T=150, H=2, HV=2, K=40, V=20),
}
pytestmark = pytest.mark.skipif(not fast_path._usable, reason="this torch has no exchange table of tensors")


class Named(Tensor):
    """A subclass with memory of its own."""


@pytest.fixture
def replay(module: ModuleType, on: Callable[..., Any]) -> Iterator[mock.Mock]:
    """The C++ function, which takes CPU tensors for a GPU's."""
    assert module.use_exchange_api(Tensor.__dlpack_c_exchange_api__)
    watched, describe = mock.Mock(wraps=module.try_fast_replay), problems.describe
    fast_replay._plans.clear()
    described = mock.Mock(side_effect=lambda *a, **b: describe(*a, **b)._replace(device="cuda"))
    with ExitStack() as patches:
        patches.enter_context(on())
        patches.enter_context(mock.patch.object(fast_path, "_decoding_gpu", return_value=0))
        patches.enter_context(mock.patch.object(fast_replay, "_raw_stream", return_value=0))
        patches.enter_context(mock.patch.object(problems, "describe", described))
        cuda._C.try_fast_replay = watched
        yield watched
    fast_replay._plans.clear()


def inputs(rule: Rule, shape: Shape, dtype: torch.dtype = torch.bfloat16, seed: int = 3) -> dict[str, Any]:
    x = make_inputs(rule, shape, dtype, seed=seed)
    return {n: x[n] for n in NAMES}


def ingest(rule: Rule, x: dict[str, Any], passes: int = 4, **options: Any) -> sleepkern.SleepResult:
    return sleepkern.sleep_ingest(**x, passes=passes, rule=rule, use_qk_l2norm_in_kernel=True, **options)


@pytest.mark.parametrize("given", ["all", "no q", "no state", "neither"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("rule", [GATED_DELTA_RULE, KDA, DELTA_RULE], ids=lambda rule: rule.name)
def test_against_the_reference(rule: Rule, shape: Shape, dtype: torch.dtype, given: str, replay: mock.Mock) -> None:
    """The second call of a problem is the fast one, on other tensors than the first."""
    if dtype == torch.float16 and given != "all":
        pytest.skip("the types differ in the kernels alone")
    for seed in (3, 4):
        x = inputs(rule, shape, dtype, seed)
        x["q"] = None if given in ("no q", "neither") else x["q"]
        x["initial_state"] = None if given in ("no state", "neither") else x["initial_state"]
        expected = ingest(rule, {n: None if t is None else t.double() for n, t in x.items()}, backend="reference")
        found = ingest(rule, x)
    assert replay.call_count == 1 and found.passes == 4 and found.residual is None
    assert relative_error(found.final_state, expected.final_state) < TOLERANCE[dtype]
    assert (found.output is None) is (x["q"] is None)
    if found.output is not None:
        assert found.output.dtype == dtype
        assert relative_error(found.output, expected.output) < TOLERANCE[dtype]


def test_results_are_those_of_the_steps(replay: mock.Mock) -> None:
    for shape in SHAPES.values():
        x = inputs(GATED_DELTA_RULE, shape)
        steps, fast = ingest(GATED_DELTA_RULE, x), ingest(GATED_DELTA_RULE, x)
        assert replay.call_count == 1 and fast.method == steps.method
        assert torch.equal(fast.final_state, steps.final_state) and torch.equal(fast.output, steps.output)
        assert fast.final_state.data_ptr() not in (steps.final_state.data_ptr(), x["initial_state"].data_ptr())
        replay.reset_mock()


def test_slices_of_a_projection_are_read_in_place(replay: mock.Mock) -> None:
    shape = Shape(B=1, T=20, H=2, HV=2, K=16, V=16)
    x = inputs(GATED_DELTA_RULE, shape)
    expected = ingest(GATED_DELTA_RULE, x)
    wide = torch.cat([x[n].flatten(2) for n in ("q", "k", "v")], dim=-1)
    for n, part in zip(("q", "k", "v"), wide.split(32, dim=-1), strict=True):
        x[n] = part.unflatten(-1, (2, 16))
    found = ingest(GATED_DELTA_RULE, x)
    assert replay.call_count == 1
    assert torch.equal(found.final_state, expected.final_state) and torch.equal(found.output, expected.output)


def test_another_problem_has_another_plan(replay: mock.Mock) -> None:
    """Whatever says what is computed is part of what a plan is remembered by."""
    base = Shape(B=2, T=15, H=1, HV=2, K=24, V=24)
    calls: list[tuple[Rule, Shape, torch.dtype, dict[str, Any]]] = [
        (GATED_DELTA_RULE, base, torch.bfloat16, {}),
        (GATED_DELTA_RULE, base, torch.bfloat16, {"passes": 3}),
        (GATED_DELTA_RULE, base, torch.bfloat16, {"scale": 0.5}),
        (GATED_DELTA_RULE, base, torch.float32, {}),
        (DELTA_RULE, base, torch.bfloat16, {}),
        (GATED_DELTA_RULE, changed(base, T=14), torch.bfloat16, {}),
        (GATED_DELTA_RULE, changed(base, B=3), torch.bfloat16, {}),
        (GATED_DELTA_RULE, changed(base, H=2), torch.bfloat16, {}),
        (GATED_DELTA_RULE, changed(base, HV=1), torch.bfloat16, {}),
        (GATED_DELTA_RULE, changed(base, K=23), torch.bfloat16, {}),
        (GATED_DELTA_RULE, changed(base, V=23), torch.bfloat16, {}),
    ]
    x = [inputs(rule, shape, dtype) for rule, shape, dtype, _ in calls]
    steps = [ingest(rule, t, **more) for t, (rule, _, _, more) in zip(x, calls, strict=True)]
    assert replay.call_count == 0
    fast = [ingest(rule, t, **more) for t, (rule, _, _, more) in zip(x, calls, strict=True)]
    assert replay.call_count == len(calls)
    for a, b in zip(fast, steps, strict=True):
        assert torch.equal(a.final_state, b.final_state) and torch.equal(a.output, b.output) and a.passes == b.passes
    plain = [sleepkern.sleep_ingest(**{**x[0], "k": 0.1 * x[0]["k"]}, passes=4) for _ in range(2)]
    assert replay.call_count == len(calls) + 1 and torch.equal(plain[0].final_state, plain[1].final_state)
    assert ingest(GATED_DELTA_RULE, {**x[0], "q": None}).output is None


def test_other_calls_are_left_to_the_checks(replay: mock.Mock) -> None:
    rule, shape = GATED_DELTA_RULE, Shape(B=2, T=15, H=1, HV=2, K=16, V=16)

    def taken(change: Callable[[dict[str, Any]], None] = lambda x: None, passes: Any = 4, **options: Any) -> bool:
        x = inputs(rule, shape)
        change(x)
        normalize, scale = options.get("normalize", True), options.get("scale")
        replayed = (passes, options.get("tol"), options.get("method", "auto"), options.get("cu_seqlens"))
        key = fast_replay.key_of(rule, x["k"], x["v"], x["q"], *replayed, options.get("backend"), scale, normalize)
        return fast_replay.run(key, *(x[n] for n in NAMES)) is not None

    def put(name: str, value: Callable[[Tensor], Any]) -> Callable[[dict[str, Any]], None]:
        return lambda x: x.update({name: value(x[name])})

    assert not taken()  # nothing is remembered yet
    for backend in (None, "cuda"):
        ingest(rule, inputs(rule, shape), backend=backend)
        assert taken(backend=backend)
    for option in ({"tol": 1e-3}, {"method": "wy"}, {"backend": "reference"}, {"passes": True}, {"passes": 4.0},
                   {"normalize": 1}, {"scale": 1}, {"backend": 3}, {"cu_seqlens": torch.tensor([0, 15])}):  # fmt: skip
        assert not taken(**option)
    changes: dict[str, Callable[[Tensor], Any]] = {
        "another type": lambda t: t.double(),
        "none": lambda t: None,
        "negative": lambda t: torch._neg_view(-t),
        "needs a gradient": lambda t: t.requires_grad_(),
        "a subclass": lambda t: t.as_subclass(Named),
        "on another device": lambda t: t.to("meta"),
        "one token less": lambda t: t[:, :-1],
        "one row less": lambda t: t[:1],
        "gaps": lambda t: torch.stack([t, t], -1)[..., 0],
    }
    for name in NAMES:
        for what, change in changes.items():
            if (name, what) in (("q", "none"), ("initial_state", "none")):
                continue
            assert not taken(put(name, change)), (name, what)
    assert not taken(put("initial_state", lambda t: t.transpose(2, 3)))
    for patch in (
        mock.patch.object(settings, "DEBUG", True), mock.patch.object(settings, "BACKEND", "triton"),
        mock.patch.object(backends, "BACKENDS", (*backends.BACKENDS,)), torch.autocast("cpu", torch.bfloat16),
        torch.autograd.forward_ad.dual_level(), mock.patch.object(fast_path, "_decoding_gpu", return_value=None),
        mock.patch.object(fast_replay, "_compiling", return_value=True),
        mock.patch.object(fast_replay, "_modes", return_value=1),
        mock.patch.object(fast_replay, "_transforms", return_value=object()),
    ):  # fmt: skip
        with patch:
            assert not taken()
    assert taken()


def test_the_key_has_what_the_plan_and_the_choice_look_at(replay: mock.Mock) -> None:
    x = inputs(GATED_DELTA_RULE, Shape(B=2, T=15, H=1, HV=2, K=16, V=16))

    def key(q: Tensor | None = x["q"], scale: Any = 1.0) -> Any:
        options = (4, None, "auto", None, None, scale, True)
        return fast_replay.key_of(GATED_DELTA_RULE, x["k"], x["v"], q, *options)

    keys = [key(), key(q=None), key(scale=None), key(scale=2.0)]
    with mock.patch.object(fast_path, "_decoding_gpu", return_value=1):
        keys.append(key())
    with mock.patch.object(fast_replay, "_precision", return_value="medium"):
        keys.append(key())
    assert len(set(keys)) == len(keys) and key() == keys[0] and key(scale=1) is None


def test_one_pass_is_no_replay(replay: mock.Mock) -> None:
    """A few tokens are decoded, by a kernel of its own."""
    x = inputs(GATED_DELTA_RULE, Shape(B=2, T=4, H=1, HV=2, K=16, V=16))
    for _ in range(2):
        ingest(GATED_DELTA_RULE, x, passes=1)
    assert not fast_replay._plans and replay.call_count == 0


def test_gradients_are_those_of_the_steps(replay: mock.Mock) -> None:
    """A call that is recorded is not plain."""
    x = inputs(DELTA_RULE, Shape(T=15, H=1, HV=1, K=16, V=16), torch.float32)
    for _ in range(2):
        ingest(DELTA_RULE, x)
    x["k"].requires_grad_()
    result = ingest(DELTA_RULE, x)
    assert replay.call_count == 1 and result.final_state.requires_grad
    with torch.no_grad():
        assert not ingest(DELTA_RULE, x).final_state.requires_grad
    assert replay.call_count == 2


def test_native_code_compares_the_plan_with_the_tensors(replay: mock.Mock, module: ModuleType) -> None:
    """A description that Python changed, or one of another problem, launches nothing."""
    x = inputs(GATED_DELTA_RULE, Shape(B=2, T=15, H=1, HV=2, K=16, V=16))
    ingest(GATED_DELTA_RULE, x)
    (known,) = fast_replay._plans.values()
    given = (x["q"], x["k"], x["v"], x["g"], x["beta"], x["initial_state"])
    o, final = torch.empty_like(x["v"]), torch.zeros(2, 2, 16, 16)

    def launched(o: Any = o, final: Any = final) -> bool:
        return bool(module.try_fast_replay(known.plan.call, *given, o, final, 0, 0, 0, 0, 0, 0))

    assert launched() and final.any()
    final.zero_()
    for name in ("sequences", "T", "H", "HV", "K", "V"):
        problem = known.plan.call.problem
        setattr(problem, name, getattr(problem, name) + 1)
        assert not launched()
        setattr(problem, name, getattr(problem, name) - 1)
    for name, value in (("mode", 1), ("passes", 0), ("tol", 0.5)):
        before = getattr(known.plan.call, name)
        setattr(known.plan.call, name, value)
        assert not launched()
        setattr(known.plan.call, name, before)
    assert not launched(o=None) and not launched(o=o[:, :-1]) and not launched(final=final[:1]) and not final.any()
    assert launched()
