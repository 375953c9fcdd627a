"""When a call of a model is left to the function that was there before."""

from __future__ import annotations

import logging

import torch
from torch import Tensor
from torch.autograd import forward_ad

from sleepkern.backends import triton

logger = logging.getLogger(__name__)


def left_to_original(reason: str | None) -> bool:
    """Whether there is a reason, of the call's own or forward mode; it goes to the debug log."""
    reason = reason or _why_not_now()
    if reason is not None and not torch.compiler.is_compiling():
        logger.debug("left to the original function: %s", reason)
    return reason is not None


def why_not_here(x: Tensor) -> str | None:
    """None, or the sentence why no call with this tensor is ours."""
    if torch.compiler.is_exporting():
        return "an exported program keeps to torch's own operators"
    if (reason := _why_not_now()) is not None:
        return reason
    if not _has_kernel(x.device.type):
        return f"no kernel for the device {x.device}"
    return None


def _why_not_now() -> str | None:
    """None, or the sentence why no call at all is ours: whatever has a tangent of forward mode, we would refuse it."""
    if forward_ad._current_level >= 0 and torch._C._is_fwd_grad_enabled():
        return "forward mode, whose derivatives torch's own operators have"
    return None


def _has_kernel(device: str) -> bool:
    """Whether there are kernels for a type of device; the portable backends would slow a GPU model."""
    return device == "cpu" or triton.why_not_on(device) is None
