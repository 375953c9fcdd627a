"""What a held call launches: the kernels that Triton would choose, with the arguments that they are to have."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
import weakref
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from launch_cases import Case, Roles, cases, given_to_triton
from stub_driver import STREAM, DriverLaunch, Stub
from torch import Tensor
from triton import knobs

from sleepkern.backends.triton import held_launches
from sleepkern.backends.triton.plan_table import TABLE
from sleepkern.rules import GATED_DELTA_RULE

CASES = cases()
NAMES = list(CASES)
EXPECTED = {
    "forward": 2, "forward and gradients": 6, "one chunk and gradients": 2, "decode": 1, "replay": 2,
    "replay of simple GLA": 1,
}  # fmt: skip
"""Launches of a call, by the first words of its name."""


@pytest.fixture(scope="module")
def interpreted() -> dict[str, list[list[Any]]]:
    """What the interpreter's run gives each kernel."""
    script = Path(__file__).parent / "launch_cases.py"
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    done = subprocess.run([sys.executable, str(script)], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found: dict[str, list[list[Any]]] = json.loads(done.stdout)
    return found


def launched(stub: Stub, case: Case) -> tuple[list[DriverLaunch], list[list[Any]], dict[str, Tensor | None]]:
    """The launches of one call as the driver sees them, and their parameters as tokens."""
    stub.reset(keep_launches=True)
    with allocations():  # which live until here, so that no two have one address
        results = case.call()
    launches = stub.launches()
    roles = Roles(case.inputs(), results)
    values = [[int.from_bytes(p, "little", signed=len(p) == 4) for p in one.parameters] for one in launches]
    names = [
        [roles.name(v) if len(p) == 8 and v else v for p, v in zip(one.parameters, each, strict=True)]
        for one, each in zip(launches, values, strict=True)
    ]
    return launches, names, results


@contextmanager
def allocations() -> Iterator[list[Tensor]]:
    """The tensors that torch.empty and torch.empty_like make."""
    made: list[Tensor] = []

    def kept(make: Any) -> Any:
        def kept_one(*arguments: Any, **options: Any) -> Tensor:
            made.append(make(*arguments, **options))
            return made[-1]

        return kept_one

    with mock.patch.multiple(torch, empty=kept(torch.empty), empty_like=kept(torch.empty_like)):
        yield made


@contextmanager
def by_triton_alone() -> Iterator[None]:
    """Nothing is held: every launch goes through Triton."""
    with mock.patch.object(held_launches, "_as_compiled", return_value=False):
        yield


@pytest.mark.parametrize("name", NAMES)
def test_a_held_call_launches_what_triton_would(stub: Stub, name: str) -> None:
    case = CASES[name]
    case.call()
    held, held_values, _ = launched(stub, case)
    assert "cuPointerGetAttribute" not in stub.counts()  # launches of Triton make this call for each tensor
    with by_triton_alone():
        plain, plain_values, _ = launched(stub, case)
    assert "cuPointerGetAttribute" in stub.counts()
    assert held_values == plain_values
    for a, b in zip(held, plain, strict=True):
        assert (a.kernel, a.grid, a.block, a.shared, a.stream) == (b.kernel, b.grid, b.block, b.shared, STREAM)
        assert a.function == b.function


@pytest.mark.parametrize("name", NAMES)
def test_kernels_get_what_the_interpreter_runs_with(
    stub: Stub, interpreted: dict[str, list[list[Any]]], name: str
) -> None:
    case = CASES[name]
    assert given_to_triton(case) == interpreted[name]
    launches, values, _ = launched(stub, case)
    for one, got, (kernel, grid, _, passed) in zip(launches, values, interpreted[name], strict=True):
        assert (one.kernel, list(one.grid[: len(grid)])) == (kernel, grid)
        left = _without(got, passed)
        assert set(left) <= {0}  # scratch that Triton itself would like, of which there is none


def _without(got: list[Any], passed: list[Any]) -> list[Any]:
    """What the driver got after all that was passed; an integer of 1 may be compiled into the kernel."""
    left = list(got)
    for one in passed:
        if one != 1 or left[0] == 1:
            assert left.pop(0) == one
    return left


@pytest.mark.parametrize("name", NAMES)
def test_a_held_call_does_nothing_else(stub: Stub, name: str) -> None:
    """The counts of a call in the steady state: launches, driver calls, synchronisations, allocations, operators."""
    case = CASES[name]
    case.call()
    stub.reset()
    with allocations() as made:
        results = case.call()
    launches = EXPECTED.get(name, EXPECTED[name.split(",")[0].split(" of ")[0]])
    # Triton looks at the context at each launch. Nothing else is asked of the driver, and nothing waits.
    assert stub.counts() == {"cuLaunchKernelEx": launches, "cuCtxGetCurrent": launches}
    assert not stub.torch
    scratch = 0 if case.kind.startswith("decode") else {"gradients": 2}.get(case.kind, 1)
    unnamed = 1 if case.kind == "gradients" else 0  # the gradient of a state that nobody gave
    if case.kind == "replay":
        results = {"final": results["final"], "o": results["o"]}
    assert len(made) == len([t for t in results.values() if t is not None]) + scratch + unnamed


def test_launches_of_one_problem_share_no_scratch_with_results(stub: Stub) -> None:
    case = CASES["forward and gradients"]
    case.call()
    with allocations() as made:
        results = case.call()
    kept = {t.data_ptr() for t in results.values() if t is not None}
    assert len(kept) == len(results)
    assert len({t.data_ptr() for t in made}) == len(made)


def test_an_address_that_is_not_a_multiple_of_16_takes_another_kernel(stub: Stub) -> None:
    """The same sizes, strides and types: a held kernel that loads 16 bytes at a time would read beside k."""
    straight, shifted = CASES["forward"], CASES["forward, k shifted"]
    functions = []
    for case in (straight, shifted, straight, shifted):
        launches, _, _ = launched(stub, case)
        functions.append([one.function for one in launches])
    assert functions[0] == functions[2] and functions[1] == functions[3]
    assert functions[0][0] != functions[1][0]


@pytest.mark.parametrize("name", ["forward", "forward and gradients"])
def test_calls_with_and_without_states_do_not_mix(stub: Stub, name: str) -> None:
    """The same tensors: a call with states along its sequences holds kernels of its own, which store or read them."""
    plain, along = CASES[name], CASES[f"{name}, with states"]
    functions: list[list[tuple[str, int]]] = []
    for case in (plain, along, plain, along):
        launches, values, _ = launched(stub, case)
        functions.append([(one.kernel, one.function) for one in launches])
        assert any("states" in passed for passed in values) == (case is along)
        assert any("dstates" in passed for passed in values) == (case is along and name != "forward")
    assert functions[0] == functions[2] and functions[1] == functions[3]
    differ = {a[0] for a, b in zip(functions[0], functions[1], strict=True) if a != b}
    assert differ == {"state_pass_kernel"} | ({"state_pass_backward_kernel"} if name != "forward" else set())


def test_lengths_share_kernels(stub: Stub) -> None:
    """A length is no constant of a kernel; another one is recorded anew and compiles nothing.

    Triton compiles for multiples of 16, also in a group of arguments that is not to be specialised (`sizes`).
    """
    one, _, _ = launched(stub, CASES["forward"])
    other, _, _ = launched(stub, CASES["forward, other length"])
    assert [a.function for a in one] == [b.function for b in other]
    assert one[0].grid != other[0].grid


@pytest.mark.parametrize("role", ["q", "k"])
def test_one_tensor_in_two_roles_is_not_remembered(stub: Stub, role: str) -> None:
    """A call whose q is its k leaves a record that calls of other tensors repeat with their own addresses."""
    case = Case(GATED_DELTA_RULE, "forward", T=75)
    separate = dict(case.x)
    case.x = {**separate, "q": separate[role], "k": separate[role]}
    case.call()
    case.x = separate
    _, values, _ = launched(stub, case)
    assert values[0][:2] == ["q", "k"]


def test_hooks_of_launches_are_called(stub: Stub) -> None:
    case, seen = CASES["decode"], []
    case.call()
    kept = knobs.runtime.launch_enter_hook
    try:
        knobs.runtime.launch_enter_hook = lambda metadata: seen.append(metadata.get()["name"])
        case.call()
    finally:
        knobs.runtime.launch_enter_hook = kept
    assert seen == ["decode_kernel"]


def test_debugging_is_left_to_triton(stub: Stub) -> None:
    """Triton compiles other kernels then, which must not be held."""
    case = CASES["decode"]
    case.call()
    with mock.patch.object(knobs.runtime, "debug", True):
        _, _, _ = launched(stub, case)
        assert "cuPointerGetAttribute" in stub.counts()
    launched(stub, case)
    assert "cuPointerGetAttribute" not in stub.counts()


def test_another_plan_is_recorded_anew(stub: Stub) -> None:
    case = CASES["decode"]
    launched(stub, case)
    key = next(iter(TABLE))
    TABLE[key] = TABLE[key]
    launched(stub, case)
    assert "cuPointerGetAttribute" in stub.counts()
    launched(stub, case)
    assert "cuPointerGetAttribute" not in stub.counts()


def test_threads_repeat_one_record(stub: Stub) -> None:
    case = CASES["decode"]
    case.call()
    stub.reset()
    with ThreadPoolExecutor(4) as pool:
        for done in [pool.submit(case.call) for _ in range(40)]:
            done.result()
    assert stub.counts() == {"cuLaunchKernelEx": 40, "cuCtxGetCurrent": 40, **_contexts(stub)}


def test_a_record_holds_no_tensor(stub: Stub) -> None:
    case = Case(GATED_DELTA_RULE, "forward", T=76)
    with allocations() as made:
        case.call()
        alive = [weakref.ref(t) for t in made]
        made.clear()
    assert not [t for t in alive if t() is not None]


def test_held_calls_take_less_time_of_the_host(stub: Stub) -> None:
    """Generous, for a busy machine: the times of a thread, in turns with those of Triton's own launches."""
    print()
    for name in ("forward", "forward and gradients", "decode", "replay"):
        case, ratios = CASES[name], []
        for _ in range(7):
            held = _seconds(case)
            with by_triton_alone():
                ratios.append((_seconds(case) / held, held))
        ratio, held = max(ratios)
        print(f"{name:<24} {1e6 * held:7.1f} us, {ratio:.2f} times as fast as launches by Triton")
        assert ratio > 1.3


def _seconds(case: Case, calls: int = 20) -> float:
    """The shortest time of a call in this thread, of a few rounds."""
    times = []
    for _ in range(5):
        begin = time.thread_time()
        for _ in range(calls):
            case.call()
        times.append((time.thread_time() - begin) / calls)
    return min(times)


def _contexts(stub: Stub) -> dict[str, int]:
    """The calls by which a thread takes the context, once each."""
    names = ("cuCtxSetCurrent", "cuDeviceGet", "cuDevicePrimaryCtxRetain")
    return {name: n for name, n in stub.counts().items() if name in names}
