"""Triton on a GPU that is not there: its driver layer on a stub of libcuda, for tests and for timing the host.

`install` builds the stub (stub_driver.cpp) with g++ and makes Triton load it. Kernels are compiled for compute
capability 9.0 by Triton's own assembler; a launch runs nothing. Pointers are those of tensors on the CPU.
"""

from __future__ import annotations

import ctypes
import os
import subprocess
import tempfile
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.nvidia import driver as nvidia
from triton.runtime import driver

HERE = Path(__file__).resolve().parent
INCLUDE = Path(triton.__file__).parent / "backends" / "nvidia" / "include"
STREAM = 0x5000
"""The handle of the current stream."""
CUDA = ("is_available", "current_device", "get_device_capability", "current_stream", "synchronize", "is_initialized")
"""Functions of torch.cuda that a call may use; each call of one is counted."""


@dataclass(frozen=True)
class DriverLaunch:
    """A launch as libcuda sees it: `function` stands for the compiled kernel; parameters are at most 8 bytes wide."""

    kernel: str
    grid: tuple[int, ...]
    block: tuple[int, ...]
    shared: int
    stream: int
    function: int
    parameters: tuple[bytes, ...]


class Stub:
    """The counts and the launches of the stub."""

    def __init__(self, library: ctypes.CDLL) -> None:
        self.library = library
        library.stub_counts.restype = library.stub_kernel.restype = ctypes.c_char_p
        self.torch: Counter[str] = Counter()

    def reset(self, keep_launches: bool = False) -> None:
        """Forget all counts and launches; keep those from here on if wanted."""
        self.library.stub_reset(keep_launches)
        self.torch.clear()

    def counts(self) -> dict[str, int]:
        """The number of calls of each function of libcuda since the reset."""
        lines = self.library.stub_counts().decode().splitlines()
        return {name: int(number) for name, number in (line.split() for line in lines)}

    def launches(self) -> list[DriverLaunch]:
        """The launches since the reset."""
        return [self._launch(i) for i in range(self.library.stub_launches())]

    def _launch(self, i: int) -> DriverLaunch:
        shape = (ctypes.c_uint64 * 10)()
        self.library.stub_shape(i, shape)
        found = []
        for parameter in range(shape[8]):
            value = ctypes.create_string_buffer(8)
            size = self.library.stub_parameter(i, parameter, value)
            found.append(value.raw[:size])
        name = self.library.stub_kernel(i).decode()
        return DriverLaunch(name, tuple(shape[:3]), tuple(shape[3:6]), shape[6], shape[7], shape[9], tuple(found))


def install(folder: Path) -> Stub:
    """Build the stub in a folder and make Triton use it, for the life of the process."""
    os.environ.setdefault("TRITON_CACHE_DIR", str(folder / "triton"))
    os.environ["TRITON_LIBCUDA_PATH"] = str(folder)
    path = folder / "libcuda.so.1"
    command = ["g++", "-std=c++17", "-O1", "-shared", "-fPIC", f"-I{INCLUDE}", HERE / "stub_driver.cpp"]
    subprocess.run([*map(str, command), "-Wl,-soname,libcuda.so.1", "-o", str(path)], check=True)
    stub = Stub(ctypes.CDLL(str(path), mode=ctypes.RTLD_GLOBAL))
    _count_calls_of_torch(stub)
    device: Any = nvidia.CudaDriver()
    device.get_current_stream = lambda index: STREAM
    driver.set_active(device)
    return stub


def _count_calls_of_torch(stub: Stub) -> None:
    answers = {"is_available": True, "current_device": 0, "get_device_capability": (9, 0), "is_initialized": True}

    def counted(name: str) -> Any:
        def answer(*_: object) -> Any:
            stub.torch[name] += 1
            return answers.get(name)

        return answer

    for name in CUDA:
        setattr(torch.cuda, name, counted(name))


def temporary_folder() -> Path:
    """A folder that outlives the process where SLEEPKERN_LAUNCHES says one, which spares compiling again."""
    given = os.environ.get("SLEEPKERN_LAUNCHES")
    if given:
        Path(given).mkdir(parents=True, exist_ok=True)
        return Path(given)
    return Path(tempfile.mkdtemp(prefix="sleepkern-launches-"))
