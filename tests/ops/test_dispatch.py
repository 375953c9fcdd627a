"""Which backend a call takes: reasons are sentences, a choice by name or environment is honoured or refused."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from typing import Any

import pytest
import torch
from torch import Tensor
from typer.testing import CliRunner

import sleepkern
from sleepkern import backends, rules, settings
from sleepkern.backends import reference, triton
from sleepkern.backends.cpu import recurrence as cpu
from sleepkern.backends.triton.ptxas import assembler_fault
from sleepkern.cli import app
from sleepkern.nn import SleepLM, gated_rms_norm, short_convolution
from sleepkern.ops import fast_path
from sleepkern.problems.recurrence import Problem, RecurrenceResult, Tensors
from sleepkern.rules import Rule
from sleepkern.sleep import sleep_blocks
from sleepkern.sleep.blocks import why_not
from sleepkern.testing import Shape, call, make_inputs, relative_error
from sleepkern.testing.tolerances import SAME_SUMS


@pytest.mark.computed_by("cpu")
def test_native_code_comes_first(rule: Rule) -> None:
    x = make_inputs(rule, Shape(T=10))
    told = sleepkern.explain(rule, **x)
    assert told.chosen == "cpu" and list(told.reasons) == [b.NAME for b in backends.BACKENDS]
    assert "cpu" in str(told) and "chosen" in str(told) and "C++" in told.kernel


def test_every_refusal_is_a_sentence() -> None:
    wide = make_inputs(rules.GLA, Shape(T=4, K=300, V=8))
    told = sleepkern.explain(rules.GLA, **wide)
    assert told.chosen == "chunked" and told.reasons["cpu"] == "heads of at most 256, got K = 300, V = 8"
    double = make_inputs(rules.GLA, Shape(T=4), torch.float64)
    assert "no kernel for torch.float64" in str(sleepkern.explain(rules.GLA, **double))
    meta = {n: None if t is None else t.to("meta") for n, t in make_inputs(rules.GLA, Shape(T=4)).items()}
    assert "the tensors are on meta" in str(sleepkern.explain(rules.GLA, **meta))


def test_asked_for_by_name_or_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    x = make_inputs(rules.KDA, Shape(T=10, K=300, V=8))
    with pytest.raises(ValueError, match="backend: got 'cpu', which cannot do this call: heads of at most 256"):
        call(rules.KDA, x, backend="cpu")
    monkeypatch.setattr(settings, "BACKEND", "reference")
    assert sleepkern.explain(rules.KDA, **x).chosen == "reference"
    assert sleepkern.explain(rules.KDA, **x, backend="chunked").chosen == "chunked"


def test_explain_refuses_a_name_as_the_call_does(monkeypatch: pytest.MonkeyPatch) -> None:
    x = make_inputs(rules.KDA, Shape(T=10, K=300, V=8))
    for name, reason in (("typo", "expected one of cuda, cpu"), ("cpu", "which cannot do this call: heads of at most")):
        for source, named in (("backend", name), ("SLEEPKERN_BACKEND", None)):
            monkeypatch.setattr(settings, "BACKEND", None if named else name)
            message = f"^{source}: got '{name}'.*{reason}"
            with pytest.raises(ValueError, match=message) as by_call:
                call(rules.KDA, x, named)
            with pytest.raises(ValueError, match=message) as by_explain:
                sleepkern.explain(rules.KDA, **x, backend=named)
            assert str(by_call.value) == str(by_explain.value)


def test_a_setting_that_a_family_has_no_backend_for_leaves_it_to_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    h, blocks = torch.randn(1, 4, 16), SleepLM(64, width=16, heads=1).blocks()
    x, weight = torch.randn(1, 4, 16), torch.randn(16, 3)

    def others() -> None:
        short_convolution(x, weight)
        gated_rms_norm(x, x, weight[:, 0])
        sleep_blocks(h, blocks)

    ran: list[str] = []
    for module, name in (
        ("backends.cpu.mixer", "convolve"),
        ("backends.cpu.mixer", "gated_norm"),
        ("backends.cpu.blocks", "run"),
    ):
        found = import_module(f"sleepkern.{module}")

        def counted(true: Callable[..., Any], name: str, *arguments: Any) -> Any:
            ran.append(name)
            return true(*arguments)

        monkeypatch.setattr(found, name, partial(counted, getattr(found, name), name))
    with torch.no_grad():
        for setting in ("chunked", "reference", None, "cpu"):
            ran.clear()
            monkeypatch.setattr(settings, "BACKEND", setting)
            others()
            assert ran == ([] if setting in ("chunked", "reference") else ["convolve", "gated_norm", "run"])
        monkeypatch.setattr(settings, "BACKEND", "triton")  # not cuda and not cpu, the devices that there are
        assert why_not(h, blocks) == "SLEEPKERN_BACKEND requests another backend"


def test_a_setting_that_no_family_knows_is_refused_by_each(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(settings, "BACKEND", "typo")
    h, blocks = torch.randn(1, 4, 16), SleepLM(64, width=16, heads=1).blocks()
    for family in (
        lambda: short_convolution(h, torch.randn(16, 3)),
        lambda: gated_rms_norm(h, h, torch.randn(16)),
        lambda: sleep_blocks(h, blocks),
        lambda: call(rules.KDA, make_inputs(rules.KDA, Shape(T=3))),
    ):
        with pytest.raises(ValueError, match="^SLEEPKERN_BACKEND: got 'typo'; expected one of cuda, cpu, triton"):
            family()


def test_explain_says_what_a_setting_means_for_other_families(monkeypatch: pytest.MonkeyPatch) -> None:
    x = make_inputs(rules.KDA, Shape(T=3))
    assert "SLEEPKERN_BACKEND" not in str(sleepkern.explain(rules.KDA, **x))
    monkeypatch.setattr(settings, "BACKEND", "chunked")
    told = str(sleepkern.explain(rules.KDA, **x))
    assert "SLEEPKERN_BACKEND=chunked: sleep_blocks by modules" in told
    assert "SLEEPKERN_BACKEND=chunked: short_convolution, gated_rms_norm by torch" in told
    monkeypatch.setattr(settings, "BACKEND", "cpu")
    assert "sleep_blocks by cpu" in str(sleepkern.explain(rules.KDA, **x))


def test_commands_refuse_a_setting_that_nobody_knows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(settings, "BACKEND", "typo")
    done = CliRunner().invoke(app, ["explain"])
    assert done.exit_code == 2 and "SLEEPKERN_BACKEND: got 'typo'" in done.output
    monkeypatch.setattr(settings, "BACKEND", "chunked")
    done = CliRunner().invoke(app, ["explain", "--T", "9"])
    assert done.exit_code == 0 and "SLEEPKERN_BACKEND=chunked: sleep_blocks by modules" in done.output


@dataclass(frozen=True)
class WithTrait(Rule):
    """A rule with a trait that no backend was told of."""

    low_rank: bool = True


STRANGE = (WithTrait("kda", "channel", True), Rule("kda", "entry", True))  # type: ignore[arg-type]


@pytest.mark.parametrize("strange", STRANGE, ids=["trait", "gate"])
@pytest.mark.parametrize("backend", [None, *(b.NAME for b in backends.BACKENDS)])
def test_what_nobody_was_told_of_never_computes_as_another_rule(strange: Rule, backend: str | None) -> None:
    x = make_inputs(rules.KDA, Shape(T=3, K=8, V=8))
    del x["cu_seqlens"]
    for dtype in (torch.float32, torch.float64):
        x = {n: t.to(dtype) for n, t in x.items()}
        state = x.pop("initial_state").clone()
        for inplace in (False, True):
            with pytest.raises(ValueError, match="does not know the rule"):
                sleepkern.recurrent_step(**x, state=state, rule=strange, inplace=inplace, backend=backend)
        with pytest.raises(ValueError, match="does not know the rule"):
            sleepkern.sleep_ingest(**x, passes=2, initial_state=state, rule=strange, backend=backend)
        x["initial_state"] = state
    assert set(sleepkern.explain(strange, **x).reasons.values()) == {f"does not know the rule {strange}"}


def test_an_option_that_a_backend_was_not_told_of_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    x = make_inputs(rules.KDA, Shape(T=3, K=8, V=8))
    monkeypatch.setattr(reference, "OPTIONS", frozenset({"passes", "method"}))
    assert sleepkern.sleep_ingest(**x, passes=2, rule=rules.KDA, backend="reference").passes == 2
    with pytest.raises(ValueError, match="does not know the option tol = 0.1"):
        sleepkern.sleep_ingest(**x, passes=2, tol=0.1, rule=rules.KDA, backend="reference")


def test_rules_that_compute_the_same_are_the_same() -> None:
    x = make_inputs(rules.GATED_DELTA_RULE, Shape(T=3, K=8, V=8))
    mine = Rule("my own name", "head", True)
    expected = sleepkern.sleep_ingest(**x)
    assert torch.equal(sleepkern.sleep_ingest(**x, rule=mine).final_state, expected.final_state)
    x["v"].requires_grad_()
    sleepkern.sleep_ingest(**x, rule=mine).final_state.sum().backward()
    assert x["v"].grad is not None


def test_the_pair_of_switches_without_a_row_is_right_where_it_is_known() -> None:
    x = make_inputs(rules.DELTA_RULE, Shape(T=70, H=1, HV=2, K=8, V=6))
    linear = Rule("linear_attention", "none", False)
    k, v = x["k"].repeat_interleave(2, 2), x["v"] * x["beta"][..., None]
    state = x["initial_state"] + torch.einsum("bthk,bthv->bhkv", k, v)
    for backend in (None, "chunked", "reference"):
        made = sleepkern.sleep_ingest(**x, rule=linear, backend=backend)
        assert relative_error(made.final_state, state) < SAME_SUMS
    assert sleepkern.explain(linear, **x).chosen == "chunked"
    x["v"].requires_grad_()
    with pytest.raises(ValueError, match="^rule: got Rule.name='linear_attention'.* where a call is recorded"):
        sleepkern.sleep_ingest(**x, rule=linear)


class Counting:
    """A backend that does one rule by the reference and counts its calls."""

    NAME = "counting"
    SUPPORTS = frozenset({rules.KDA})
    OPTIONS: frozenset[str] = frozenset()

    def __init__(self) -> None:
        self.calls: list[str] = []

    def why_not(self, problem: Problem) -> str | None:
        return "one token only, if double" if problem.dtype == torch.float64 and problem.T > 1 else None

    def kernel(self, problem: Problem) -> str:
        return "counted"

    def method_of(self, problem: Problem) -> str:
        return "repeat"

    def forward(self, problem: Problem, x: Tensors) -> RecurrenceResult:
        self.calls.append("forward")
        return reference.forward(problem, x)

    def backward(
        self, problem: Problem, x: Tensors, do: Tensor | None, dstate: Tensor | None, dstates: Tensor | None = None
    ) -> list[Tensor | None]:
        self.calls.append("backward")
        return reference.backward(problem, x, do, dstate)

    def step(self, problem: Problem, x: Tensors) -> Tensor:
        self.calls.append("step")
        return reference.step(problem, x)


def test_a_backend_that_is_put_first_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    mine = Counting()
    x = make_inputs(rules.KDA, Shape(B=2, T=3, K=8, V=8))
    token = {n: t if t is None or n == "initial_state" else t[:, :1] for n, t in x.items()}
    gated = make_inputs(rules.GATED_DELTA_RULE, Shape(T=3))
    with monkeypatch.context() as patched:
        patched.setattr(backends, "BACKENDS", (mine, *backends.BACKENDS))
        told = sleepkern.explain(rules.KDA, **x)
        assert told.chosen == "counting" and told.kernel == "counted"
        o, _ = call(rules.KDA, x)  # a plain call
        assert mine.calls == ["forward"] and torch.equal(o, call(rules.KDA, x, "reference")[0])
        state = token.pop("initial_state").clone()
        del token["cu_seqlens"]
        sleepkern.recurrent_step(**token, state=state, rule=rules.KDA)
        assert mine.calls == ["forward", "step"]
        pool = torch.zeros(4, *state.shape[1:])
        sleepkern.recurrent_step(**token, state=pool, rule=rules.KDA, state_indices=torch.tensor([2, 0]))
        assert mine.calls == ["forward", "step", "step"] and bool((pool[[0, 2]] != 0).any())
        call(rules.KDA, {**x, "v": x["v"].clone().requires_grad_()})[0].sum().backward()
        assert mine.calls[3:] == ["forward", "backward"]
        call(rules.GATED_DELTA_RULE, gated)
        sleepkern.sleep_ingest(**x, passes=2, rule=rules.KDA)
        call(rules.KDA, x, "cpu")
        assert len(mine.calls) == 5  # another rule, an option it does not know, another backend asked for
        call(rules.KDA, x, "counting")
        assert len(mine.calls) == 6
    call(rules.KDA, x)
    assert len(mine.calls) == 6 and sleepkern.explain(rules.KDA, **x).chosen == "cpu"


def test_the_fast_path_heeds_the_order(monkeypatch: pytest.MonkeyPatch) -> None:
    x = make_inputs(rules.KDA, Shape(T=3))
    arguments = (rules.KDA, Tensors(x["q"], x["k"], x["v"], x["g"], x["beta"], None, None), None, False)
    for order, unnamed, named in (
        (backends.BACKENDS, True, True),
        ((cpu, reference), True, True),
        ((reference, cpu), False, True),
        ((reference,), False, False),
    ):
        monkeypatch.setattr(backends, "BACKENDS", order)
        assert [fast_path.forward(*arguments, name) is not None for name in (None, "cpu")] == [unnamed, named]


def test_wide_heads_fall_to_the_chunk_form() -> None:
    x = make_inputs(rules.KDA, Shape(T=10, K=300, V=8))
    assert torch.equal(call(rules.KDA, x)[0], call(rules.KDA, x, backend="chunked")[0])


def test_versions_of_triton_that_are_known_to_be_bad_are_named() -> None:
    for version, capability, bad in (
        ("3.3.1", (9, 0), False), ("3.4.0", (9, 0), True), ("3.6.0", (9, 0), True), ("3.6.0", (8, 0), False),
        ("3.6.0+git1", (9, 0), True), ("3.7.0", (9, 0), True), ("3.7.1", (9, 0), False), ("3.9.0", (10, 0), False),
    ):  # fmt: skip
        assert (triton.known_fault(version, capability) is not None) == bad, (version, capability)


def test_assemblers_that_are_known_to_be_bad_are_named() -> None:
    for version, capability, bad in (
        ("12.8", (9, 0), True), ("12.9", (9, 0), True), ("13.0", (9, 0), True), ("13.3", (9, 0), False),
        ("13.10", (9, 0), False), ("0", (9, 0), True), ("12.8", (8, 0), False), ("12.9", (10, 0), False),
    ):  # fmt: skip
        assert (assembler_fault(version, capability) is not None) == bad, (version, capability)
