"""A study: trainings of one configuration with several ways to sleep and several seeds, side by side."""

from __future__ import annotations

import os
import subprocess
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

from .configurations import configuration
from .estimate import compute_matched_steps
from .logs import Log, read_log

Watch = Callable[["list[Log | None]"], None]


@dataclass(frozen=True)
class StudyRow:
    """One way to sleep. like: N of the row whose compute this row gets, by more steps; None: the steps of the study."""

    name: str
    passes: int
    feedback: str = "reinject"
    like: int | None = None
    eviction: str = "hard"


N1, N4 = StudyRow("N=1", 1), StudyRow("N=4", 4)
ROWS = (
    N1,
    N4,
    StudyRow("N=4 replay only", 4, "replay"),
    StudyRow("N=2", 2),
    StudyRow("N=1, compute of N=4", 1, like=4),
    StudyRow("N=4 raw", 4, "raw"),
    StudyRow("N=1 sliding", 1, eviction="sliding"),
    StudyRow("N=4 sliding", 4, eviction="sliding"),
)
WANTED_GAP = 0.15


@dataclass(frozen=True)
class Study:
    """Runs of a configuration (task, size) for rows x seeds, in a folder; steps: default those of the configuration."""

    folder: Path
    rows: tuple[StudyRow, ...] = ROWS
    seeds: tuple[int, ...] = (0, 1, 2)
    task: str = "depo"
    size: str = "mini"
    steps: int | None = None

    def jobs(self) -> list[tuple[StudyRow, int]]:
        """All runs row by row, so that an interrupted study has complete rows."""
        return [(row, seed) for row in self.rows for seed in self.seeds]

    def steps_of(self, row: StudyRow) -> int:
        """The number of steps of a row."""
        chosen = configuration(self.task, self.size)
        steps = chosen.steps if self.steps is None else self.steps
        return steps if row.like is None else compute_matched_steps(chosen, row.like, steps)

    def folder_of(self, row: StudyRow, seed: int) -> Path:
        """The folder of one run."""
        name = "".join(c if c.isalnum() else "-" for c in row.name.replace("=", "").replace(",", ""))
        return self.folder / name / f"seed-{seed}"

    def log(self, row: StudyRow, seed: int) -> Log | None:
        """The log of one run so far; None also for a damaged log, which the run writes again from its checkpoint."""
        try:
            return read_log(self.folder_of(row, seed))
        except ValueError:
            return None

    def run(
        self, trainer: Sequence[str], processes: int = 2, watch: Watch | None = None, interval: float = 2.0
    ) -> None:
        """Train the unfinished runs, `processes` at a time, with one thread each.

        Args:
            trainer: the command of a training; the task and the options of `sleepkern train` are appended.
            processes: trainings side by side.
            watch: called with the logs every `interval` seconds.
            interval: seconds between two looks at the trainings.

        Raises:
            RuntimeError: a training failed; its output is in its folder.
        """
        stop = threading.Event()
        with ThreadPoolExecutor(processes) as pool:
            futures = [pool.submit(self._train, trainer, row, seed, stop) for row, seed in self.jobs()]
            try:
                while not all(future.done() for future in futures):
                    if watch is not None:
                        watch([self.log(*job) for job in self.jobs()])
                    stop.wait(interval)
                    for future in futures:
                        if future.done():
                            future.result()
            except BaseException:
                stop.set()
                raise

    def _train(self, trainer: Sequence[str], row: StudyRow, seed: int, stop: threading.Event) -> None:
        done, folder = self.log(row, seed), self.folder_of(row, seed)
        if stop.is_set() or (done is not None and done.finished and done.steps == self.steps_of(row)):
            return
        folder.mkdir(parents=True, exist_ok=True)
        options = {
            "size": self.size, "passes": row.passes, "feedback": row.feedback, "eviction": row.eviction,
            "steps": self.steps_of(row), "seed": seed, "out": folder, "label": row.name, "threads": 1,
        }  # fmt: skip
        command = [*trainer, self.task, "--resume"]
        command += [part for name, value in options.items() for part in (f"--{name}", str(value))]
        with open(folder / "output.txt", "w") as output:
            child = subprocess.Popen(
                command, stdout=output, stderr=output, env=os.environ | {"OMP_NUM_THREADS": "1"}
            )  # fmt: skip
            while child.poll() is None:
                if stop.wait(0.2):
                    child.terminate()
        if child.returncode and not stop.is_set():
            raise RuntimeError(f"{row.name}, seed {seed}: got exit status {child.returncode}; see {folder}/output.txt")


def share_of_hard(log: Log) -> float:
    """Mean accuracy of all levels but the easiest."""
    return fmean(list(log.accuracy.values())[1:])


def gaps(study: Study) -> dict[int, float]:
    """Gives by seed the accuracy of N=4 minus that of N=1 over the harder levels, after the same number of steps."""
    pairs = {seed: (study.log(N4, seed), study.log(N1, seed)) for seed in study.seeds}
    return {seed: share_of_hard(a) - share_of_hard(b) for seed, (a, b) in pairs.items() if a and b}


def summary(study: Study) -> dict[str, Any]:
    """The results of all rows and seeds, as JSON."""
    rows = [_described(study, row, seed) for row in study.rows for seed in study.seeds]
    found = gaps(study)
    return {
        "command": "study",
        "task": study.task,
        "size": study.size,
        "rows": [row for row in rows if row is not None],
        "gap_of_N4_to_N1_at_equal_steps": {str(seed): gap for seed, gap in found.items()},
        "wanted_gap": WANTED_GAP,
        "passed": len(found) == len(study.seeds) and min(found.values()) > WANTED_GAP,
    }


def _described(study: Study, row: StudyRow, seed: int) -> dict[str, Any] | None:
    log = study.log(row, seed)
    if log is None or not log.history:
        return None
    return {
        "row": row.name, "seed": seed, "steps": log.steps, "finished": log.finished, "seconds": round(log.seconds, 1),
        "chance": log.chance, "loss": log.history[-1]["loss"], "accuracy": log.accuracy, "history": log.history,
    }  # fmt: skip


def markdown(study: Study) -> str:
    """A table of every row and seed, with the mean over seeds."""
    logs = {row: [log for seed in study.seeds if (log := study.log(row, seed)) and log.history] for row in study.rows}
    every = [log for found in logs.values() for log in found]
    if not every:
        return "no measurement yet\n"
    levels, name = list(every[0].accuracy), every[0].level_name
    head = ["row", "seed", *(f"{name} {level}" for level in levels), "steps", "seconds"]
    lines = [head, ["---"] * len(head)]
    for row, found in logs.items():
        for log in found:
            lines.append(
                [row.name, str(log.seed), *_shares(log.accuracy.values()), str(log.steps), f"{log.seconds:.0f}"]
            )
        if len(found) > 1:
            means = [fmean(log.accuracy[level] for log in found) for level in levels]
            lines.append([f"**{row.name}**", "mean", *_shares(means), "", f"{fmean(log.seconds for log in found):.0f}"])
    lines.append(["chance", "", *_shares([every[0].chance] * len(levels)), "", ""])
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


def _shares(shares: Any) -> list[str]:
    return [f"{share:.3f}" for share in shares]


def seeds_of(text: str) -> tuple[int, ...]:
    """The seeds in a text such as "0,1,2".

    Raises:
        ValueError: the text is no such list, or a number is too large.
    """
    parts: Sequence[str] = text.split(",")
    if not all(part.strip().isdigit() for part in parts):
        raise ValueError(f"seeds: got {text!r}; expected numbers with commas between them")
    found = tuple(int(part) for part in parts)
    if max(found) >= 2**63:
        raise ValueError(f"seeds: got {text!r}; expected numbers below 2**63")
    return found
