"""What a training is expected to lose, from a run on a CPU of the same configuration with fewer problems a step.

A large training runs elsewhere and for long. Its first losses say whether it runs as it should: with more problems a
step they have to be near those of the small run, or below. `losses.json` has the small runs, one a configuration.
"""

from __future__ import annotations

from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any

from ...files import read_json, write_text
from .training import Run

FILE = Path(__file__).with_name("losses.json")
FAR = 1.25
"""A loss above so many times the small run's says that something is wrong; below it, more problems a step help."""


def expected_losses(run: Run) -> dict[str, Any] | None:
    """The small run of a configuration, with its losses by step: batch, losses. None where there is none.

    The settings of a run have to be the same, but for the batch, the seed and the number of steps.
    """
    wanted = _key(run)
    found: dict[str, Any] | None = next((row for row in _rows() if row["key"] == wanted), None)
    return None if found is None else {"batch": found["batch"], "losses": found["losses"]}


def compare(losses: dict[int, float], expected: dict[str, Any]) -> list[tuple[int, float, float, bool]]:
    """(step, loss, loss of the small run, whether it is far above) of each step that both have."""
    small = {int(step): loss for step, loss in expected["losses"].items()}
    return [(step, loss, small[step], loss > FAR * small[step]) for step, loss in losses.items() if step in small]


def store(log: dict[str, Any], path: Path = FILE) -> None:
    """Put the losses of a finished log.json in the place of its configuration's row."""
    import json

    key = _settings(log["run"])
    rows = [row for row in (read_json(path) if path.is_file() else []) if row["key"] != key]
    row = {
        "key": key,
        "batch": log["run"]["configuration"]["batch"],
        "seed": log["run"]["seed"],
        "date": log["environment"]["date"][:10],
        "cpu": log["environment"]["cpu"],
        "seconds": round(log["seconds"]),
        "losses": {step: round(loss, 4) for step, loss in log["losses"].items()},
    }
    rows = sorted([*rows, row], key=lambda x: json.dumps(x["key"]["task"], sort_keys=True))
    write_text(path, json.dumps(rows, indent=1) + "\n")


@lru_cache(maxsize=1)
def _rows() -> list[dict[str, Any]]:
    return list(read_json(FILE)) if FILE.is_file() else []


def _key(run: Run) -> dict[str, Any]:
    return _settings(replace(run, steps=None).to_dict())


def _settings(run: dict[str, Any]) -> dict[str, Any]:
    """The part of a run that decides what it loses, as JSON."""
    import json

    configuration = {name: x for name, x in run["configuration"].items() if name not in ("batch", "look", "problems")}
    rest = {name: run[name] for name in ("passes", "feedback", "eviction", "settled")}
    return json.loads(json.dumps({**configuration, **rest}))  # type: ignore[no-any-return]
