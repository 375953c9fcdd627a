"""What a device can do at best, measured now: the peaks that shares are taken of."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from .environment import peak_gflops
from .timing import Candidate, time_in_turns

MATRIX = 8192
COPIED_BYTES = 1 << 30


@dataclass(frozen=True)
class Ceilings:
    """gflops: a core's float32 multiply-adds, or a GPU's bfloat16 product of large matrices; gigabytes_per_second: a

    GPU's copy of a large tensor, bytes read and written. None where unknown.
    """

    gflops: float | None
    gigabytes_per_second: float | None


def ceilings(device: str = "cpu", matrix: int = MATRIX, copied: int = COPIED_BYTES) -> Ceilings:
    """Measure them: a fifth of a second on the CPU, one on a GPU. Sizes are for tests."""
    if torch.device(device).type == "cpu":
        return Ceilings(peak_gflops(), None)
    return measured(device, matrix, copied)


def measured(device: str, matrix: int, copied: int) -> Ceilings:
    """By torch's own product and copy."""
    a, b = (torch.randn(matrix, matrix, device=device, dtype=torch.bfloat16) for _ in range(2))
    source = torch.empty(copied, device=device, dtype=torch.uint8)
    target = torch.empty_like(source)
    candidates = {"product": Candidate([lambda: a @ b]), "copy": Candidate([lambda: target.copy_(source)])}
    times = time_in_turns(candidates, device, seconds=1.0)
    product, copy = (times[name].median for name in candidates)
    return Ceilings(2 * matrix**3 / product * 1e-9, 2 * copied / copy * 1e-9)
