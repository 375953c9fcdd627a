"""All kernels under Triton's interpreter, on the CPU: a process of its own, because the switch is read on import.

TRITON_INTERPRET=1 python -m pytest tests/backends/triton_interpreted
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

if os.environ.get("TRITON_INTERPRET") != "1":
    raise pytest.UsageError("tests/backends/triton_interpreted: run with TRITON_INTERPRET=1, in a process of its own")
sys.path.insert(0, str(Path(__file__).resolve().parent))

import interpreter
import torch
import triton.language as tl
from triton.runtime.interpreter import InterpretedFunction

from sleepkern.rules import GATED_DELTA_RULE, GLA

if not isinstance(tl.sum, InterpretedFunction):
    raise pytest.UsageError("triton_interpreted: triton was imported before TRITON_INTERPRET was set to 1")
interpreter.install()
torch.set_num_threads(1)

THOROUGH = {
    "test_replay", "test_replay_in_bfloat16", "test_slices_of_one_projection_are_read_in_place", "test_steps_in_place",
    "test_two_runs_are_equal_bit_for_bit", "test_wide_heads",
}  # fmt: skip
"""Tests that `make test` runs for QUICK alone and `make test-hardening` for the other rules."""
QUICK = (GATED_DELTA_RULE, GLA)
"""One decay a head and one a channel, with and without the delta rule."""
USUAL = {
    "test_variants_of_every_rule": ("packed", "eight chunks-segments-gated"),
    "test_interpreted_kernels.py::test_shapes": ("-gated", "T=17", "packed", "T=65-gla", "grouped-gla"),
    "test_interpreted_kernels.py::test_variants": ("-gated", "-gla", "strong-kda", "correlated-kda", "infinity-kda"),
    "test_types": ("-gated", "-gla", "bfloat16-kda"),
    "test_wide_heads": ("K=96",),
    "test_wide_heads_in_bfloat16": ("K=96 V=40-gated",),
    "test_a_planted_fault_is_seen": ("states-of-packed", "state-does-not", "backward-does-not", "levels-of"),
    "test_interpreted_raw_gates.py::test_shapes": ("no tokens", "one token-g", "T=17-gated", "packed-kda"),
    "test_interpreted_raw_gates.py::test_options": ("bounded", "doubled"),
    "test_interpreted_raw_gates.py::test_bfloat16": ("24-", "70-gated"),
    "test_interpreted_raw_gates.py::test_steps_in_place": ("gated_delta_rule", "kda"),
    "test_variants_in_bfloat16": ("gated_delta_rule",),
    "test_states_along": ("T=40 n=16-gated", "packed n=48-kda", "packed n=48-gla", "no tokens-gated"),
    "test_states_along_in_bfloat16": ("48-gated",),
    "test_decode_states": ("bfloat16-gated", "bfloat16-kda", "bfloat16-gla", "float32-gated"),
    "test_packed_sequences_out_of_the_middle_of_a_projection": ("past",),
}  # fmt: skip
"""Tests of which `make test` runs the cases with these names and `make test-hardening` the others."""


SLOW = {"test_every_kernel_is_launched_once", "test_five_steps"}
"""Tests of many kernels at once, each of which has tests of its own; `make test-hardening` runs them."""


def pytest_collection_modifyitems(items: list[pytest.Function]) -> None:
    """Mark what takes long."""
    for item in items:
        if item.originalname in SLOW:
            item.add_marker("hardening")
        if item.originalname in THOROUGH and item.callspec.params["rule"] not in QUICK:
            item.add_marker("hardening")
        usual = next((cases for name, cases in USUAL.items() if f"{name}[" in item.nodeid), None)
        if usual is not None and not any(case in item.nodeid for case in usual):
            item.add_marker("hardening")
