"""The package as a whole: what importing it needs, what the native module links."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from sleepkern.backends.native.module import _C

ROOT = Path(__file__).resolve().parents[2]


def python(code: str) -> str:
    """Standard output of Python code in a process of its own."""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_native_module_links_no_torch_and_no_cuda_library() -> None:
    needed = subprocess.run(["ldd", _C.__file__], capture_output=True, text=True, check=True).stdout
    assert "libc.so" in needed
    assert not any(name in needed for name in ("torch", "libcuda", "c10", "not found"))


def test_native_module_answers_without_a_gpu() -> None:
    assert isinstance(_C.cuda_devices(), list)
    assert isinstance(_C.has_cuda, bool)


@pytest.mark.parametrize("missing", ["transformers", "triton", "ggml", "matplotlib", "typer", "rich", "sleepkern._C"])
def test_import_does_without(missing: str) -> None:
    code = f"""
import sys
sys.modules[{missing!r}] = None
import sleepkern, torch
from sleepkern import rules, testing
x = testing.make_inputs(rules.KDA, testing.Shape(T=3))
testing.call(rules.KDA, x)
print(sleepkern.explain(rules.KDA, **x).chosen)
"""
    assert python(code) == ("chunked" if missing == "sleepkern._C" else "cpu")


@pytest.mark.alone
def test_import_takes_less_than_a_third_of_a_second_beyond_torchs() -> None:
    code = "import torch, time; t = time.perf_counter(); import sleepkern; print(time.perf_counter() - t)"
    assert min(float(python(code)) for _ in range(3)) < 0.3


def test_import_leaves_heavy_packages_alone() -> None:
    heavy = ["transformers", "matplotlib", "rich", "typer", "ggml", "torch._dynamo"]
    code = "import torch, sys; before = set(sys.modules); import sleepkern; new = set(sys.modules) - before; "
    code += f"print([name for name in {heavy} if name in new])"
    assert python(code) == "[]"


@pytest.mark.parametrize(
    "module",
    ["benchmarks.gpu_checks", "benchmarks.gpu_verify", "tests.offline.triton.gate", "tests.offline.cuda.gate"],
)
def test_programs_of_the_makefile_find_the_package(module: str) -> None:
    """From the root of a checkout in which nothing is installed and no PYTHONPATH is set, as make runs them."""
    pytest.importorskip("triton")
    makefile = (ROOT / "Makefile").read_text()
    assert f"python -m {module}" in makefile or f"$(PYTHON) -m {module}" in makefile
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    command = [sys.executable, "-m", module, "--help"]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
