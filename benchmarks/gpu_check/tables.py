"""The candidates of benchmarks/candidates.json timed, and the fastest plans, as the file that `use_plans` reads.

    python -m benchmarks.gpu_check.tables OUT.json [--seconds 70] [--dry]

First every candidate runs once, in processes side by side, so that all is compiled; then `tune` times them, one rule
and number of heads after the other, in order of worth. OUT.json is replaced after each of them.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

if "--dry" in sys.argv:
    os.environ["TRITON_INTERPRET"] = "1"  # before Triton is imported

import torch

from sleepkern.backends import triton as backend
from sleepkern.backends.triton.plan import table_rows
from sleepkern.backends.triton.plan_table import TABLE, Key, Tile, TilePlan
from sleepkern.backends.triton.ptxas import capability_of_plans
from sleepkern.measure.candidates import PlanCandidate, first_plan, of_key, read_candidates
from sleepkern.measure.environment import environment
from sleepkern.measure.tune import PlanTrial, tune
from sleepkern.rules import GATED_DELTA_RULE, KDA, Rule
from sleepkern.testing import Shape, call, make_inputs

from .writing import write

CANDIDATES = Path(__file__).resolve().parents[1] / "candidates.json"
WARM_SHARE = 0.6
"""The share of the seconds that compiling may take."""
SECONDS = 0.05
"""How long a candidate is timed; its turns are at least three."""


class Subject(NamedTuple):
    """The calls whose plans are looked for."""

    rule: Rule
    shape: Shape
    dtype: torch.dtype


def candidates(dry: bool) -> list[PlanCandidate]:
    """Those of the file, or one for the rehearsal."""
    if not dry:
        return read_candidates(CANDIDATES)
    key = Key(0, "forward", "ieee", False, 64)
    return [PlanCandidate("state_pass", "tile", key, 16, Tile(64, 16, 2, 1), 1.0, "a rehearsal's", heads=1, tokens=20)]


def subjects(listed: list[PlanCandidate], dry: bool) -> list[Subject]:
    """The calls that the candidates are for, in the order of the file."""
    if dry:
        return [Subject(GATED_DELTA_RULE, Shape(T=20, H=1, HV=1, K=16, V=16), torch.float32)]
    found = {(one.key.channel, one.key.width, one.heads, one.tokens): None for one in listed}
    return [
        Subject(KDA if channel else GATED_DELTA_RULE, Shape(T=T, H=heads, HV=heads, K=K, V=K), torch.bfloat16)
        for channel, K, heads, T in found
    ]


def run_once(one: PlanCandidate, subject: Subject, listed: list[PlanCandidate], device: str) -> None:
    """A call, and its gradients where the plan is a backward's, by a candidate's plan."""
    here = [c for c in of_key(listed, one.key, one.heads) if c.chunk == one.chunk]
    TABLE[one.key] = one.plan(first_plan(here, one.key, one.chunk))
    inputs = make_inputs(subject.rule, subject.shape, subject.dtype, device=device)
    leaves = {n: t.requires_grad_() for n, t in inputs.items() if t is not None and n != "cu_seqlens"}
    o, state = call(subject.rule, {**inputs, **leaves}, backend.NAME)
    if one.key.direction == "backward":
        assert state is not None
        torch.autograd.grad(o.float().sum() + state.sum(), list(leaves.values()))


def warm(jobs: int, dry: bool, seconds: float) -> list[str]:
    """Run all candidates once in `jobs` processes; what is said of those that do not run."""

    def slice_of(i: int) -> str:
        words = [
            sys.executable,
            "-m",
            "benchmarks.gpu_check.tables",
            "-",
            "--warm",
            str(i),
            str(jobs),
            *["--dry"] * dry,
        ]
        try:
            return subprocess.run(words, capture_output=True, text=True, check=False, timeout=seconds).stdout
        except subprocess.TimeoutExpired:
            return f"processes {i}: out of time"

    with ThreadPoolExecutor(jobs) as pool:
        return [line for said in pool.map(slice_of, range(jobs)) for line in said.splitlines()]


def warm_slice(i: int, jobs: int, dry: bool, device: str) -> None:
    """Run every jobs-th candidate from the i-th on; a line on each that does not run."""
    here = 0 if dry else capability_of_plans(torch.cuda.get_device_capability())
    listed = [one for one in candidates(dry) if one.key.capability == here]
    for one in listed[i::jobs]:
        wanted = [s for s in subjects(listed, dry) if (s.rule.gate == "channel") == one.key.channel]
        for subject in (s for s in wanted if s.shape.HV == one.heads):
            try:
                run_once(one, subject, listed, device)
            except Exception as error:  # the next candidate is still worth compiling
                print(f"{one.stage} {one.tile}: {type(error).__name__}: {str(error)[:200]}", flush=True)


def trial_row(trial: PlanTrial) -> dict[str, Any]:
    """A trial, ready for JSON."""
    us = None if trial.seconds is None else round(trial.seconds * 1e6, 2)
    return {"key": trial.key._asdict(), "stage": trial.stage, "us": us, "note": trial.note, "plan": asdict(trial.plan)}


def main() -> int:
    """Warm up, then time; 1 where no plan was found."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--seconds", type=float, default=70)
    parser.add_argument("--dry", action="store_true", help="under Triton's interpreter, one candidate")
    parser.add_argument("--warm", type=int, nargs=2, metavar=("I", "OF"), help="run a slice of the candidates once")
    options = parser.parse_args()
    begin, device = time.monotonic(), "cpu" if options.dry else "cuda"
    if options.warm:
        warm_slice(*options.warm, options.dry, device)
        return 0
    found: dict[str, Any] = {"command": "tune", "environment": environment(device), "plans": [], "trials": []}
    write(options.out, found)
    jobs = 1 if options.dry else len(os.sched_getaffinity(0))
    found["not run when warmed"] = warm(jobs, options.dry, WARM_SHARE * options.seconds)
    plans: dict[Key, TilePlan] = {}
    listed = candidates(options.dry)
    for subject in subjects(listed, options.dry):
        if time.monotonic() - begin > options.seconds:
            found.setdefault("left out", []).append(f"{subject.rule.name}, {subject.shape.HV} heads: out of time")
            continue
        best, trials = tune(*subject, device, seconds=SECONDS, candidates=listed)
        plans |= {key: plan for key, plan in best.items() if key not in plans}  # the first subject of a key decides
        found["plans"] = table_rows(plans)
        found["trials"] += [trial_row(trial) | {"heads": subject.shape.HV} for trial in trials]
        print(f"{subject.rule.name}, {subject.shape.HV} heads: {len(trials)} trials", flush=True)
        write(options.out, found)
    return int(not plans)


if __name__ == "__main__":
    sys.exit(main())
