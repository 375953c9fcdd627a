"""The peaks of a device, measured: shares are relative to them."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from .environment import peak_gflops
from .timing import Candidate, time_in_turns

MATRIX = 8192
COPIED_BYTES = 1 << 30


@dataclass(frozen=True)
class Ceilings:
    """The peaks of a device, None where unknown.

    gflops is that of a core's float32 multiply-adds, or of a GPU's bfloat16 product of large matrices.
    gigabytes_per_second counts the bytes that a GPU's copy of a large tensor reads and writes.
    """

    gflops: float | None
    gigabytes_per_second: float | None


def ceilings(device: str = "cpu", matrix: int = MATRIX, copied: int = COPIED_BYTES) -> Ceilings:
    """Measure the peaks: it takes 0.2 s on the CPU, 1 s on a GPU. Other sizes are for tests."""
    if torch.device(device).type == "cpu":
        return Ceilings(peak_gflops(), None)
    return measured(device, matrix, copied)


def measured(device: str, matrix: int, copied: int) -> Ceilings:
    """Measure by torch's own product and copy."""
    a, b = (torch.randn(matrix, matrix, device=device, dtype=torch.bfloat16) for _ in range(2))
    source = torch.empty(copied, device=device, dtype=torch.uint8)
    target = torch.empty_like(source)
    candidates = {"product": Candidate([lambda: a @ b]), "copy": Candidate([lambda: target.copy_(source)])}
    times = time_in_turns(candidates, device, seconds=1.0)
    product, copy = (times[name].median for name in candidates)
    return Ceilings(2 * matrix**3 / product * 1e-9, 2 * copied / copy * 1e-9)
