"""Hands the build of sleepkern._C to CMake; everything else is in pyproject.toml."""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent


class CMakeBuild(build_ext):
    """One configure and one incremental build; extra CMake options from CMAKE_ARGS.

    -DSLEEPKERN_NATIVE=OFF among them leaves the module out: a package of Python alone.
    """

    def build_extension(self, ext: Extension) -> None:
        cmake, ninja = tool("cmake"), tool("ninja")
        try:
            import pybind11
        except ImportError:
            raise SystemExit(missing("pybind11")) from None
        target = Path(self.get_ext_fullpath(ext.name)).resolve()
        build = (ROOT / self.build_temp).resolve()
        # ninja and pybind11 are named anew each time: an isolated build leaves a cache that points into its
        # own environment, which is gone by the next one.
        options = [
            f"-DCMAKE_MAKE_PROGRAM={ninja}",
            "-DCMAKE_BUILD_TYPE=Release",
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
            f"-DSLEEPKERN_OUTPUT_DIR={target.parent}",
            *shlex.split(os.environ.get("CMAKE_ARGS", "")),
        ]
        run([cmake, "-S", str(ROOT), "-B", str(build), "-G", "Ninja", *options])
        run([cmake, "--build", str(build), "--parallel", str(os.cpu_count() or 1)])


def run(command: list[str]) -> None:
    """A step of the build, whose own messages stand above ours if it fails."""
    status = subprocess.run(command, check=False).returncode
    if status:
        raise SystemExit(
            f"sleepkern._C: building it failed (exit status {status} of cmake; its message stands above). It needs a "
            "C++17 compiler, such as g++ or clang++; CMAKE_ARGS=-DSLEEPKERN_NATIVE=OFF installs the package by torch "
            "alone, without _C and several times slower"
        )


def tool(name: str) -> str:
    """Path of a program, on PATH or beside this Python."""
    found = shutil.which(name) or shutil.which(name, path=str(Path(sys.executable).parent))
    if found is None:
        raise SystemExit(missing(name))
    return found


def missing(name: str) -> str:
    return (
        f"sleepkern._C: building it needs {name}, which is not here; `pip install {name}` brings it, and "
        "CMAKE_ARGS=-DSLEEPKERN_NATIVE=OFF installs the package without _C, by torch alone"
    )


native = "-DSLEEPKERN_NATIVE=OFF" not in shlex.split(os.environ.get("CMAKE_ARGS", ""))
extensions = [Extension("sleepkern._C", sources=[])] if native else []
setup(ext_modules=extensions, cmdclass={"build_ext": CMakeBuild})
