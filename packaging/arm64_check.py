"""Builds the wheel for 64-bit Arm on another machine, and runs it there under qemu's user mode.

    apt-get install debootstrap g++-aarch64-linux-gnu qemu-user-static     # Debian's packages, once
    python packaging/arm64_check.py                                        # as root

Unpacks Debian's Python 3.11 for 64-bit Arm, cross-compiles the wheel (wheel.py), installs it beside torch's wheel for
64-bit Arm, and runs the smoke test: every rule forward and backward on the NEON kernels against the float64 reference,
a sleep, errors. qemu executes each instruction by software, so no time means anything. About 15 minutes.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent
BUILD = Path(tempfile.gettempdir()) / "sleepkern-arm64"
"""Outside of the tree: links of the unpacked system lead anywhere, and a source distribution follows them."""
PROGRAMS = ("debootstrap", "aarch64-linux-gnu-g++", "qemu-aarch64-static")
PYTHON = "3.11"
"""The version of Debian 12's Python; this machine needs the same to build the wheel."""

TORCH_NEEDS = ("filelock", "typing_extensions", "sympy", "mpmath", "networkx<3.5", "jinja2", "MarkupSafe", "fsspec")
"""What torch's wheel requires. They are named here, because pip decides by the machine that it runs on."""


def run(name: str, command: list[str], shown: int = 0) -> None:
    """Run a step and show its last lines, or all of its output if it fails."""
    began = time.perf_counter()
    print(f"{name} ...", flush=True)
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    lines = done.stdout.strip().splitlines()
    if done.returncode:
        sys.exit("\n".join([*lines, done.stderr, f"arm64_check: {name} failed with exit status {done.returncode}"]))
    print(f"  {time.perf_counter() - began:.0f} s", *lines[-shown:] if shown else (), sep="\n  ", flush=True)


def unpack_system(root: Path) -> None:
    """Unpack the C library, Python and the libraries of its modules for 64-bit Arm into `root`; set nothing up."""
    packages = "python3,libpython3-dev,libgomp1,libstdc++6"
    command = ["debootstrap", "--arch=arm64", "--foreign", "--variant=minbase", f"--include={packages}", "bookworm"]
    partial = root.with_name("partial")  # a run that breaks off leaves no system that looks whole
    shutil.rmtree(partial, ignore_errors=True)
    partial.parent.mkdir(parents=True, exist_ok=True)
    run("unpacking Debian for 64-bit Arm", [*command, str(partial)])
    for archive in (partial / "var" / "cache" / "apt" / "archives").glob("*.deb"):
        subprocess.run(["dpkg", "-x", str(archive), str(partial)], check=True)
    partial.rename(root)


def install(wheel: Path, torch: str, site: Path) -> None:
    """Install the wheel, and torch for 64-bit Arm with what its wheel requires, into a folder."""
    shutil.rmtree(site, ignore_errors=True)
    options = ["--quiet", "--disable-pip-version-check", "--only-binary=:all:", "--python-version", PYTHON, "--no-deps"]
    for glibc in range(17, 29):
        options += ["--platform", f"manylinux_2_{glibc}_aarch64"]
    packages = [f"torch=={torch}", str(wheel), *TORCH_NEEDS]
    command = [sys.executable, "-m", "pip", "install", *options, "--target", str(site), *packages]
    run(f"installing torch {torch} and the wheel", command)


def emulated(root: Path, site: Path) -> list[str]:
    """The command that runs the Python for 64-bit Arm with the packages of `site` and nothing of this machine."""
    qemu = shutil.which("qemu-aarch64-static") or PROGRAMS[2]
    python = str(root / "usr" / "bin" / f"python{PYTHON}")
    return ["env", "-i", f"PYTHONPATH={site}", "PATH=/nowhere", qemu, "-L", str(root), python, "-W", "ignore"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--torch", default="2.9.1", help="a version whose wheel for 64-bit Arm is a CPU build")
    options = parser.parse_args()
    missing = [name for name in PROGRAMS if shutil.which(name) is None]
    if missing:
        sys.exit(f"arm64_check: got no {', '.join(missing)}; expected Debian's packages (first lines of this file)")
    if sys.version_info[:2] != tuple(map(int, PYTHON.split("."))):
        sys.exit(f"arm64_check: got Python {sys.version.split()[0]}; expected {PYTHON}, Debian 12's")
    root, out, site = BUILD / "root", BUILD / "dist", BUILD / "site"
    if not root.exists():
        unpack_system(root)
    wheel = [sys.executable, str(HERE / "wheel.py"), "--arm64", str(root), "--out", str(out)]
    run("cross-compiling the wheel", wheel, shown=1)
    install(next(out.glob("*.whl")), options.torch, site)
    run("smoke test", [*emulated(root, site), str(HERE / "smoke.py"), "--folder", str(site)], shown=1)


if __name__ == "__main__":
    main()
