"""All kernels under Triton's interpreter, on the CPU: a process of its own, because the switch is read on import.

TRITON_INTERPRET=1 python -m pytest tests/triton_interpreted
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

if os.environ.get("TRITON_INTERPRET") != "1":
    raise pytest.UsageError("tests/triton_interpreted: run with TRITON_INTERPRET=1, in a process of its own")
sys.path.insert(0, str(Path(__file__).resolve().parent))

import interpreter
import torch
import triton.language as tl
from triton.runtime.interpreter import InterpretedFunction

if not isinstance(tl.sum, InterpretedFunction):
    raise pytest.UsageError("tests/triton_interpreted: triton was imported before TRITON_INTERPRET was set to 1")
interpreter.install()
torch.set_num_threads(1)
