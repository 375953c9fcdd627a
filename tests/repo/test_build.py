"""The package as a whole: what importing it needs, what the native module links."""

from __future__ import annotations

import os
import re
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
    libraries = re.sub(r"\(0x[0-9a-f]+\)", "", needed)  # an address may have a name's letters in it
    assert "libc.so" in libraries
    assert not any(name in libraries for name in ("torch", "libcuda", "c10", "not found"))


def test_native_module_answers_without_a_gpu() -> None:
    assert isinstance(_C.cuda_devices(), list)
    assert isinstance(_C.has_cuda, bool)


def test_import_does_without() -> None:
    """Each in a child of one process, because an import of torch takes longer than all else here."""
    code = """
import os, sys, torch
for missing in ["transformers", "triton", "ggml", "matplotlib", "typer", "rich", "sleepkern._C"]:
    child = os.fork()
    if child == 0:
        sys.modules[missing] = None
        import sleepkern
        from sleepkern import rules, testing
        x = testing.make_inputs(rules.KDA, testing.Shape(T=3))
        testing.call(rules.KDA, x)
        print(missing, sleepkern.explain(rules.KDA, **x).chosen, flush=True)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0, missing
"""
    chosen = dict(line.split() for line in python(code).splitlines())
    assert chosen == {
        **dict.fromkeys(("transformers", "triton", "ggml", "matplotlib", "typer", "rich"), "cpu"),
        "sleepkern._C": "chunked",
    }


@pytest.mark.alone
def test_import_takes_less_than_a_third_of_a_second_beyond_torchs() -> None:
    code = "import torch, time; t = time.process_time(); import sleepkern; print(time.process_time() - t)"
    assert min(float(python(code)) for _ in range(3)) < 0.3


def test_import_leaves_heavy_packages_alone() -> None:
    heavy = ["transformers", "matplotlib", "rich", "typer", "ggml", "torch._dynamo"]
    code = "import torch, sys; before = set(sys.modules); import sleepkern; new = set(sys.modules) - before; "
    code += f"print([name for name in {heavy} if name in new])"
    assert python(code) == "[]"


@pytest.mark.parametrize(
    "module",
    ["benchmarks.gpu_check", "tests.offline.triton.gate", "tests.offline.cuda.gate"],
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


def build_without(environment: dict[str, str], *arguments: str) -> subprocess.CompletedProcess[str]:
    """setup.py, run in a changed environment."""
    command = [sys.executable, "setup.py", "--quiet", *arguments]
    given = {name: value for name, value in os.environ.items() if name != "CMAKE_ARGS"} | environment
    return subprocess.run(command, cwd=ROOT, env=given, capture_output=True, text=True, check=False)


def test_a_broken_compiler_is_one_sentence_that_says_how_to_go_on(tmp_path: Path) -> None:
    compiler = tmp_path / "g++"
    compiler.write_text("#!/bin/sh\nexit 1\n")
    compiler.chmod(0o755)
    arguments = ("build_ext", "--build-temp", str(tmp_path / "temp"), "--build-lib", str(tmp_path / "lib"))
    done = build_without({"CXX": str(compiler)}, *arguments)
    assert done.returncode != 0
    assert "sleepkern._C: building it failed" in done.stderr.splitlines()[-1]
    assert "CMAKE_ARGS=-DSLEEPKERN_NATIVE=OFF" in done.stderr.splitlines()[-1]


def test_the_package_can_be_built_without_the_module(tmp_path: Path) -> None:
    arguments = ("build", "--build-base", str(tmp_path))
    done = build_without({"CMAKE_ARGS": "-DSLEEPKERN_NATIVE=OFF", "PATH": "/nowhere"}, *arguments)
    assert done.returncode == 0, done.stderr
    built = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert any(path.name == "py.typed" for path in built)
    assert not any(path.suffix == ".so" for path in built)


def test_stubs_for_an_older_glibc_keep_its_first_versions(tmp_path: Path) -> None:
    """A program that creates a thread requires glibc 2.34 when linked here, and not when linked with the stubs."""
    source = tmp_path / "thread.c"
    source.write_text("#include <pthread.h>\nint create(pthread_t* t) { return pthread_create(t, 0, 0, 0); }\n")
    command = [sys.executable, "packaging/old_glibc.py", "--out", str(tmp_path)]
    stubs = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    library = tmp_path / "thread.so"
    linked = ["g++", "-x", "c", str(source), "-x", "none", "-shared", "-fPIC", *stubs.split(";"), "-o", str(library)]
    subprocess.run(linked, check=True)
    listed = subprocess.run(["readelf", "-W", "--dyn-syms", str(library)], capture_output=True, text=True, check=True)
    version = (
        next(line for line in listed.stdout.splitlines() if "pthread_create@" in line).split("GLIBC_")[1].split()[0]
    )
    assert tuple(map(int, version.split("."))) < (2, 28)
