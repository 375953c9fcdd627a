"""The compiled module sleepkern._C, loaded once, and the numbers by which it knows types and gates."""

from __future__ import annotations

import importlib

import torch

try:
    _C = importlib.import_module("sleepkern._C")
    MISSING = ""
except ImportError as error:
    _C = None  # type: ignore[assignment]
    MISSING = f"the compiled module sleepkern._C is not there ({error})"
"""The sentence why there is no _C; empty where there is one."""

TYPE_CODES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
GATE_CODES = {"none": 0, "head": 1, "channel": 2}
