"""Build variants of the native module apart from the installed one, and run Python with them."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pybind11

ROOT = Path(__file__).resolve().parent.parent


def build(folder: Path, *options: str, faults: tuple[tuple[str, str, str], ...] = ()) -> Path:
    """Compile csrc into `folder`; the module's path. With faults (file, text, replacement) planted: baseline alone."""
    source = folder / "source"
    shutil.copytree(ROOT / "csrc", source / "csrc")
    shutil.copy(ROOT / "CMakeLists.txt", source)
    for file, good, bad in faults:
        path = source / "csrc" / file
        text = path.read_text()
        assert text.count(good) == 1, f"{good!r} is not once in {file}"
        path.write_text(text.replace(good, bad))
    tools = Path(sys.executable).parent
    cmake, ninja = (shutil.which(tool, path=f"{tools}:/usr/local/bin:/usr/bin") for tool in ("cmake", "ninja"))
    assert cmake is not None
    assert ninja is not None
    configure = [cmake, "-S", source, "-B", folder / "build", "-G", "Ninja", f"-DCMAKE_MAKE_PROGRAM={ninja}"]
    configure += ["-DCMAKE_BUILD_TYPE=Release", f"-DPython_EXECUTABLE={sys.executable}", "-DSLEEPKERN_CUDA=OFF"]
    configure += [f"-Dpybind11_DIR={pybind11.get_cmake_dir()}", f"-DSLEEPKERN_OUTPUT_DIR={folder}", *options]
    configure += ["-DSLEEPKERN_BASELINE_ONLY=ON"] if faults else []
    for command in (configure, [cmake, "--build", folder / "build"]):
        done = subprocess.run(list(map(str, command)), capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
    (module,) = folder.glob("_C*.so")
    return module


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
"""
