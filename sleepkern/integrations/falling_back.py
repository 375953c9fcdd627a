"""When a call of a model is left to the function that was there before."""

from __future__ import annotations

import logging

import torch
from torch import Tensor

from sleepkern.backends import triton

logger = logging.getLogger(__name__)


def left_to_original(reason: str | None) -> bool:
    """Whether there is a reason; it goes to the debug log."""
    if reason is not None and not torch.compiler.is_compiling():
        logger.debug("left to the original function: %s", reason)
    return reason is not None


def why_not_here(x: Tensor) -> str | None:
    """None, or the sentence why no call with this tensor is ours."""
    if torch.compiler.is_exporting():
        return "an exported program keeps to torch's own operators"
    if not _has_kernel(x.device.type):
        return f"no kernel for the device {x.device}"
    return None


def _has_kernel(device: str) -> bool:
    """Whether there are kernels for a type of device; the portable backends would slow a GPU model."""
    return device == "cpu" or triton.why_not_on(device) is None
