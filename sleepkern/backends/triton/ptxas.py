"""Tells which assembler kernels take on a device, whether it is sound there, and which plans follow from it.

On Hopper ptxas before CUDA 13.3 makes wrong code of some warp-group products: registers of an operand are written anew
while the product still reads them, descriptors of shared memory are mixed up. Which kernels it meets depends on sizes
and tiles; results are wrong, or addresses. Seen with ptxas 12.8 on an H200; public reports have 12.9 and 13.0 too.
"""

from __future__ import annotations

import re
import subprocess
from functools import lru_cache
from importlib import metadata
from pathlib import Path
from typing import NamedTuple

from .plan_table import PLAIN_HOPPER

SOUND = (13, 3)
"""The first sound version: https://docs.nvidia.com/cuda/archive/13.3.0/cuda-toolkit-release-notes."""
PACKAGE = "nvidia-cuda-nvcc"
"""The package that has an assembler of its own; the extra `hopper` brings it."""
UNKNOWN = "0"
"""The version of an assembler that does not say it."""


class Assembler(NamedTuple):
    """A ptxas: its file, its version such as "13.5.37", and whose it is, "triton" or the package's name."""

    path: str
    version: str
    source: str


def assembler_fault(version: str, capability: tuple[int, int]) -> str | None:
    """A sentence where a version of ptxas is known to assemble warp-group products wrong for a device, else None."""
    if capability[0] == 9 and numbers(version) < SOUND:
        return (
            f"ptxas {version}, which Triton takes for Hopper here, makes wrong code of some warp-group products. The "
            "kernels do without such products and are slower for it; `pip install 'sleepkern[hopper]'` (that is, "
            f"{PACKAGE} 13.3 or later) brings them back"
        )
    return None


@lru_cache(maxsize=8)
def assembler_of(capability: tuple[int, int]) -> Assembler:
    """The assembler of the kernels of this package on a device.

    It is Triton's, unless that is not sound for the device and the package nvidia-cuda-nvcc has one that is.
    """
    own = triton_assembler(capability)
    if assembler_fault(own.version, capability) is None:
        return own
    packaged = packaged_assembler()
    sound = packaged is not None and assembler_fault(packaged.version, capability) is None
    return packaged if packaged is not None and sound else own


@lru_cache(maxsize=1)
def packaged_assembler() -> Assembler | None:
    """The ptxas of the installed package nvidia-cuda-nvcc, or None where there is none that runs."""
    try:
        files = metadata.files(PACKAGE) or []
    except metadata.PackageNotFoundError:
        return None
    for file in files:
        if file.name in ("ptxas", "ptxas.exe"):
            return tool(str(Path(str(file.locate())).resolve()), PACKAGE)
    return None


@lru_cache(maxsize=8)
def capability_of_plans(capability: tuple[int, int]) -> int:
    """The capability by which the plans of a device are looked up."""
    version = assembler_of(capability).version
    return PLAIN_HOPPER if assembler_fault(version, capability) is not None else 10 * capability[0]


capability_of_plans._dynamo_marked_constant = True  # type: ignore[attr-defined]


def triton_assembler(capability: tuple[int, int]) -> Assembler:
    """The ptxas that Triton takes for a device; which of its two that is depends on Triton's version too."""
    from triton import knobs

    try:
        from triton.backends.nvidia.compiler import get_ptxas

        found = get_ptxas(10 * capability[0] + capability[1])
    except (ImportError, TypeError, RuntimeError):
        try:
            found = knobs.nvidia.ptxas
        except (AttributeError, RuntimeError):
            return Assembler("", UNKNOWN, "triton")
    return Assembler(str(found.path), str(found.version), "triton")


@lru_cache(maxsize=8)
def tool(path: str, source: str) -> Assembler | None:
    """The assembler at a path by the version that it prints, or None where it does not run."""
    try:
        said = subprocess.run([path, "--version"], capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        return None
    version = re.search(r"\bV(\d+(?:\.\d+)+)", said) or re.search(r"release (\d+\.\d+)", said)
    return None if version is None else Assembler(path, version[1], source)


def numbers(version: str) -> tuple[int, ...]:
    """(3, 7, 1) of "3.7.1+git"."""
    return tuple(int(part) for part in re.findall(r"\d+", version)[:3])
