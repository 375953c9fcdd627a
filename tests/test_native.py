"""The C++ kernels on every instruction set and thread count; and a broken kernel is found."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from native import build, run_with

from sleepkern.backends import cpu
from sleepkern.rules import Rule
from sleepkern.testing import AWKWARD_SHAPES, Shape, call, make_inputs, relative_error

_C = cpu._C
SHAPES = [Shape(T=300, H=2, HV=4, K=128, V=128), Shape(B=2, T=70, K=37, V=51), AWKWARD_SHAPES["packed"]]


@pytest.fixture
def restore_isa() -> Iterator[None]:
    before = _C.isa()
    yield
    _C.set_isa(before)


@pytest.mark.usefixtures("restore_isa")
def test_instruction_sets_and_threads_agree(rule: Rule) -> None:
    for shape in SHAPES:
        x = make_inputs(rule, shape, seed=1)
        results = []
        for isa in _C.isas():
            for threads in (1, 2):
                _C.set_isa(isa)
                torch.set_num_threads(threads)
                results.append(call(rule, x, "cpu"))
        for o, S in results[1:]:
            assert S is not None
            assert relative_error(o, results[0][0]) < 1e-6
            assert relative_error(S, results[0][1]) < 1e-6


@pytest.mark.usefixtures("restore_isa")
def test_two_threads_give_the_same_bits(rule: Rule) -> None:
    x = make_inputs(rule, Shape(B=2, T=100, H=2, HV=4), seed=2)
    one = call(rule, x, "cpu")
    torch.set_num_threads(2)
    two = call(rule, x, "cpu")
    assert all(torch.equal(a, b) for a, b in zip(one, two, strict=True))


@pytest.mark.usefixtures("restore_isa")
def test_setting_the_instruction_set() -> None:
    assert "baseline" in _C.isas()
    for isa in _C.isas():
        _C.set_isa(isa)
        assert _C.isa() == isa
    with pytest.raises(ValueError, match="isa: got 'avx9'; expected one this machine runs: .*baseline"):
        _C.set_isa("avx9")


def test_threads_are_torchs_own() -> None:
    assert _C.threads_source() == "torch"


AVX512_AGREES = """
from sleepkern.backends import cpu
from sleepkern.rules import RULES
from sleepkern.testing import AWKWARD_SHAPES, Shape, call, make_inputs, relative_error
assert cpu._C.isas()[0] == "avx512", cpu._C.isas()
shapes = {**AWKWARD_SHAPES, "wide": Shape(T=200, H=1, HV=2, K=128, V=128)}
for rule in RULES.values():
    for name, shape in shapes.items():
        x = make_inputs(rule, shape, seed=3, decay="mixed")
        for threads in (1, 2):
            torch.set_num_threads(threads)
            cpu._C.set_isa("avx512")
            o, S = call(rule, x, "cpu")
            cpu._C.set_isa("baseline")
            expected_o, expected_S = call(rule, x, "cpu")
            assert relative_error(o, expected_o) < 1e-6, (rule.name, name)
            assert relative_error(S, expected_S) < 1e-6, (rule.name, name)
print("agrees")
"""


def test_avx512_source_agrees(tmp_path: Path) -> None:
    """Natively where the machine has AVX-512, else the same source compiled for AVX2."""
    options = [] if "avx512" in _C.isas() else ["-DSLEEPKERN_EMULATE_AVX512=ON"]
    done = run_with(build(tmp_path, *options), AVX512_AGREES)
    assert done.stdout.strip() == "agrees", done.stderr


def test_verify_finds_a_broken_kernel(tmp_path: Path) -> None:
    """A state that is not decayed: the kernel runs, and `verify` ends red."""
    fault = ("cpu/ingest-inl.h", "    scale_rows(t, w.keep + d);\n", "")
    module = build(tmp_path, fault=fault)
    command = "sys.argv[1:] = ['verify', '--quick', '--backend', 'cpu']\nfrom sleepkern.cli import main\nmain()"
    done = run_with(module, command)
    assert done.returncode == 1, done.stdout + done.stderr
    assert "fail" in done.stdout.lower()
