"""Every CUDA kernel under a tool of compute-sanitizer, as one JSON file.

    python -m benchmarks.gpu_check.sanitize memcheck|racecheck OUT.json [--dry]

77 is the exit status where the tool is not there.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
from pathlib import Path

from .parts import LEFT_OUT
from .writing import write

USUAL = "/usr/local/cuda/bin/compute-sanitizer"
ERROR = 9
"""The exit status of the tool where it finds something."""


def main() -> int:
    """Run it; 0, ERROR or LEFT_OUT."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tool", choices=("memcheck", "racecheck"))
    parser.add_argument("out", type=Path)
    parser.add_argument("--dry", action="store_true", help="without the tool and without kernels")
    options = parser.parse_args()
    found = shutil.which("compute-sanitizer") or shutil.which(USUAL)
    if found is None and not options.dry:
        write(options.out, {"tool": options.tool, "left out": "compute-sanitizer is not here"})
        print("compute-sanitizer is not here")
        return LEFT_OUT
    launches = [sys.executable, "-m", "benchmarks.gpu_checks", "launches", "--of", "cuda"]
    command = [str(found), "--tool", options.tool, "--error-exitcode", str(ERROR), *launches]
    if options.dry:
        command = [sys.executable, "-c", "print('========= ERROR SUMMARY: 0 errors')"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    lines = (done.stdout + done.stderr).splitlines()
    write(options.out, {"tool": options.tool, "status": done.returncode, "lines": lines[:60] + lines[-5:]})
    print("\n".join(lines[-3:]))
    return done.returncode


if __name__ == "__main__":
    sys.exit(main())
