"""The compiled module sleepkern._C, loaded once, and the numbers by which it knows types and gates."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

import torch

__all__ = ["GATE_CODES", "MISSING", "TYPE_CODES", "_C"]

if TYPE_CHECKING:
    import sleepkern._C as _C

    MISSING: str
else:
    try:
        _C = importlib.import_module("sleepkern._C")
    except ImportError as error:
        _C = None
        MISSING = f"the compiled module sleepkern._C is not there ({error})"
    else:
        MISSING = ""
"""The sentence why there is no _C; empty where there is one."""

_WITHOUT_MODULE = ({"float32": 0, "bfloat16": 1, "float16": 2}, {"none": 0, "head": 1, "channel": 2})
"""The codes of types and gates where there is no module, which alone decides them (csrc/common/types.h)."""
_types, GATE_CODES = _WITHOUT_MODULE if _C is None else (_C.type_codes, _C.gate_codes)
TYPE_CODES: dict[torch.dtype, int] = {getattr(torch, name): code for name, code in _types.items()}
