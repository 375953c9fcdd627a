"""Build variants of the native module apart from the installed one, and run Python with them."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pybind11
import pytest
from filelock import FileLock

ROOT = Path(__file__).resolve().parents[2]


def build(folder: Path, *options: str) -> Path:
    """Compile csrc into `folder`; the module's path."""
    _configure(folder, *options)
    return _compile(folder)


def shared(factory: pytest.TempPathFactory) -> Path:
    """The folder that all processes of one run of the tests share."""
    root = factory.getbasetemp()
    return root.parent if "PYTEST_XDIST_WORKER" in os.environ else root


def build_with_faults(root: Path, folder: Path, faults: tuple[tuple[str, str, str], ...]) -> Path:
    """A module in `folder` with faults (file, text, replacement) planted, for the baseline instruction set alone.

    All are built in one place under `root`, one after the other, so that what a fault does not reach is compiled once.
    """
    place = root / "with_faults"
    with FileLock(root / "with_faults.lock"):
        if not (place / "build").exists():
            _configure(place, "-DSLEEPKERN_BASELINE_ONLY=ON")
        sound: dict[Path, str] = {}
        for file, good, bad in faults:
            path = place / "source" / "csrc" / file
            text = path.read_text()
            sound.setdefault(path, text)
            assert text.count(good) == 1, f"{good!r} is not once in {file}"
            path.write_text(text.replace(good, bad))
        try:
            return Path(shutil.move(_compile(place), folder))
        finally:
            for path, text in sound.items():
                path.write_text(text)


def _configure(folder: Path, *options: str) -> None:
    source = folder / "source"
    shutil.copytree(ROOT / "csrc", source / "csrc")
    shutil.copy(ROOT / "CMakeLists.txt", source)
    command = [_tool("cmake"), "-S", source, "-B", folder / "build", "-G", "Ninja"]
    command += [f"-DCMAKE_MAKE_PROGRAM={_tool('ninja')}", "-DCMAKE_BUILD_TYPE=Release", "-DSLEEPKERN_CUDA=OFF"]
    command += [f"-DPython_EXECUTABLE={sys.executable}", f"-Dpybind11_DIR={pybind11.get_cmake_dir()}"]
    _run([*command, f"-DSLEEPKERN_OUTPUT_DIR={folder}", *options])


def _compile(folder: Path) -> Path:
    _run([_tool("cmake"), "--build", folder / "build"])
    (module,) = folder.glob("_C*.so")
    return module


def _tool(name: str) -> str:
    path = shutil.which(name, path=f"{Path(sys.executable).parent}:/usr/local/bin:/usr/bin")
    assert path is not None, f"{name} is not installed"
    return path


def _run(command: list[object]) -> None:
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def sanitized() -> dict[str, str]:
    """The environment in which Python loads a module built with -DSLEEPKERN_SANITIZE=ON.

    What Python and torch leave to the end of the process is no leak of ours.
    """
    done = subprocess.run(["c++", "-print-file-name=libasan.so"], capture_output=True, text=True, check=True)
    options = "detect_leaks=0:allocator_may_return_null=1"
    return {**os.environ, "LD_PRELOAD": done.stdout.strip(), "ASAN_OPTIONS": options}


def run_with(module: Path, code: str, env: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    """Run Python code in a process of its own in which sleepkern._C is `module`."""
    command = [sys.executable, "-c", loading(module) + code]
    return subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT, timeout=300, env=env)


def loading(module: Path) -> str:
    """Python code after which sleepkern._C is `module`."""
    return f"""
import importlib.util, sys
import torch
torch.set_num_threads(1)
spec = importlib.util.spec_from_file_location("sleepkern._C", {str(module)!r})
sys.modules["sleepkern._C"] = importlib.util.module_from_spec(spec)
spec.loader.exec_module(sys.modules["sleepkern._C"])
_C = sys.modules["sleepkern._C"]
"""
