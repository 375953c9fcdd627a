"""The logs of runs, which other commands read."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

from ...files import read_json
from ...measure.environment import environment
from .expected import expected_losses
from .training import Training

LOG, CHECKPOINT = "log.json", "checkpoint.pt"


class Log(NamedTuple):
    """The log of one run.

    label       N and the other settings that tell the runs of a study apart
    seed        seed of the run
    steps       number of steps done
    finished    whether all steps are done
    seconds     seconds of training, without measurements
    level_name  name of the task's levels
    chance      accuracy of guessing
    history     for each measurement step, loss, seconds and accuracy by level
    folder      folder of the log
    """

    label: str
    seed: int
    steps: int
    finished: bool
    seconds: float
    level_name: str
    chance: float
    history: list[dict[str, Any]]
    folder: Path

    @property
    def accuracy(self) -> dict[int, float]:
        """The accuracy by level at the last measurement."""
        return {int(level): share for level, share in self.history[-1]["accuracy"].items()} if self.history else {}


def log_content(training: Training, label: str) -> dict[str, Any]:
    """The content of log.json."""
    return {
        "command": "train",
        "label": label,
        "environment": environment(training.placement.device.type),
        "run": training.run.to_dict(),
        "processes": training.placement.processes,
        "level_name": training.task.level_name,
        "chance": training.task.chance,
        "tokens_a_step": training.tokens,
        "steps": training.done,
        "finished": training.done >= training.run.length,
        "seconds": training.seconds,
        "history": training.history,
        "losses": training.losses,
        "expected": expected_losses(training.run),
    }


def default_label(passes: int, feedback: str, eviction: str = "hard", settled: float | None = None) -> str:
    """A label such as "N=4 reinject", followed by the settings that are not the default."""
    parts = [f"N={passes}"] + ([feedback] if passes > 1 else [])
    parts += [eviction] if eviction != "hard" else []
    return " ".join(parts + ([f"settled {settled:g}"] if settled is not None else []))


def read_log(folder: Path) -> Log | None:
    """The log in a folder, None where the folder has none.

    Raises:
        ValueError: the log is damaged.
    """
    path = folder / LOG
    if not path.is_file():
        return None
    found = read_json(path)
    names = ("label", "steps", "finished", "seconds", "level_name", "chance", "history")
    try:
        log = Log(seed=int(found["run"]["seed"]), folder=folder, **{name: found[name] for name in names})
        for row in log.history:
            int(row["step"]), float(row["loss"]), {int(level): float(x) for level, x in row["accuracy"].items()}
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ValueError(f"{path}: got a damaged log ({error}); expected one that `train` wrote") from error
    return log


def read_logs(folders: list[Path]) -> list[Log]:
    """The logs with a measurement in and below these folders.

    Raises:
        ValueError: there is no such log, or one is damaged.
    """
    paths = sorted({path.parent for folder in folders for path in folder.rglob(LOG)})
    logs = [log for folder in paths if (log := read_log(folder)) is not None and log.history]
    if not logs:
        raise ValueError(f"folder: got {', '.join(map(str, folders))}; expected folders that `train` has written to")
    return logs
