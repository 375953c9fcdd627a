"""The GPU that plans are made for, and why nothing can run on a device."""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import torch

from ..native.module import _C


class Device(NamedTuple):
    """The properties of a GPU that plans depend on; shared_memory is the bytes that a CTA may have."""

    capability: tuple[int, int]
    shared_memory: int
    multiprocessors: int


def why_not_on(device: str) -> str | None:
    """None, or the sentence why nothing can run on a type of device."""
    if _C is None or not _C.has_cuda:
        return "sleepkern._C was built without CUDA"
    if device != "cuda":
        return f"runs on a GPU, the tensors are on {device}"
    if current_device().capability < (8, 0):
        return f"needs compute capability 8.0, got {'.'.join(map(str, current_device().capability))}"
    return None


why_not_on._dynamo_marked_constant = True  # type: ignore[attr-defined]  # see backends/triton/__init__.py


def current_device() -> Device:
    """The current GPU; an H100 where the machine has none, which `explain` allows."""
    return _device(torch.cuda.current_device()) if _has_gpu() else Device((9, 0), 232448, 132)


current_device._dynamo_marked_constant = True  # type: ignore[attr-defined]


@lru_cache(maxsize=1)
def _has_gpu() -> bool:
    return torch.cuda.is_available()


@lru_cache(maxsize=64)
def _device(index: int) -> Device:
    found = _C.cuda_devices()[index]
    return Device(tuple(found["capability"]), found["shared_memory"], found["multiprocessors"])
