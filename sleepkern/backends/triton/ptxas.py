"""Tells whether the assembler that Triton takes is sound for a device, and which plans follow from it.

On Hopper ptxas before CUDA 13.3 makes wrong code of some warp-group products: registers of an operand are written anew
while the product still reads them, descriptors of shared memory are mixed up. Which kernels it meets depends on sizes
and tiles; results are wrong, or addresses. Seen with ptxas 12.8 on an H200; public reports have 12.9 and 13.0 too.
"""

from __future__ import annotations

import re
from functools import lru_cache

from .plan_table import PLAIN_HOPPER

SOUND = (13, 3)
"""The first sound version: https://docs.nvidia.com/cuda/archive/13.3.0/cuda-toolkit-release-notes."""


def assembler_fault(version: str, capability: tuple[int, int]) -> str | None:
    """A sentence where a version of ptxas is known to assemble warp-group products wrong for a device, else None."""
    if capability[0] == 9 and numbers(version) < SOUND:
        return (
            f"ptxas {version}, which Triton takes for Hopper here, makes wrong code of some warp-group products. The "
            "kernels do without such products and are slower for it; TRITON_PTXAS_PATH=... with a ptxas of CUDA 13.3 "
            "or later (`pip install nvidia-cuda-nvcc` has one) brings them back"
        )
    return None


def assembler() -> str:
    """The version of ptxas that Triton takes for devices before Blackwell; "0" where it does not say."""
    from triton import knobs

    try:
        return str(knobs.nvidia.ptxas.version)
    except (AttributeError, RuntimeError):
        return "0"


@lru_cache(maxsize=8)
def capability_of_plans(capability: tuple[int, int]) -> int:
    """The capability by which the plans of a device are looked up."""
    return PLAIN_HOPPER if assembler_fault(assembler(), capability) is not None else 10 * capability[0]


capability_of_plans._dynamo_marked_constant = True  # type: ignore[attr-defined]


def numbers(version: str) -> tuple[int, ...]:
    """(3, 7, 1) of "3.7.1+git"."""
    return tuple(int(part) for part in re.findall(r"\d+", version)[:3])
