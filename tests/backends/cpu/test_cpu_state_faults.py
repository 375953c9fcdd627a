"""Faults planted in what the C++ kernels do with states along the way and of bfloat16: each is found."""

from __future__ import annotations

from pathlib import Path

import pytest
from helpers.build import Mutation, build_with_faults, run_with, shared

from sleepkern.backends.native.module import _C

CODE = """
import sleepkern
from sleepkern.rules import GATED_DELTA_RULE as rule
from sleepkern.testing import Shape, call, make_inputs, relative_error, to_float64
x = make_inputs(rule, Shape(T=90, H=1, HV=1, K=16, V=16), seed=5)
found = {}
for backend, given in (("cpu", x), ("reference", to_float64(x))):
    leaves = {n: t.detach().clone().requires_grad_() for n, t in given.items() if t is not None}
    o, S, states = call(rule, leaves, backend, state_every=32)
    weights = torch.randn(states.shape, generator=torch.Generator().manual_seed(1)).to(states)
    (states * weights).sum().backward()
    found[backend] = {"states": states.detach(), **{"d" + n: t.grad for n, t in leaves.items() if n != "q"}}
wrong = [n for n, t in found["reference"].items() if not relative_error(found["cpu"][n], t) < 2e-5]
token, start = {n: x[n][:, :1] for n in ("q", "k", "v", "g", "beta")}, x["initial_state"].bfloat16()
narrow, wide = (
    sleepkern.recurrent_step(**token, state=start.clone().to(dtype), rule=rule, backend="cpu")[1]
    for dtype in (torch.bfloat16, torch.float32)
)
print(*wrong, *["rounded"] * (not torch.equal(narrow, wide.bfloat16())))
"""
GRADIENTS = {"dk", "dv", "dg", "dbeta", "dinitial_state"}
FAULTS = {
    "the wrong state": (Mutation("state-of-the-chunk-before", r" / (\w+);$", r" / (2 * \1);"), {"states", *GRADIENTS}),
    "a gradient dropped": (Mutation("kept-gradient-dropped"), GRADIENTS),
    "a gradient at the wrong cut": (Mutation("kept-gradient-at-the-cut-before", r" \+ \w+\.\w+"), GRADIENTS),
    "truncated": (Mutation("bfloat16-truncated", r" \+ 0x7fff.*\)\) >>", ") >>"), {"rounded"}),
}


@pytest.mark.hardening
@pytest.mark.mutation
@pytest.mark.parametrize("fault", FAULTS.values(), ids=FAULTS)
def test_a_broken_kernel_is_found(
    fault: tuple[Mutation, set[str]], tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    mutation, expected = fault
    done = run_with(build_with_faults(shared(tmp_path_factory), tmp_path, (mutation,)), CODE)
    assert set(done.stdout.split()) == expected, done.stdout + done.stderr


@pytest.mark.hardening
@pytest.mark.mutation
def test_sound_kernels_pass() -> None:
    """What finds the faults finds none in the installed module."""
    sound = run_with(Path(str(_C.__file__)), CODE)
    assert sound.returncode == 0 and not sound.stdout.split(), sound.stdout + sound.stderr
