"""Which backend a call takes: reasons are sentences, a choice by name or environment is honoured or refused."""

from __future__ import annotations

import pytest
import torch

import sleepkern
from sleepkern import rules, settings
from sleepkern.backends import BACKENDS, triton
from sleepkern.backends.triton.assembler import assembler_fault
from sleepkern.rules import Rule
from sleepkern.testing import Shape, call, make_inputs


def test_native_code_comes_first(rule: Rule) -> None:
    x = make_inputs(rule, Shape(T=10))
    told = sleepkern.explain(rule, **x)
    assert told.chosen == "cpu" and list(told.reasons) == [b.NAME for b in BACKENDS]
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
    monkeypatch.setattr(settings, "BACKEND", "cpu")
    assert sleepkern.explain(rules.KDA, **x).chosen is None
    with pytest.raises(ValueError, match="heads of at most 256"):
        call(rules.KDA, x)


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
