"""Triton's launches on a stub of libcuda, in a process of its own: torch.cuda and Triton's driver are replaced.

python -m pytest tests/backends/launches
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

if os.environ.get("TRITON_INTERPRET") == "1":
    raise pytest.UsageError("tests/backends/launches: run without TRITON_INTERPRET, in a process of its own")
os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")
sys.path.insert(0, str(Path(__file__).resolve().parent))

import launch_cases
import stub_driver
import torch

torch.set_num_threads(1)


@pytest.fixture(scope="session")
def stub() -> stub_driver.Stub:
    """The stub, which Triton uses from here on."""
    return stub_driver.install(stub_driver.temporary_folder())


@pytest.fixture(autouse=True)
def gpu(stub: stub_driver.Stub) -> Iterator[None]:
    """Tensors of the CPU pass for those of a GPU."""
    with launch_cases.as_on_a_gpu():
        yield
