"""A fault planted in a kernel turns tests red: wrong mathematics, a missing barrier or wait, and, under the sanitizers,

an access beyond an array that no result would show.

Each needs a build of its own: `make test` takes a few of them, `make test-hardening` all.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from building import build, run_tests

FAULTS: dict[str, tuple[str, str, str, str]] = {
    "state does not decay": (
        "recurrence/state_pass.cuh", "S[n][i] *= decay(column_of(n, i));", "S[n][i] *= 1.0f;", "test_replay and 15",
    ),
    "rank erases as if no pass had gone": (
        "recurrence/single_chunk.cuh", "gamma * Y[n][i] + power * erased[n][i]", "gamma * Y[n][i] + erased[n][i]",
        "test_methods and rank",
    ),
    "no barrier before the scores are inverted": (
        "recurrence/chunk_factors.cuh", "  block_barrier();\n  invert<MODE", "  invert<MODE", "test_replay and 15",
    ),
    "no barrier before v is read": (
        "recurrence/single_chunk.cuh",
        "    block_barrier();\n    const int group", "    const int group", "test_replay and 15",
    ),
    "no barrier before a place is loaded again": (
        "recurrence/multi_chunk.cuh", "    block_barrier();  // all have read the place\n", "", "test_long_windows",
    ),
    "no wait for a copy": (
        "recurrence/multi_chunk.cuh", "if (seen < asked) copy_wait(", "if (false) copy_wait(", "test_replay and 65",
    ),
    "wait for the wrong phase": ("recurrence/multi_chunk.cuh", "seen / c.slots & 1", "0", "test_long_windows"),
    "queries are loaded while others read them": (
        "recurrence/multi_chunk.cuh",
        "    block_barrier();  // all have read the chunk before\n", "", "test_replay and 65",
    ),
    "lam does not go back through A": ("recurrence/transition_powers.cuh", "c.K, true);", "c.K, false);", "test_chain"),
    "no barrier before lam is read": (
        "recurrence/transition_powers.cuh",
        "      block_barrier();\n      if (16 * warp < KP) {", "      if (16 * warp < KP) {", "test_chain",
    ),
    "padded rows of a pool are written": ("recurrence/decode.cuh", "if (place < 0) return;", "", "pool"),
    "residuals are wanted where tol is above 0": (
        "recurrence/params.h", "return residual != nullptr;", "return tol > 0.0f;", "test_a_tol_below",
    ),
    "a key's decay from the row after": (
        "recurrence/chunk_factors_channel.cuh", "decayed(w.G[i * KP + d0 + d])", "decayed(w.G[(i | 1) * KP + d0 + d])",
        "test_replay and 63 and kda",
    ),
}  # fmt: skip
BLOCK_FAULTS: dict[str, tuple[str, str, str, str]] = {
    "no cluster's barrier before parts are added": (
        "blocks/kernel.cuh", "    cluster_wait();\n    if (n < 0) return;", "    if (n < 0) return;",
        "test_equals and (two or four)",
    ),
    "parts of two exchanges in one place": (
        "blocks/kernel.cuh",
        "return m.received((exchanges - 1 - n) & 1);", "return m.received(false && n < exchanges);",
        "test_equals and pieces",
    ),
    "no barrier before h of all is read": (
        "blocks/kernel.cuh",
        "  SLEEPKERN_DEVICE void meet(float eps) const {\n    cluster_arrive();\n    cluster_wait();",
        "  SLEEPKERN_DEVICE void meet(float eps) const {", "test_equals and (two or four)",
    ),
    "no wait for weights": (
        "blocks/weight_stream.cuh", "    copy_wait(arrivals + slot, parity);\n", "", "test_equals and one",
    ),
    "weights asked for where others are still to be read": (
        "blocks/weight_stream.cuh", "    ask(slot);\n    if (++slot",
        "    ask(slot + 1 < c.ring ? slot + 1 : 0);\n    if (++slot", "test_equals and one",
    ),
    "no barrier before a block of 16 tokens is inverted": (
        "blocks/recurrence.cuh", "  warp_barrier();\n  invert_unit(unit, M);", "  invert_unit(unit, M);",
        "test_equals and four",
    ),
    "what is written is not decayed": (
        "blocks/recurrence.cuh", "D[n][i] *= scale[n][i & 1].w;", "", "test_equals and four and random",
    ),
    "no barrier before the mixer": (
        "blocks/kernel.cuh",
        "        block_barrier();\n        l.recurrent ?", "        l.recurrent ?", "test_equals and two",
    ),
    "rows beyond a window are its neighbour's": (
        "blocks/operands.cuh", "last((window + 1) * c.padded() / 8 - 1)", "last(2 * c.tiles - 1 + 0 * window)",
        "keep_to_themselves",
    ),
    "a pad row reads beyond its window": (
        "blocks/attention.cuh", "return keys < block || j <= i;", "return true;", "test_equals and odd",
    ),
}  # fmt: skip
OVERRUNS: dict[str, tuple[str, str, str, str]] = {
    "reads a row beyond the state": (
        "recurrence/decode.cuh",
        "first + r < K ? valid : 0, aligned)", "first + r <= K ? valid : 0, aligned)", "test_step and 200",
    ),
    "a tile one number too small": (
        "recurrence/transition_powers.cuh", "auto* R = arena.take<Number<FULL>>(KP * COLUMNS);",
        "auto* R = arena.take<Number<FULL>>(KP * COLUMNS - 1);", "test_chain and 128",
    ),
    "weights foreseen beyond the last ones": (
        "blocks/weight_stream.cuh", "(stages < most ? stages : most)", "stages", "test_equals and random",
    ),
}  # fmt: skip
QUICK = ("state does not decay", "no barrier before v is read", "no barrier before the mixer")
SANITIZED = (
    "pool or (test_chain and 100) or (test_step and 200 and float16) or (test_replay and random and (15 or packed))"
    " or (test_long_windows and backward)"
)


def _each(faults: dict[str, tuple[str, str, str, str]]) -> list[Any]:
    return [pytest.param(name, marks=() if name in QUICK else pytest.mark.hardening) for name in faults]


@pytest.mark.parametrize("name", _each(FAULTS))
def test_a_planted_fault_is_seen(name: str, tmp_path: Path, sound: Path) -> None:
    file, good, bad, chosen = FAULTS[name]
    done = run_tests(build(tmp_path, fault=(f"cuda/{file}", good, bad), sound=sound), chosen)
    assert done.returncode == 1 or done.returncode < 0, done.stdout + done.stderr  # red, or ended by a signal


@pytest.mark.parametrize("name", _each(BLOCK_FAULTS))
def test_a_fault_planted_in_blocks_is_seen(name: str, tmp_path: Path, sound: Path) -> None:
    file, good, bad, chosen = BLOCK_FAULTS[name]
    module = build(tmp_path, fault=(f"cuda/{file}", good, bad), sound=sound)
    done = run_tests(module, chosen, file="test_emulated_blocks.py")
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
    file, good, bad, chosen = OVERRUNS[name]
    suite = f"test_emulated_{'blocks' if 'blocks' in file else 'kernels'}.py"
    module = build(tmp_path, sanitize=True, fault=(f"cuda/{file}", good, bad), sound=sanitized)
    done = run_tests(module, chosen, sanitize=True, file=suite)
    assert done.returncode != 0 and "AddressSanitizer" in done.stderr, done.stdout + done.stderr
