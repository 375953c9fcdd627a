"""The native module under AddressSanitizer and UndefinedBehaviorSanitizer: a slice of the random calls.

All of them, on every instruction set: `python -m tests.hardening.fuzz_calls --calls 20000 --sanitize`.
"""

from __future__ import annotations

from pathlib import Path

import pytest
from helpers.build import build, run_with, sanitized

from tests.hardening import fuzz_calls

CALLS = "from tests.hardening import fuzz_calls\nassert fuzz_calls.run(150, 5_000_000) == 0"
BEYOND = """
import torch
short, room = torch.zeros(4), torch.zeros(64)
view = (room.data_ptr(), 8, 0)
_C.forward(gate=1, delta=True, normalize=False, scale=1.0, sequences=1, T=2, H=1, HV=1, K=8, V=8, offsets=0, q=view,
           k=view, v=(short.data_ptr(), 8, 0), g=view, beta=view, state=0, o=room.data_ptr(),
           final_state=room.data_ptr())
"""


@pytest.mark.hardening
def test_random_calls_under_sanitizers(tmp_path: Path) -> None:
    """The baseline kernels, which all instruction sets share but for a few intrinsics."""
    module = build(tmp_path, "-DSLEEPKERN_SANITIZE=ON", "-DSLEEPKERN_BASELINE_ONLY=ON")
    assert b"__ubsan_handle_type_mismatch" in module.read_bytes()
    done = run_with(module, CALLS, sanitized())
    assert done.returncode == 0, done.stdout + done.stderr[-4000:]
    seen = run_with(module, BEYOND, sanitized())  # a value that ends before its row does
    assert seen.returncode != 0 and "heap-buffer-overflow" in seen.stderr, seen.stderr[-4000:]


def test_random_calls() -> None:
    """Without sanitizers, on the best instruction set: a crash ends the process of the tests."""
    assert fuzz_calls.run(300, 7_000_000) == 0
