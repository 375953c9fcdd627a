"""Run the parts of parts.py one group after the other, each under its limit, and write what comes as it comes.

    python -m benchmarks.gpu_check OUT [--dry] [--only PART ...] [--wheels FOLDER] [--work FOLDER]

OUT/gpu-check.json has every part's end and results and is replaced after each part; OUT/plans.json is the table of
plans to commit, OUT/log.txt what the parts printed last. Time that a part leaves over is the next one's. A red part
does not hide the others, and 1 is the exit status where one is red. --dry rehearses the call without a GPU, on tiny
shapes.

It needs Python alone: torch, Triton and the package itself are the parts' own affair.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .parts import LEFT_OUT, MARGIN, PARTS, TOTAL, Part, groups, total

ROOT = Path(__file__).resolve().parents[2]
TAIL = 3000
"""Characters of a part's log that the summary keeps."""
REHEARSED = 600
"""Seconds that a rehearsed part may take beyond its limit: it may run beside other work, as in the tests."""
LARGEST = 4 << 20
"""Bytes of a part's file that the summary takes in."""


@dataclass
class Running:
    """A part that runs, or has run; seconds and end are set when it has."""

    part: Part
    process: subprocess.Popen[bytes] | None
    log: Path
    begin: float
    allowed: float
    seconds: float = 0.0
    end: str = ""


class Call:
    """One call: folders, clock, and the results so far."""

    def __init__(self, out: Path, work: Path, dry: bool, wheels: Path | None) -> None:
        self.out, self.work, self.dry, self.wheels = out, work, dry, wheels
        self.begin = time.monotonic()
        self.results: dict[str, Any] = {}
        for folder in (out, work):
            folder.mkdir(parents=True, exist_ok=True)

    @property
    def elapsed(self) -> float:
        """Seconds since the call began."""
        return time.monotonic() - self.begin

    def environment(self) -> dict[str, str]:
        """Variables of the parts: shared caches of compiled kernels, the peers, one thread a process.

        flash-linear-attention hands calls on to FlashQLA where that is installed; here it keeps them, or both columns
        would be the same kernels.
        """
        paths = [str(self.work / "site"), str(ROOT), os.environ.get("PYTHONPATH", "")]
        return os.environ | {
            "PYTHONPATH": os.pathsep.join(filter(None, paths)), "PYTHONUNBUFFERED": "1", "OMP_NUM_THREADS": "1",
            "TRITON_CACHE_DIR": str(self.work / "triton"), "TILELANG_CACHE_DIR": str(self.work / "tilelang"),
            "TVM_FFI_CACHE_DIR": str(self.work / "tvm"), "FLA_FLASH_QLA": "0",
        }  # fmt: skip

    def start(self, part: Part, allowed: float) -> Running:
        """Start a part; () as its command means that the driver does it."""
        log = self.work / f"{part.name}.log"
        words = part.dry if self.dry else part.command
        if part.file:
            (self.work / part.file).unlink(missing_ok=True)
        if not words:
            running = Running(part, None, log, self.elapsed, allowed)
            running.end = install_peers(self.wheels, self.work / "site", log)
            running.seconds = self.elapsed - running.begin
            return running
        names = {"python": sys.executable, "work": str(self.work), "seconds": str(max(1, int(allowed) - MARGIN))}
        with log.open("wb") as file:
            process = subprocess.Popen(
                [word.format(**names) for word in words], stdout=file, stderr=subprocess.STDOUT, cwd=ROOT,
                env=self.environment(), start_new_session=True,
            )  # fmt: skip
        return Running(part, process, log, self.elapsed, allowed)

    def wait(self, started: list[Running]) -> None:
        """Until each has ended or is over its limit; writes the summary whenever one ends."""
        waiting = list(started)
        while waiting:
            for one in list(waiting):
                if self.ended(one):
                    waiting.remove(one)
                    self.note(one)
            time.sleep(0.05)

    def ended(self, one: Running) -> bool:
        """Tells whether a part is over; ends it where it has taken too long."""
        if one.process is None:
            return True
        status = one.process.poll()
        one.seconds = self.elapsed - one.begin
        if status is None and one.seconds < one.allowed:
            return False
        if status is None:
            os.killpg(one.process.pid, signal.SIGKILL)
            one.process.wait()
            one.end = "out of time"
        else:
            one.end = {0: "ok", LEFT_OUT: "left out"}.get(status, f"red: exit {status}")
        return True

    def note(self, one: Running) -> None:
        """Print a line on a part, and write all results so far."""
        part = one.part
        said = one.log.read_text(errors="replace") if one.log.exists() else ""
        row: dict[str, Any] = {"end": one.end, "seconds": round(one.seconds, 1), "allowed": round(one.allowed)}
        row |= {"limit": part.limit, "what": part.what, "worth": part.worth, "log": said[-TAIL:]}
        file = self.work / part.file if part.file else None
        if file is not None and file.exists() and file.stat().st_size <= LARGEST:
            try:
                row["result"] = json.loads(file.read_text())
            except ValueError:
                row["end"] = one.end = f"red: {part.file} is not JSON"
        self.results[part.name] = row
        last = said.strip().splitlines()[-1][:90] if said.strip() else ""
        print(
            f"{self.elapsed:6.1f} s  {part.name:12} {one.end:14} {one.seconds:6.1f} of {one.allowed:.0f} s  {last}",
            flush=True,
        )
        self.write()

    def write(self) -> None:
        """The summary, the log and the plans, each by renaming a finished file into its place."""
        content = {"command": "gpu-check", "dry": self.dry, "seconds": round(self.elapsed, 1), "parts": self.results}
        replace(self.out / "gpu-check.json", json.dumps(content, indent=1) + "\n")
        log = "".join(f"== {name}: {row['end']}\n{row['log']}\n" for name, row in self.results.items())
        replace(self.out / "log.txt", log)
        plans = self.work / "plans.json"
        if plans.exists():
            replace(self.out / "plans.json", plans.read_text())


def replace(path: Path, text: str) -> None:
    """Write a file so that a reader sees the earlier one or this one."""
    unfinished = path.with_name(path.name + ".part")
    unfinished.write_text(text)
    unfinished.replace(path)


def install_peers(wheels: Path | None, site: Path, log: Path) -> str:
    """Unpack archives and install wheels of a folder without a network; how it ended."""
    if wheels is None:
        log.write_text("WHEELS names no folder: peers are those that Python finds\n")
        return "left out"
    try:
        for archive in sorted(wheels.glob("*.tar.*")):
            with tarfile.open(archive) as opened:
                opened.extractall(site, filter="data")
        files = [str(path) for path in sorted(wheels.glob("*.whl"))]
        done = subprocess.run(
            [sys.executable, "-m", "pip", "install", "--quiet", "--no-index", "--find-links", str(wheels), "--no-deps",
             "--no-compile", "--upgrade", "--target", str(site), *files],
            capture_output=True, text=True, check=False, timeout=60,
        ) if files else None  # fmt: skip
    except (OSError, tarfile.TarError, subprocess.TimeoutExpired) as error:
        log.write_text(f"{type(error).__name__}: {error}\n")
        return "red"
    log.write_text("" if done is None else done.stdout + done.stderr)
    return "ok" if done is None or done.returncode == 0 else "red"


def summary(call: Call) -> str:
    """The table at the end."""
    lines = [f"{'part':13}{'worth':>6}{'limit':>7}{'took':>8}  end"]
    for name, row in call.results.items():
        lines.append(f"{name:13}{row['worth']:>6}{row['limit']:>5} s{row['seconds']:>6} s  {row['end']}")
    return "\n".join([*lines, f"{call.elapsed:.0f} s of {TOTAL} s; the limits are {total()} s together"])


def main() -> int:
    """All parts, or some; 1 where one is red."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--dry", action="store_true")
    parser.add_argument("--only", nargs="*", choices=[part.name for part in PARTS])
    parser.add_argument("--wheels", type=Path)
    parser.add_argument("--work", type=Path, default=ROOT / "build" / "gpu-check")
    options = parser.parse_args()
    chosen = tuple(part for part in PARTS if not options.only or part.name in options.only)
    shutil.rmtree(options.work / "site", ignore_errors=True)
    call = Call(options.out.resolve(), options.work.resolve(), options.dry, options.wheels)
    planned = TOTAL - total(chosen) if options.only else 0
    for group in groups(chosen):
        planned += max(part.limit for part in group)
        allowed = max(1.0, planned - call.elapsed) + (REHEARSED if options.dry else 0)
        call.wait([call.start(part, allowed) for part in group])
    print(summary(call))
    return int(any(row["end"] not in ("ok", "left out") for row in call.results.values()))


if __name__ == "__main__":
    sys.exit(main())
