"""The CUDA backend on CPU tensors: its launches go to csrc/cuda compiled for the CPU (cuda_on_cpu.h)."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import ModuleType, SimpleNamespace
from unittest import mock

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent))

import building
import torch
from filelock import FileLock

from sleepkern.backends.cuda import blocks, blocks_plan, blocks_weight_layout, decode, planned_replay
from sleepkern.backends.cuda import device as gpu
from sleepkern.backends.cuda import recurrence as cuda

torch.set_num_threads(1)

H100 = gpu.Device((9, 0), 232448, 4)
A100 = gpu.Device((8, 0), 166912, 4)
"""Devices with few multiprocessors, so that small tests have wide v-tiles too."""


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--cuda-module", help="a module that is built already, for runs under a sanitizer")


@pytest.fixture(scope="session")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of the build without faults, which all processes of a run share."""
    root = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        root = root.parent
    folder = root / "cuda_on_cpu"
    with FileLock(root / "cuda_on_cpu.lock"):
        if not (folder / "cuda_on_cpu.so").exists():
            building.build(folder)
    return folder


@pytest.fixture(scope="session")
def module(request: pytest.FixtureRequest) -> ModuleType:
    """The launches."""
    given = request.config.getoption("--cuda-module")
    return building.load(Path(given) if given else request.getfixturevalue("sound") / "cuda_on_cpu.so")


@contextmanager
def backend_on(
    module: ModuleType, order: str = "forward", device: gpu.Device = H100, early_copies: bool = False, seed: int = 0
) -> Iterator[None]:
    """The CUDA backend takes CPU tensors and launches the module's kernels, in this order of threads."""
    # They hold structs and sizes of another module.
    for cache in (decode.sizes_of, cuda._replay_call, cuda._plan_on, blocks._call):
        cache.cache_clear()
    module.set_options(order, seed, 10 * device.capability[0], early_copies)
    launches = {name: getattr(module, name) for name in dir(module) if name.lower().startswith("cuda")}
    launcher = SimpleNamespace(**launches, has_cuda=True, head_limit=module.head_limit)
    with ExitStack() as patches:
        for one in (cuda, decode, planned_replay, blocks, blocks_plan, blocks_weight_layout):
            patches.enter_context(mock.patch.object(one, "_C", launcher))
        patches.enter_context(mock.patch.multiple(gpu, current_device=lambda: device, why_not_on=lambda _: None))
        tables = {"_MULTI_CHUNK": cuda._multi_chunk_table(), "_SINGLE_CHUNK": cuda._single_chunk_table()}
        with mock.patch.multiple(cuda, **tables):
            yield


@pytest.fixture
def on(module: ModuleType) -> Callable[..., object]:
    """`backend_on` with the module."""
    return lambda **options: backend_on(module, **options)
