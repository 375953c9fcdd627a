"""Installs a wheel as a user would, and tries it: in a clean environment, outside of the tree, without a compiler.

    python packaging/wheel_check.py dist --torch 2.13.0 --torch 2.14.1

The wheel is the one of the folder for the Python that runs this. For each version of torch: pip install, the smoke
test, the command line, the short form of verify, the user's script run and checked by mypy --strict and by
basedpyright, whose --verifytypes also reads every module of the package. Exit status 1 when one of them fails.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
import venv
from pathlib import Path

HERE = Path(__file__).resolve().parent
CHECKERS = ["mypy==2.4.1", "basedpyright==1.40.2", "typing_extensions"]
STRICT = {"include": ["."], "typeCheckingMode": "strict", "reportAny": "error", "reportUnusedCallResult": "none"}
"""What basedpyright reports: every error, and every value of the script whose type is Any."""


def run(name: str, command: list[str], folder: Path, environment: dict[str, str], shown: int = 1) -> None:
    """Run a step and show its last lines, or all of its output if it fails."""
    start = time.perf_counter()
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    lines = (done.stdout + done.stderr).strip().splitlines()
    if done.returncode:
        sys.exit("\n".join([*lines, f"wheel_check: {name} failed with exit status {done.returncode}"]))
    print(f"  {name}, {time.perf_counter() - start:.0f} s", *lines[-shown:] if shown else (), sep="\n    ", flush=True)


def check(wheel: Path, torch: str, folder: Path) -> None:
    """Run all steps with one version of torch."""
    print(f"{wheel.name} with torch {torch} on Python {sys.version.split()[0]}", flush=True)
    venv.create(folder / "env", with_pip=True, symlinks=True)
    programs = folder / "env" / "bin"
    python = str(programs / "python")
    # pip finds what the machine has been told about indexes; nothing else of the environment reaches the wheel.
    kept = {
        name: value for name, value in os.environ.items() if name.startswith(("PIP_", "HTTP", "http")) or name == "HOME"
    }
    # VIRTUAL_ENV: basedpyright looks for the package there.
    environment = kept | {
        "PATH": str(programs), "PIP_DISABLE_PIP_VERSION_CHECK": "1", "VIRTUAL_ENV": str(folder / "env")
    }  # fmt: skip
    install = [python, "-m", "pip", "install", "--quiet"]
    run("install torch", [*install, f"torch=={torch}"], folder, environment, shown=0)
    run("install the wheel", [*install, f"{wheel.resolve()}[cli]", *CHECKERS], folder, environment, shown=0)
    run("smoke test", [python, str(HERE / "smoke.py")], folder, environment)
    run("version", ["sleepkern", "--version"], folder, environment)
    verify = ["sleepkern", "verify", "--quick", "--backend", "cpu", "--report", "page"]
    run("verify, short form, with its page", verify, folder, environment, shown=4)
    run("user's script", [python, str(HERE / "user_script.py")], folder, environment, shown=0)
    run("mypy --strict", [python, "-m", "mypy", "--strict", str(HERE / "user_script.py")], folder, environment)
    checked = folder / "checked"
    checked.mkdir()
    (checked / "pyrightconfig.json").write_text(json.dumps(STRICT))
    shutil.copy(HERE / "user_script.py", checked)
    run("basedpyright", ["basedpyright"], checked, environment)
    run("basedpyright --verifytypes", ["basedpyright", "--ignoreexternal", "--verifytypes", "sleepkern"], checked,
        environment, shown=3)  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--torch", action="append", help="a version to try; may be repeated")
    options = parser.parse_args()
    tag = "cp{}{}".format(*sys.version_info[:2])
    wheels = list(options.folder.glob(f"sleepkern-*-{tag}-{tag}-*{os.uname().machine}.whl"))
    if len(wheels) != 1:
        sys.exit(f"wheel_check: got {len(wheels)} wheels for {tag} in {options.folder}; expected one, of `make wheel`")
    for version in options.torch or ["2.13.0"]:
        with tempfile.TemporaryDirectory(prefix="sleepkern-wheel-") as folder:
            check(wheels[0], version, Path(folder))


if __name__ == "__main__":
    main()
