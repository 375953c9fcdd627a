"""The order of csrc: each header stands alone, and includes go from a higher floor to a lower one."""

from __future__ import annotations

import re
import subprocess
import sysconfig
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pybind11
import pytest

ROOT = Path(__file__).resolve().parents[2]
CSRC = ROOT / "csrc"
EMULATOR = ROOT / "tests" / "backends" / "cuda_emulated"
FLOORS = {
    "common": 0,
    "cpu/simd": 1,
    "cpu/runtime": 2,
    "cpu/gemm": 3,
    "cpu/recurrence": 4,
    "cpu/mixer": 5,
    "cpu/replay": 5,
    "cpu/blocks": 6,
    "cpu/isa": 7,
    "cuda/arch": 1,
    "cuda/recurrence": 2,
    "cuda/blocks": 3,
    "bindings": 8,
}
"""A file includes those of its own folder and of folders on lower floors."""
OUTSIDE = {"pybind11": "bindings", "Python": "bindings", "cuda": "cuda"}
"""What begins so and is not of csrc, and the only part of csrc that may include it."""
SOURCES = sorted(str(path.relative_to(CSRC)) for path in CSRC.rglob("*") if path.is_file())
HEADERS = [name for name in SOURCES if name.endswith((".h", ".cuh"))]


def faults(name: str, text: str) -> Iterator[str]:
    """What a file includes against the rules: by a name that is not its path from csrc, or from a higher floor."""
    room, part = name.rsplit("/", 1)[0], name.split("/")[0]
    for line in re.findall(r"^\s*#\s*include\b.*", text, re.M):
        match = re.fullmatch(r"\s*#\s*include\s*(?:<([^>]+)>|\"([^\"]+)\").*", line)
        if match is None:
            yield f"{name}: {line} names no file"
            continue
        outside, own = match.groups()
        if outside is not None:
            allowed = [only for begin, only in OUTSIDE.items() if outside.startswith(begin)]
            if part not in (allowed or [part]):
                yield f"{name}: <{outside}> belongs to {allowed[0]}"
        elif own not in SOURCES:
            yield f"{name}: {own} is no path from csrc"
        else:
            other = own.rsplit("/", 1)[0]
            if {part, own.split("/")[0]} == {"cpu", "cuda"}:
                yield f"{name}: {own} is the other device's"
            if other != room and FLOORS[other] >= FLOORS[room]:
                yield f"{name}: {own} is not on a lower floor"


def test_includes_go_downwards_by_paths_from_csrc() -> None:
    assert {name.rsplit("/", 1)[0] for name in SOURCES} == set(FLOORS)
    assert not [fault for name in SOURCES for fault in faults(name, (CSRC / name).read_text())]


@pytest.mark.parametrize(
    ("name", "line"),
    [
        ("cpu/simd/vec.h", '#include "cpu/gemm/gemm.h"'),
        ("cpu/mixer/convolution.h", '#include "cpu/replay/wy.h"'),
        ("cpu/gemm/gemm.h", '#include "microkernel.h"'),
        ("cpu/gemm/gemm.h", "#include WHICH"),
        ("cpu/blocks/group.h", '  #  include "cuda/arch/ptx.h"'),
        ("cuda/blocks/kernel.cuh", '#include "cpu/simd/vec.h"'),
        ("cpu/runtime/implementation.h", "#include <pybind11/pybind11.h>"),
        ("common/types.h", "#include <cuda_runtime.h>"),
    ],
)
def test_an_include_against_the_rules_is_found(name: str, line: str) -> None:
    assert list(faults(name, f"#pragma once\n{line}\n"))


@pytest.mark.hardening
@pytest.mark.parametrize("prepared", [True, False])
def test_headers_stand_alone(prepared: bool, tmp_path: Path) -> None:
    """Each compiles by itself. Prepared: the kernels' headers alone, with those from outside at hand, in a fifth of the
    time; pybind11 takes longer than all of csrc.
    """
    assert not [name for name in HEADERS if not re.search(r"^#pragma once$", (CSRC / name).read_text(), re.M)]
    with ThreadPoolExecutor(2) as pool:
        if prepared:
            list(pool.map(lambda part: prepare(part, tmp_path), ("cpu", "cuda")))
        names = [name for name in HEADERS if not (prepared and name.startswith("bindings/"))]
        messages = list(pool.map(lambda name: compiled_alone(name, tmp_path), names))
    assert not [message for message in messages if message]


def test_a_header_that_leans_on_another_is_found(tmp_path: Path) -> None:
    assert "Problem" in compiled_alone("cpu/simd/vec.h", tmp_path, "sleepkern::Problem problem;")
    assert not compiled_alone("cpu/simd/vec.h", tmp_path, "sleepkern::Rows rows;")


COMPILE = ("g++", "-std=gnu++17", "-Wno-psabi", f"-I{CSRC}")
ISA = {"ISA": "baseline", "LANES": "4", "SUPPORTED": "true", "ADDERS": "false"}
OPTIONS = {
    "common": [],
    "cpu": [f"-DSLEEPKERN_{name}={value}" for name, value in ISA.items()],
    "cuda": [f"-I{EMULATOR}", "-DSLEEPKERN_CUDA_ON_CPU"],
    "bindings": [f"-I{pybind11.get_include()}", f"-I{sysconfig.get_paths()['include']}", "-fvisibility=hidden"],
}
"""The headers of the CPU are compiled as a part of the baseline instruction set, those of CUDA for the CPU."""
CONDITIONAL = {"immintrin.h", "cuda_runtime.h", "cuda_on_cpu.h", "sanitizer/asan_interface.h"}


def prepare(part: str, folder: Path) -> None:
    """Compile the headers from outside that a part of csrc includes, once for all its headers."""
    texts = [(CSRC / name).read_text() for name in HEADERS if name.startswith(f"{part}/")]
    if part == "cuda":
        texts += [path.read_text() for path in EMULATOR.glob("*.h")]
    names = {name for text in texts for name in re.findall(r"^#include <([^>]+)>", text, re.M)} - CONDITIONAL
    header = folder / f"{part}.h"
    header.write_text("".join(f"#include <{name}>\n" for name in sorted(names)))
    subprocess.run([*COMPILE, *OPTIONS[part], "-x", "c++-header", "-o", f"{header}.gch", header], check=True)


def compiled_alone(name: str, folder: Path, more: str = "") -> str:
    """What the compiler says of a header, and of what follows it."""
    part = name.split("/")[0]
    ready = ["-include", folder / f"{part}.h"] if (folder / f"{part}.h.gch").exists() else []
    command = [*COMPILE, "-fsyntax-only", *OPTIONS[part], *ready, "-x", "c++", "-"]
    done = subprocess.run(command, input=f'#include "{name}"\n{more}\n', capture_output=True, text=True, check=False)
    return done.stdout + done.stderr
