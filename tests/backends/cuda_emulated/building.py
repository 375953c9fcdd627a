"""csrc/cuda compiled for the CPU: a Python module with the launches of sleepkern._C, on request with a mutant."""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType

import pybind11
from mutants import plant

HERE = Path(__file__).resolve().parent
CSRC = HERE.parents[2] / "csrc"
SANITIZERS = ("-fsanitize=address,undefined", "-fno-sanitize-recover=undefined", "-fno-omit-frame-pointer", "-g1")
OPTIONS = ("-std=c++17", "-fPIC", "-fvisibility=hidden", "-Wall", "-Wextra", "-Wno-unknown-pragmas")


def build(folder: Path, sanitize: bool = False, mutant: str | None = None, sound: Path | None = None) -> Path:
    """The module's path.

    With a mutant, only the sources that include its file are compiled; the other objects come from `sound`, the folder
    of a build without one.
    """
    csrc, faulty = CSRC, None
    if mutant is not None:
        csrc = folder / "csrc"
        shutil.copytree(CSRC, csrc)
        faulty = plant(csrc, mutant)
    sources = [
        *sorted((csrc / "cuda").rglob("*.cu")),
        csrc / "bindings" / "cuda_recurrence.cpp",
        csrc / "bindings" / "cuda_blocks.cpp",
        csrc / "bindings" / "cuda_fast_decode.cpp",
        csrc / "bindings" / "cuda_fast_replay.cpp",
        csrc / "bindings" / "fast_path.cpp",
        csrc / "bindings" / "tensor_views.cpp",
        HERE / "module.cpp",
    ]
    sources = [s for s in sources if s.name != "device.cu"]
    level = "-O1" if mutant is None else "-O0"  # a faulty build runs one small test
    flags = [level, *OPTIONS, *(SANITIZERS if sanitize else ())]
    includes = [csrc, HERE, pybind11.get_include(), sysconfig.get_paths()["include"]]

    def compiled(source: Path) -> Path:
        if faulty is not None and sound is not None and not _reaches(csrc, source, faulty):
            return sound / f"{source.stem}.o"
        target = folder / f"{source.stem}.o"
        command = ["g++", *flags, "-DSLEEPKERN_CUDA_ON_CPU", *(f"-I{i}" for i in includes)]
        _run([*command, "-x", "c++", "-c", source, "-o", target])
        return target

    folder.mkdir(parents=True, exist_ok=True)
    with ThreadPoolExecutor(2) as pool:
        objects = list(pool.map(compiled, sources))
    module = folder / "cuda_on_cpu.so"
    _run(["g++", "-shared", *flags, *objects, "-o", module])
    return module


def load(path: Path) -> ModuleType:
    """Import the module, of which a process holds only one: Python keeps one of a name."""
    spec = importlib.util.spec_from_file_location("cuda_on_cpu", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def run_tests(
    module: Path, chosen: str, sanitize: bool = False, file: str = "test_emulated_kernels.py"
) -> subprocess.CompletedProcess[str]:
    """Run tests of a file with a module in a process of its own, which a deadlock ends."""
    tests = HERE / file
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-s", str(tests), "-k", chosen, "--cuda-module", str(module)]
    environment = dict(os.environ)
    if sanitize:
        libraries = [_output(["g++", f"-print-file-name=lib{name}.so"]) for name in ("asan", "ubsan")]
        environment |= {"LD_PRELOAD": " ".join(libraries), "ASAN_OPTIONS": "detect_leaks=0"}
    return subprocess.run(command, capture_output=True, text=True, check=False, env=environment, timeout=400)


def _reaches(csrc: Path, source: Path, file: Path) -> bool:
    """Tells whether a source includes a file of csrc, directly or through another one."""
    seen, waiting = set(), [source]
    while waiting:
        path = waiting.pop()
        if path in seen or not path.exists():
            continue
        seen.add(path)
        includes = [line.split('"')[1] for line in path.read_text().splitlines() if line.startswith('#include "')]
        waiting += [csrc / name for name in includes]
    return file in seen


def _output(command: list[str]) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


def _run(command: list[object]) -> None:
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
