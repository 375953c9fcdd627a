"""The cost of sleep in training: seconds and memory of a step, by passes and by the settings of a session.

`python -m sleepkern.experiments.training.costs '{"passes": 4}'` measures one setting in a process of its own and
prints JSON.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import torch

from ... import settings
from ...measure.timing import Candidate, ratio, time_in_turns
from .checkpoints import read_checkpoint
from .configurations import Configuration, configuration
from .logs import CHECKPOINT
from .training import Run, Training

STEPS = 5
SETTINGS: tuple[dict[str, Any], ...] = (
    *({"passes": n, "checkpoint": c} for n in (1, 2, 4, 8) for c in (False, True)),
    {"passes": 4, "eviction": "sliding"},
    {"passes": 4, "feedback": "replay"},
    {"passes": 8, "settled": 0.3},
)
THRESHOLDS = (0.3, 0.1, 0.03, 0.01)
MEMORY_PROBLEMS = 256
"""Problems a step in measurements of memory: activations should outweigh the process."""


def measure_step(options: dict[str, Any]) -> dict[str, Any]:
    """The median seconds of a step of mini-Depo on one thread, and the peak memory that the step adds."""
    torch.set_num_threads(1)
    training = Training(Run(replace(configuration("depo", "mini"), batch=MEMORY_PROBLEMS), **options))
    training.step()  # optimisers make their state, libraries are loaded
    before = _status("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak to the resident memory
    times = []
    for _ in range(STEPS):
        began = time.perf_counter()
        training.step()
        times.append(time.perf_counter() - began)
    return {**options, "seconds": statistics.median(times), "bytes": _status("VmHWM") - before}


def step_costs(progress: Callable[[str, int, int], None] | None = None) -> list[dict[str, Any]]:
    """`measure_step` for each of SETTINGS, each in a process; only Linux reports the peak memory of a process."""
    rows = []
    for done, options in enumerate(SETTINGS):
        if progress is not None:
            progress(f"a step with {options}", done, len(SETTINGS))
        environment = os.environ | {
            "OMP_NUM_THREADS": "1",
            "MALLOC_MMAP_THRESHOLD_": "65536",
        }  # freed pages go back at once
        command = [sys.executable, "-m", "sleepkern.experiments.training.costs", json.dumps(options)]
        found = subprocess.run(command, env=environment, check=True, stdout=subprocess.PIPE, text=True).stdout
        rows.append(json.loads(found.splitlines()[-1]))
    return rows


def throughput(setting: Configuration, passes: int = 4, seconds: float = 20.0) -> dict[str, Any]:
    """Tokens a second in training on one thread, with the best backend and with the readable chunk form."""

    def candidate(backend: str | None) -> tuple[Training, Candidate]:
        training = Training(Run(setting, passes))

        def step() -> None:
            with settings.backend(backend):
                training.step()

        return training, Candidate([step])

    training, ours = candidate(None)
    _, chunked = candidate("chunked")
    found = time_in_turns({"ours": ours, "chunked": chunked}, seconds=seconds)
    rates = {name: training.tokens / timing.median for name, timing in found.items()}
    return {"passes": passes, "tokens_per_second": rates, "faster": ratio(found["ours"], found["chunked"])}


def sweep_tol(folder: Path) -> list[dict[str, Any]]:
    """Passes done and accuracy of a trained mini-Depo for several values of `tol`.

    Raises:
        ValueError: the folder has no checkpoint, or one that is damaged or of another model.
    """
    if not (folder / CHECKPOINT).is_file():
        raise ValueError(f"trained: got {folder}; expected a folder that `train depo` has written to")
    told = read_checkpoint(folder / CHECKPOINT)["run"]
    options = {field.name: told[field.name] for field in fields(Run) if field.name in told}
    training = Training(Run(**{**options, "configuration": configuration("depo", "mini")}))
    training.load(folder / CHECKPOINT)
    rows = []
    for threshold in (None, *THRESHOLDS):
        training.sleep_module.tol = threshold
        batch = training.task.batch(training.run.configuration.problems, 0, split="test")
        with torch.no_grad():
            reports = training.sleep_module.session().ingest(batch.context).reports
        passes_done = statistics.fmean(len(report.changes) for report in reports)
        rows.append({"settled": threshold, "passes_made": passes_done, "accuracy": training.measure()})
    return rows


def _status(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))


if __name__ == "__main__":
    print(json.dumps(measure_step(json.loads(sys.argv[1]))))
