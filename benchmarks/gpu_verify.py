"""`sleepkern verify` on a GPU, one process for each rule and type: most of the time is compiling, on one core each.

    python -m benchmarks.gpu_verify FOLDER [--seconds 200]

Writes FOLDER/verify-RULE-TYPE.json and FOLDER/verify.json, which has the worst error of each; 1 when one is red.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from sleepkern.rules import RULES

TYPES = ("bfloat16", "float16", "float32", "tf32")
ALONE = {"OMP_NUM_THREADS": "1"}
"""Of processes side by side: threads of torch's in each would only fight for the cores."""


def verify(rule: str, kind: str, folder: Path, device: str, backend: str, deadline: float) -> dict[str, Any]:
    """One process; its summary."""
    file = folder / f"verify-{rule}-{kind}.json"
    options = ["--dtype", "float32", "--tf32"] if kind == "tf32" else ["--dtype", kind]
    command = [
        sys.executable, "-m", "sleepkern", "verify", "--device", device, "--backend", backend, "--quick",
        "--rule", rule, *options, "--json", str(file),
    ]  # fmt: skip
    begin = time.monotonic()
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=max(deadline - begin, 1), check=False,
            env=os.environ | ALONE,
        )  # fmt: skip
        end = f"exit {done.returncode}"
        if not file.exists():
            end += ": " + (done.stdout + done.stderr)[-400:]
    except subprocess.TimeoutExpired:
        end = "out of time"
    rows = json.loads(file.read_text())["rows"] if file.exists() else []
    compared = [row for row in rows if row["refused"] is None]
    red = [f"{row['op']} {row['shape']} {row['variant']}: {row['worst']}" for row in compared if not row["passed"]]
    worst = max((row["worst"] for row in compared if isinstance(row["worst"], float)), default=None)
    seconds = round(time.monotonic() - begin)
    return {"rule": rule, "type": kind, "end": end, "compared": len(compared), "worst": worst, "red": red,
            "seconds": seconds}  # fmt: skip


def main() -> int:
    """All of them, as many at a time as there are cores."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--seconds", type=float, default=200)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--backend", default="triton")
    parser.add_argument("--only", action="append", metavar="RULE-TYPE", help="such as kda-bfloat16  [default: all]")
    options = parser.parse_args()
    options.folder.mkdir(parents=True, exist_ok=True)
    deadline = time.monotonic() + options.seconds
    wanted = [
        (rule, kind) for kind in TYPES for rule in RULES if f"{rule}-{kind}" in (options.only or [f"{rule}-{kind}"])
    ]
    jobs = [(*one, options.folder, options.device, options.backend, deadline) for one in wanted]
    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        found = list(pool.map(lambda job: verify(*job), jobs))
    for one in found:
        print(f"{one['rule']} {one['type']}: {one['compared']} compared, worst {one['worst']}, {one['end']}")
        for line in one["red"]:
            print(f"  red: {line}")
    (options.folder / "verify.json").write_text(json.dumps({"command": "gpu_verify", "runs": found}, indent=1) + "\n")
    return int(any(one["red"] or not one["compared"] or one["end"] != "exit 0" for one in found))


if __name__ == "__main__":
    sys.exit(main())
