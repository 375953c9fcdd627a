"""Build variants of the native module apart from the installed one, and run Python with them."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

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


class Mutation(NamedTuple):
    """A fault: what happens to the line of csrc/cpu below the comment `// mutant: NAME`.

    The line is deleted, or the one match of the regular expression `find` on it is replaced. A mutation names no
    identifier of the code, so that it outlives a rename.
    """

    name: str
    find: str = "^.*$"
    replacement: str = ""


def build_with_faults(root: Path, folder: Path, mutations: tuple[Mutation, ...]) -> Path:
    """A module in `folder` with faults planted, for the baseline instruction set alone.

    All are built in one folder under `root`, one after the other, so that what a fault does not reach is compiled once.
    """
    shared_build = root / "with_faults"
    with FileLock(root / "with_faults.lock"):
        if not (shared_build / "build").exists():
            _configure(shared_build, "-DSLEEPKERN_BASELINE_ONLY=ON")
        sound: dict[Path, str] = {}
        try:
            for mutation in mutations:
                path = _file_with(mutation, shared_build / "source" / "csrc" / "cpu")
                text = path.read_text()
                sound.setdefault(path, text)
                path.write_text(mutated(text, mutation))
            return Path(shutil.move(_compile(shared_build), folder))
        finally:
            for path, text in sound.items():
                path.write_text(text)


def mutated(text: str, mutation: Mutation) -> str:
    """Source text with the fault: the line below the mutation's comment is changed, and no other."""
    lines = text.split("\n")
    (at,) = (i for i, line in enumerate(lines) if line.strip() == _comment(mutation))
    lines[at + 1], count = re.subn(mutation.find, mutation.replacement, lines[at + 1])
    assert count == 1, f"{mutation.find!r} matches {count} times below '{_comment(mutation)}'"
    return "\n".join(lines)


def _file_with(mutation: Mutation, folder: Path) -> Path:
    found = [p for p in folder.rglob("*.h") for line in p.read_text().split("\n") if line.strip() == _comment(mutation)]
    assert len(found) == 1, f"'{_comment(mutation)}' is {len(found)} times in {folder}"
    return found[0]


def _comment(mutation: Mutation) -> str:
    return f"// mutant: {mutation.name}"


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
