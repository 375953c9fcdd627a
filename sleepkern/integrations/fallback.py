"""When a call of a model goes to the original function."""

from __future__ import annotations

import logging

import torch
from torch import Tensor

from sleepkern.backends import triton
from sleepkern.eager import tangents_matter

logger: logging.Logger = logging.getLogger(__name__)


def use_original(reason: str | None) -> bool:
    """Tells whether a call goes to the original: for this reason or forward mode. The debug log gets the reason."""
    reason = reason or _forward_mode_reason()
    if reason is not None and not torch.compiler.is_compiling():
        logger.debug("the original function is used: %s", reason)
    return reason is not None


def unsupported_reason(x: Tensor) -> str | None:
    """None, or a sentence why sleepkern computes no call with this tensor."""
    if torch.compiler.is_exporting():
        return "an exported program keeps to torch's own operators"
    if (reason := _forward_mode_reason()) is not None:
        return reason
    if not _has_kernel(x.device.type):
        return f"no kernel for the device {x.device}"
    return None


def _forward_mode_reason() -> str | None:
    """None, or a sentence why sleepkern computes no call at all: it refuses tensors with tangents of forward mode."""
    if tangents_matter():
        return "forward mode, whose derivatives torch's own operators have"
    return None


def _has_kernel(device: str) -> bool:
    """Tells whether sleepkern has kernels for a type of device; the portable backends would slow a GPU model down."""
    return device == "cpu" or triton.why_not_on(device) is None
