"""What bounds the twelve slowest kernels: stalls, achieved bytes and products, by Nsight Compute (ncu).

    python -m benchmarks.gpu_check.profile OUT.json [--seconds 32] [--dry]

torch's profiler times the kernels of the calls first, which names the slowest; ncu then reads the counters of one
launch of each. Where ncu is not there, or may not read counters, the file has the times and the reason. It is small
enough to be kept, so that work on a kernel needs no GPU to know where its time goes.
"""

from __future__ import annotations

import argparse
import csv
import io
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity

from sleepkern.measure.cases import run
from sleepkern.measure.environment import environment
from sleepkern.nn import SleepLM
from sleepkern.sleep import sleep_blocks

from .times import CASES, name_of, tiny
from .writing import write

MOST = 12
CHOSEN = ("forward", "train", "decode", "ingest")
"""The first cases of times.py of each of these are profiled, for each rule."""
USUAL = "/usr/local/cuda/bin/ncu"
STALLS = (
    "long_scoreboard", "short_scoreboard", "barrier", "mio_throttle", "lg_throttle", "math_pipe_throttle", "wait",
    "membar", "gmma", "dispatch_stall", "no_instruction", "not_selected",
)  # fmt: skip
METRICS = (
    "gpu__time_duration.sum", "dram__bytes_read.sum", "dram__bytes_write.sum",
    "dram__throughput.avg.pct_of_peak_sustained_elapsed", "lts__t_sector_hit_rate.pct",
    "sm__pipe_tensor_cycles_active.avg.pct_of_peak_sustained_elapsed", "sm__inst_executed_pipe_tensor.sum",
    "sm__warps_active.avg.pct_of_peak_sustained_active", "smsp__issue_active.avg.pct_of_peak_sustained_active",
    "sm__throughput.avg.pct_of_peak_sustained_elapsed", "smsp__inst_executed.sum",
    "l1tex__data_bank_conflicts_pipe_lsu.sum", "launch__registers_per_thread", "launch__occupancy_per_register_count",
    "launch__occupancy_per_shared_mem_size", "launch__grid_size", "launch__block_size",
    *(f"smsp__average_warps_issue_stalled_{stall}_per_issue_active.ratio" for stall in STALLS),
)  # fmt: skip


def calls(dry: bool) -> Iterator[tuple[str, Callable[[], Any]]]:
    """The first case of each kind and rule, and a sleep of the sizes of Rule 110."""
    device = "cpu" if dry else "cuda"
    seen = set()
    for case in CASES:
        if case.op in CHOSEN and (case.op, case.rule) not in seen:
            seen.add((case.op, case.rule))
            chosen = tiny(case) if dry else case
            inputs = chosen.inputs(device=device)
            yield name_of(case), lambda chosen=chosen, inputs=inputs: run(chosen, inputs)
    width, tokens = (32, 5) if dry else (256, 24)
    model = SleepLM(2, width=width, heads=1 if dry else 4, blocks=2 if dry else 4, window=tokens)
    lm = model.to(device, torch.float32 if dry else torch.bfloat16)
    h = torch.randn(16, tokens, width, device=device).to(next(lm.parameters()).dtype)

    def sleep() -> Any:
        with torch.no_grad():
            return sleep_blocks(h, lm.blocks(), passes=4)

    yield "sleep_blocks, Rule 110, B = 16, N = 4", sleep


def timed(dry: bool) -> list[dict[str, Any]]:
    """Kernels by the time of one launch, the slowest first; without a GPU the operators of the CPU take their place."""
    kind = ProfilerActivity.CPU if dry else ProfilerActivity.CUDA
    rows: dict[str, dict[str, Any]] = {}
    for name, call in calls(dry):
        call()
        with torch.profiler.profile(activities=[kind]) as profile:
            call()
        for event in profile.key_averages():
            total = event.cpu_time_total if dry else event.device_time_total
            row = {"kernel": event.key, "call": name, "us": round(total / max(event.count, 1), 2), "count": event.count}
            if row["us"] > rows.get(event.key, {"us": 0.0})["us"]:
                rows[event.key] = row
    return sorted(rows.values(), key=lambda row: -row["us"])


def counters(text: str) -> list[dict[str, Any]]:
    """The launches in what `ncu --csv --page raw` prints: a line of names, a line of units, a line a launch."""
    begin = text.find('"ID"')
    if begin < 0:
        return []
    rows = list(csv.DictReader(io.StringIO(text[begin:])))
    units, found = rows[0], []
    for row in rows[1:]:
        values = {name: _number(row[name]) for name in METRICS if row.get(name)}
        used = {name: units[name] for name in values if units.get(name)}
        found.append({"kernel": row["Kernel Name"], "values": values, "units": used})
    return found


def _number(text: str) -> float | str:
    try:
        return float(text.replace(",", ""))
    except ValueError:
        return text


def read_counters(ncu: str, names: list[str], seconds: float) -> tuple[list[dict[str, Any]], str]:
    """Counters of one launch each, and what went wrong."""
    pattern = "|".join(sorted({re.escape(re.split(r"[<(]", name)[0].split("::")[-1].split()[-1]) for name in names}))
    command = [
        ncu, "--csv", "--page", "raw", "--print-units", "base", "--clock-control", "none",
        "--profile-from-start", "off", "--kernel-name", f"regex:{pattern}", "--metrics", ",".join(METRICS),
        sys.executable, "-m", "benchmarks.gpu_check.profile", "-", "--calls",
    ]  # fmt: skip
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=seconds)
    except subprocess.TimeoutExpired as error:
        said = error.stdout.decode() if isinstance(error.stdout, bytes) else error.stdout or ""
        return counters(said), "out of time"
    found = counters(done.stdout)
    return found, "" if found else (done.stdout + done.stderr)[-600:]


def main() -> int:
    """Times, then counters; 1 where there is neither."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--seconds", type=float, default=32)
    parser.add_argument("--dry", action="store_true", help="on the CPU, without ncu")
    parser.add_argument("--calls", action="store_true", help="make the calls for ncu, in this process")
    options = parser.parse_args()
    if options.calls:
        for _, call in calls(dry=False):
            call()
            torch.cuda.synchronize()
            torch.cuda.profiler.start()
            call()
            torch.cuda.synchronize()
            torch.cuda.profiler.stop()
        return 0
    found: dict[str, Any] = {"environment": environment("cpu" if options.dry else "cuda"), "unit": "us"}
    found["times"] = timed(options.dry)[: 2 * MOST]
    write(options.out, found)
    ncu = shutil.which("ncu") or shutil.which(USUAL)
    if options.dry or ncu is None:
        found["counters"], found["reason"] = [], "a rehearsal" if options.dry else "ncu is not here"
    else:
        slowest = [row["kernel"] for row in found["times"] if not row["kernel"].startswith("Mem")][:MOST]
        found["counters"], found["reason"] = read_counters(ncu, slowest, 0.7 * options.seconds)
    write(options.out, found)
    print(f"{len(found['times'])} kernels timed, counters of {len(found['counters'])} launches {found['reason'][-80:]}")
    return int(not found["times"])


if __name__ == "__main__":
    sys.exit(main())
