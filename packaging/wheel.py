"""Builds a wheel for each Python given, from one source distribution.

    python packaging/wheel.py --python python3.11 --python python3.12 --out dist

The wheels require glibc 2.28 at most (old_glibc.py), and torch brings their libgomp. Each Python builds in an
environment of its own with the packages of requirements-wheel.txt. With --arm64 ROOT the wheel is cross-compiled for
64-bit Arm: ROOT holds the headers and the standard library of that Python (arm64_check.py unpacks one), and the
compiler is aarch64-linux-gnu-g++.
"""

from __future__ import annotations

import argparse
import os
import re
import shlex
import shutil
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
BUILD = ROOT / "build" / "wheel"
NEWEST_GLIBC = 28
"""Systems from glibc 2.28 on run the wheels."""
SYSCONFIG = "_sysconfigdata__linux_aarch64-linux-gnu"
"""The module of Debian's Python for 64-bit Arm that sysconfig reads there."""


def run(command: list[str], environment: dict[str, str] | None = None, folder: Path = ROOT) -> None:
    """Run a step; exit with status 1 where it fails."""
    status = subprocess.run(command, cwd=folder, env=os.environ | (environment or {}), check=False).returncode
    if status:
        sys.exit(f"wheel: `{' '.join(command[:4])} ...` failed with exit status {status}; its message is above")


def version_of(python: str) -> str:
    """3.11 for a Python 3.11."""
    code = "import sys; print('%d.%d' % sys.version_info[:2])"
    try:
        return subprocess.run([python, "-c", code], capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError) as error:
        sys.exit(f"wheel: --python: got {python}; expected a Python that runs: {error}")


def environment_for(python: str) -> Path:
    """The folder of the programs of an environment, which is made once, with the tools of requirements-wheel.txt."""
    folder = BUILD / f"env-{version_of(python)}"
    mark = folder / "installed"
    wanted = (ROOT / "requirements-wheel.txt").read_text()
    if not mark.exists() or mark.read_text() != wanted:
        run([python, "-m", "venv", "--clear", str(folder)])
        options = ["--quiet", "--disable-pip-version-check", "-r", "requirements-wheel.txt"]
        run([str(folder / "bin" / "python"), "-m", "pip", "install", *options])
        mark.write_text(wanted)
    return folder / "bin"


def sources(programs: Path) -> Path:
    """The source distribution, unpacked: a wheel that is built from it shows that it holds all that is needed."""
    folder = BUILD / "source"
    shutil.rmtree(folder, ignore_errors=True)
    run([str(programs / "python"), "-W", "ignore", "setup.py", "--quiet", "sdist", "--dist-dir", str(folder)])
    shutil.unpack_archive(next(folder.glob("*.tar.gz")), folder, filter="data")
    return next(path for path in folder.iterdir() if path.is_dir())


def arm64(root: Path, version: str) -> dict[str, str]:
    """The environment in which setup.py builds for the Python for 64-bit Arm under `root`."""
    python = root / "usr"
    if not (python / "include" / f"python{version}" / "Python.h").exists():
        sys.exit(f"wheel: --arm64: got {root}; expected the headers of Python {version} in usr/include below it")
    described = BUILD / "arm64"
    described.mkdir(parents=True, exist_ok=True)
    shutil.copy(python / "lib" / f"python{version}" / f"{SYSCONFIG}.py", described)
    # Debian's pyconfig.h includes the one of the machine by its triplet, from a folder beside the C library's headers.
    shutil.copytree(
        python / "include" / "aarch64-linux-gnu" / f"python{version}",
        described / "aarch64-linux-gnu" / f"python{version}", dirs_exist_ok=True,
    )  # fmt: skip
    options = [
        "-DCMAKE_SYSTEM_NAME=Linux", "-DCMAKE_SYSTEM_PROCESSOR=aarch64",
        "-DCMAKE_CXX_COMPILER=aarch64-linux-gnu-g++", f'-DCMAKE_CXX_FLAGS=-isystem "{described}"',
        f"-DPython_INCLUDE_DIR={python / 'include' / f'python{version}'}", "-DSLEEPKERN_CUDA=OFF",
    ]  # fmt: skip
    return {
        "_PYTHON_HOST_PLATFORM": "linux-aarch64", "_PYTHON_SYSCONFIGDATA_NAME": SYSCONFIG, "PYTHONPATH": str(described),
        "CMAKE_ARGS": f"{os.environ.get('CMAKE_ARGS', '')} {shlex.join(options)}",
    }  # fmt: skip


def build(source: Path, programs: Path, out: Path, cross: dict[str, str]) -> Path:
    """Build the wheel of one Python into `out`; its name has the tag of the systems that it runs on."""
    made = BUILD / "made"
    for folder in (made, source / "build"):
        shutil.rmtree(folder, ignore_errors=True)
    python, search = str(programs / "python"), f"{programs}{os.pathsep}{os.environ['PATH']}"
    given = cross | {"PATH": search}
    given["CMAKE_ARGS"] = f"{given.get('CMAKE_ARGS', os.environ.get('CMAKE_ARGS', ''))} -DSLEEPKERN_PORTABLE=ON"
    run([python, "-W", "ignore", "setup.py", "--quiet", "bdist_wheel", "--dist-dir", str(made)], given, source)
    # With --plat auto auditwheel takes the machine from the wheel, not from the system that it runs on.
    repair = ["repair", "--plat", "auto", "--exclude", "libgomp.so.1", "--wheel-dir", str(BUILD / "repaired")]
    shutil.rmtree(BUILD / "repaired", ignore_errors=True)
    run([python, "-m", "auditwheel", *repair, str(next(made.glob("*.whl")))], {"PATH": search})
    repaired = next((BUILD / "repaired").glob("*.whl"))
    oldest = min(map(int, re.findall(r"manylinux_2_(\d+)_", repaired.name)), default=99)
    if oldest > NEWEST_GLIBC:
        sys.exit(f"wheel: got {repaired.name}; expected one for glibc 2.{NEWEST_GLIBC} or older")
    partial = Path(shutil.copy(repaired, out / f".{repaired.name}.partial"))
    return partial.rename(out / repaired.name)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--python", action="append", help="an interpreter; may be repeated; default this one")
    parser.add_argument("--out", type=Path, default=ROOT / "dist")
    parser.add_argument("--arm64", type=Path, metavar="ROOT", help="cross-compile for the Python below this folder")
    options = parser.parse_args()
    pythons = options.python or [sys.executable]
    machine = "aarch64" if options.arm64 else os.uname().machine
    out = options.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    for old in out.glob(f"sleepkern-*{machine}.whl"):
        old.unlink()
    source = sources(environment_for(pythons[0]))
    for python in pythons:
        version, began = version_of(python), time.perf_counter()
        print(f"Python {version}, {machine}: compiling, five to ten minutes with CUDA, one or two without", flush=True)
        cross = arm64(options.arm64.resolve(), version) if options.arm64 else {}
        wheel = build(source, environment_for(python), out, cross)
        print(f"  {wheel.name}, {wheel.stat().st_size / 1e6:.1f} MB, {time.perf_counter() - began:.0f} s", flush=True)


if __name__ == "__main__":
    main()
