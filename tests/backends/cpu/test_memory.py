"""Memory of a backward: what its thread holds, whatever the window; never one state a chunk or one activation a pass.

Peak resident set of a process of its own beyond what it held before and the gradients it returns. malloc's threshold
is fixed, so that every tensor's pages go back to the system when it does.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from sleepkern.rules import GATED_DELTA_RULE, KDA, Rule

MB = 1 << 20
RULES = pytest.mark.parametrize("rule", [GATED_DELTA_RULE, KDA], ids=lambda rule: rule.name)
MEASURE = """
import sys
import torch
import sleepkern
from sleepkern.rules import RULES
from sleepkern.testing import Shape, make_inputs

torch.set_num_threads(1)
rule, T, passes = RULES[sys.argv[1]], int(sys.argv[2]), int(sys.argv[3])

def resident(field):
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) * 1024 for line in status if line.startswith(field))

def measure(T):
    x = make_inputs(rule, Shape(T=T, H=1, HV=1, K=128, V=128))
    leaves = [t.requires_grad_() for t in x.values() if t is not None]
    r = sleepkern.sleep_ingest(**x, passes=passes, rule=rule, backend="cpu")
    weights = [torch.randn_like(t) for t in (r.output, r.final_state)]
    with open("/proc/self/clear_refs", "w") as peak:
        peak.write("5")  # the peak is now what is resident
    before = resident("VmRSS")
    torch.autograd.backward([r.output, r.final_state], weights)
    return resident("VmHWM") - before - sum(t.grad.nbytes for t in leaves)

measure(64)  # loads the libraries
print(measure(T))
"""

pytestmark = pytest.mark.alone


def extra(rule: Rule, T: int, passes: int) -> int:
    """Bytes a backward takes beyond inputs and gradients, at H = HV = 1, K = V = 128, float32, on one thread."""
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536"}
    command = [sys.executable, "-c", MEASURE, rule.name, str(T), str(passes)]
    done = subprocess.run(
        command,
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
        env=environment,
        cwd=Path(__file__).resolve().parents[3],
    )
    if "clear_refs" in done.stderr:
        pytest.skip("the system does not let a process reset its peak")
    assert done.returncode == 0, done.stderr
    return int(done.stdout)


@RULES
def test_a_long_backward_does_not_store_its_states(rule: Rule) -> None:
    """Measured: 6 MB for either rule. The states before all 1024 chunks would take 64 MB."""
    assert extra(rule, 32768, 1) < 40 * MB


@RULES
def test_a_backward_through_passes_does_not_store_their_activations(rule: Rule) -> None:
    """8 passes. Measured: 23 MB with head decay and 29 MB with channel decay, at 32 passes 24 and 30 MB.

    One pass's states before its chunks take 8 MB, and so do q, k, v and outputs: kept for every pass, 64 MB each.
    """
    assert extra(rule, 4096, 8) < 40 * MB
