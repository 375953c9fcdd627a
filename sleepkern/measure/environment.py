"""Where a result was measured: device, processor, versions, threads, date. Every JSON file has it."""

from __future__ import annotations

import datetime
import importlib
import importlib.util
import os
import platform
from importlib import metadata
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from ..backends.triton.ptxas import assembler_of

_PACKAGES = (
    "torch", "transformers", "ggml-python", "bitsandbytes-cpu-fork", "flash-linear-attention", "flash-qla",
    "tilelang", "flash-attn", "flash-attn-4", "triton",
)  # fmt: skip


def environment(device: str = "cpu") -> dict[str, Any]:
    """The facts that a reader needs to repeat a measurement on `device`."""
    from ..version import __version__

    native = native_module()
    return {
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "device": device_name(device),
        "cpu": cpu_name(),
        "cpus": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "threads": torch.get_num_threads(),
        "system": f"{platform.system()} {platform.machine()}",
        "isa": None if native is None else native.isa(),
        "threads_source": None if native is None else native.threads_source(),
        "python": platform.python_version(),
        "versions": {"sleepkern": __version__, **_versions(), **_assembler(device)},
    }


def native_module() -> ModuleType | None:
    """sleepkern._C, or None where it was not built."""
    try:
        return importlib.import_module("sleepkern._C")
    except ImportError:
        return None


def peak_gflops(seconds: float = 0.2) -> float | None:
    """float32 multiply-add peak of one core from registers, measured now; None without the compiled
    module."""
    native = native_module()
    return None if native is None else float(native.peak_gflops(seconds))


def device_name(device: str) -> str:
    """Name of the GPU, or of the processor."""
    if torch.device(device).type == "cuda":
        return torch.cuda.get_device_name(device)
    return cpu_name()


def cpu_name() -> str:
    """The processor's own name, e.g. "AMD EPYC 9B14"."""
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text(errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _assembler(device: str) -> dict[str, str]:
    """The ptxas of the Triton kernels on a GPU and whose it is; their plans depend on it (backends/triton/ptxas.py)."""
    if torch.device(device).type != "cuda" or importlib.util.find_spec("triton") is None:
        return {}
    chosen = assembler_of(torch.cuda.get_device_capability(device))
    return {"ptxas": f"{chosen.version} ({chosen.source})"}


def _versions() -> dict[str, str]:
    found = {}
    for name in _PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    if "ggml-python" in found:  # pip builds it for the machine it runs on
        from .peers.ggml_graph import built_with

        found["ggml-python"] += f" ({built_with()})"
    return found
