"""Gates that the C++ kernels make: every instruction set, thread counts, the fast path, and planted faults."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.build import Mutation, build_with_faults, run_with, shared
from helpers.errors import results
from helpers.raw_gates import raw_inputs
from torch import Tensor

import sleepkern
from sleepkern.backends.cpu import recurrence as cpu
from sleepkern.backends.native.module import _C
from sleepkern.ops import fast_path
from sleepkern.rules import KDA, Rule
from sleepkern.testing import TOLERANCE, Shape, call, relative_error, to_float64

SHAPES = [
    Shape(B=2, T=70, H=1, HV=2, K=37, V=19),
    Shape(T=65, H=1, HV=1, K=96, V=24),
    Shape(H=1, HV=2, K=24, V=16, lengths=(1, 64, 0, 17)),
    Shape(B=2, T=4, H=1, HV=2, K=21, V=9),
]
OPTIONS: dict[str, dict[str, Any]] = {
    "softplus": {},
    "bounded": {"lower_bound": -5.0, "allow_neg_eigval": True},
    "float16 gates": {"gate_dtype": torch.float16},
    "float64 gates": {"gate_dtype": torch.float64},
}


def above(x: dict[str, Any], shape: Shape) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(5)
    do = torch.randn(x["v"].shape, generator=generator).to(x["v"].dtype)
    return do, torch.randn(shape.sequences, shape.HV, shape.K, shape.V, generator=generator)


@pytest.fixture
def kernels(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The entry points of raw gates that were taken."""
    taken: list[str] = []
    for name in ("forward_of_raw", "backward_of_raw"):
        kernel = getattr(_C, name)

        def count(name: str = name, kernel: Any = kernel, **fields: Any) -> None:
            taken.append(name)
            kernel(**fields)

        monkeypatch.setattr(cpu._C, name, count)
    return taken


@pytest.mark.computed_by("cpu")
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_each_instruction_set(rule: Rule, shape: Shape, options: dict[str, Any], isa: str, kernels: list[str]) -> None:
    x = raw_inputs(rule, shape, seed=1, **options)
    do, dstate = above(x, shape)
    actual, expected = results(rule, x, "cpu", do, dstate), results(rule, to_float64(x), "reference", do, dstate)
    assert kernels == ["forward_of_raw", "backward_of_raw"]
    for name in expected:
        tolerance = max(TOLERANCE[torch.float32], TOLERANCE[actual[name].dtype])
        assert relative_error(actual[name], expected[name]) <= tolerance, (isa, name)


@pytest.mark.computed_by("cpu")
@pytest.mark.parametrize("shape", SHAPES[:3], ids=str)
def test_two_threads_give_the_same_bits(rule: Rule, shape: Shape) -> None:
    x = raw_inputs(rule, shape, seed=2)
    found = []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        found.append(results(rule, x, "cpu", *above(x, shape)))
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])


@pytest.mark.computed_by("cpu")
@pytest.mark.parametrize("T", [1, 9])
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_the_fast_path_gives_the_same_bits(
    rule: Rule, T: int, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    taken: list[bool] = []
    run = fast_path._run

    def record(*arguments: Any) -> bool:
        taken.append(run(*arguments))
        return taken[-1]

    monkeypatch.setattr(fast_path, "_run", record)
    x = raw_inputs(rule, Shape(B=2, T=T, H=2, HV=4, K=24, V=37), seed=3, **options)
    x |= {n: torch.nn.Parameter(x[n]) for n in ("A_log", "dt_bias") if n in x}
    plain = options.get("gate_dtype") != torch.float64
    with torch.no_grad():
        o, S = call(rule, x)
        assert taken == [True] if plain else True not in taken
        state = x["initial_state"].clone()
        arguments = {n: t for n, t in x.items() if n not in ("initial_state", "cu_seqlens")}
        step_o, _ = sleepkern.recurrent_step(**arguments, state=state, rule=rule)
        monkeypatch.setattr(fast_path, "_usable", False)
        expected_o, expected_S = call(rule, x)
    assert torch.equal(o, expected_o) and torch.equal(S, expected_S)
    assert torch.equal(step_o, expected_o) and torch.equal(state, expected_S)
    o, _ = call(rule, x)
    assert o.requires_grad == ("A_log" in x)


def test_a_state_that_is_a_parameter_too_is_refused() -> None:
    x = raw_inputs(KDA, Shape(T=1, H=1, HV=2, K=4, V=4), seed=4)
    arguments = {n: t for n, t in x.items() if n not in ("initial_state", "cu_seqlens")}
    arguments["dt_bias"] = x["initial_state"].flatten()[:8].view(2, 4)
    with pytest.raises(ValueError, match="state: got memory that dt_bias lies in as well"):
        sleepkern.recurrent_step(**arguments, state=x["initial_state"], rule=KDA)


MUTATIONS = (
    Mutation("raw-decay-without-rate", r" \* -\w+\.rate", " * -1.0f"),
    Mutation("raw-gate-gradient-as-it-is", r" \* slope\(.*\)", ""),
)
CODE = """
import sys
sys.path.insert(0, "tests")
from helpers.errors import results
from helpers.raw_gates import raw_inputs
from sleepkern.rules import GATED_DELTA_RULE as rule
from sleepkern.testing import Shape, relative_error, to_float64
shape = Shape(T=20, H=1, HV=1, K=16, V=16)
for bound in (None, -5.0):
    x = raw_inputs(rule, shape, seed=1, lower_bound=bound)
    do, dstate = torch.ones(1, 20, 1, 16), torch.zeros(1, 1, 16, 16)
    actual, expected = results(rule, x, "cpu", do, dstate), results(rule, to_float64(x), "reference", do, dstate)
    print("bound" if bound else "free", *(n for n in expected if not relative_error(actual[n], expected[n]) < 2e-5))
"""


@pytest.mark.hardening
@pytest.mark.mutation
def test_broken_gates_are_found(tmp_path: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    """A rate that is left out, seen without a bound alone; gradients of g and dt_bias that stay those of the gate."""
    done = run_with(build_with_faults(shared(tmp_path_factory), tmp_path, MUTATIONS), CODE)
    free, bound = (line.split()[1:] for line in done.stdout.splitlines())
    assert {"o", "g", "A_log", "dt_bias"} <= set(free) and bound == ["g", "dt_bias"], done.stdout + done.stderr
    sound = run_with(Path(str(_C.__file__)), CODE)
    assert sound.stdout.split() == ["free", "bound"] and sound.returncode == 0, sound.stdout + sound.stderr
