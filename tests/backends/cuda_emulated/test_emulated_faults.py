"""A fault planted in a kernel turns tests red: wrong mathematics, a missing barrier or wait, and, under the sanitizers,
an access beyond an array that no result shows.

mutants.py lists the faults. Each needs a build of its own: `make test` takes a few of them, `make test-hardening` all.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
from building import CSRC, build, run_tests
from mutants import BLOCKS, MUTANTS, OVERRUNS, RECURRENCE, STATES, anchors, mutated

pytestmark = pytest.mark.mutation

QUICK = ("state-does-not-decay", "no-barrier-before-v-is-read", "no-barrier-before-the-mixer")
SANITIZED = (
    "pool or (test_chain and 100) or (test_step and 200 and float16) or (test_replay and random and (15 or packed))"
    " or (test_long_windows and backward)"
)


def _each(faults: Iterable[str]) -> list[Any]:
    return [pytest.param(name, marks=() if name in QUICK else pytest.mark.hardening) for name in faults]


def test_every_mutant_has_one_anchor_and_changes_what_is_below() -> None:
    found = anchors(CSRC)
    assert Counter(name for name, _ in found) == Counter(list(MUTANTS))
    for name, path in found:
        text = path.read_text()
        assert mutated(text, name, MUTANTS[name]) != text


@pytest.mark.parametrize("name", _each(RECURRENCE))
def test_a_planted_fault_is_seen(name: str, tmp_path: Path, sound: Path) -> None:
    done = run_tests(build(tmp_path, mutant=name, sound=sound), MUTANTS[name].tests)
    assert done.returncode == 1 or done.returncode < 0, done.stdout + done.stderr  # red, or ended by a signal


@pytest.mark.parametrize("name", _each(BLOCKS))
def test_a_fault_planted_in_blocks_is_seen(name: str, tmp_path: Path, sound: Path) -> None:
    module = build(tmp_path, mutant=name, sound=sound)
    done = run_tests(module, MUTANTS[name].tests, file="test_emulated_blocks.py")
    assert done.returncode == 1 or done.returncode < 0, done.stdout + done.stderr


@pytest.mark.parametrize("name", _each(STATES))
def test_a_fault_planted_in_decode_is_seen(name: str, tmp_path: Path, sound: Path) -> None:
    module = build(tmp_path, mutant=name, sound=sound)
    done = run_tests(module, MUTANTS[name].tests, file="test_emulated_states.py")
    assert done.returncode == 1 or done.returncode < 0, done.stdout + done.stderr


@pytest.fixture(scope="module")
def sanitized(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a build under AddressSanitizer and UndefinedBehaviourSanitizer."""
    folder = tmp_path_factory.mktemp("sanitized")
    build(folder, sanitize=True)
    return folder


@pytest.mark.hardening
def test_sanitizers_have_nothing_to_say(sanitized: Path) -> None:
    done = run_tests(sanitized / "cuda_on_cpu.so", SANITIZED, sanitize=True)
    assert done.returncode == 0, done.stdout + done.stderr
    done = run_tests(
        sanitized / "cuda_on_cpu.so", "test_equals and random", sanitize=True, file="test_emulated_blocks.py"
    )
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.hardening
@pytest.mark.parametrize("name", OVERRUNS)
def test_an_overrun_is_seen(name: str, tmp_path: Path, sanitized: Path) -> None:
    in_blocks = dict(anchors(CSRC))[name].parent.name == "blocks"
    module = build(tmp_path, sanitize=True, mutant=name, sound=sanitized)
    suite = f"test_emulated_{'blocks' if in_blocks else 'kernels'}.py"
    done = run_tests(module, MUTANTS[name].tests, sanitize=True, file=suite)
    assert done.returncode != 0 and "AddressSanitizer" in done.stderr, done.stdout + done.stderr
