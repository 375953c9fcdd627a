"""Offsets of packed sequences that another thread changes while a kernel runs: a process that survives."""

from __future__ import annotations

import subprocess
import sys

CALLS = """
import threading
import time
import torch
import sleepkern
from sleepkern.nn import short_convolution
from sleepkern.rules import GATED_DELTA_RULE
from sleepkern.testing import Shape, make_inputs

torch.set_num_threads(1)
offsets, done = torch.tensor([0, 1000, 2000, 4000]), threading.Event()

def change():
    while not done.is_set():
        offsets[1] = 10**9
        offsets[1] = 1000

x = make_inputs(GATED_DELTA_RULE, Shape(T=4000, H=2, HV=2, K=8, V=8))
x |= {"initial_state": None, "cu_seqlens": offsets, "backend": "cpu"}
channels, weight = torch.randn(1, 4000, 32), torch.randn(32, 4)
thread, end = threading.Thread(target=change), time.monotonic() + 2
thread.start()
while time.monotonic() < end:
    for call in (
        lambda: sleepkern.gated_delta_rule(**x),
        lambda: sleepkern.gated_delta_rule(**x, state_every=16),
        lambda: short_convolution(channels, weight, cu_seqlens=offsets, backend="cpu"),
    ):
        try:
            call()
        except ValueError:
            pass
done.set()
thread.join()
"""


def test_offsets_that_change_under_a_call() -> None:
    done = subprocess.run([sys.executable, "-c", CALLS], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
