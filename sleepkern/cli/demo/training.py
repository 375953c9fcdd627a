"""A small model learns to follow chains of look-ups, with one pass a window and with four."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ...experiments.training.study import N1, N4, Study
from ..study import run_study

FOLDER = "thinking"
"""The folder of the training, in that of the demo."""


def run_training(folder: Path, steps: int | None = None) -> dict[str, Any]:
    """Train mini-Depo with N = 1 and N = 4, same steps and seed, side by side; show and write the results.

    Args:
        folder: folder of both runs, study.json, study.md and study.png. Finished runs are not trained again.
        steps: number of steps, default that of the configuration.

    Returns:
        The content of study.json: rows with their accuracy by hops, and the lead of N = 4.
    """
    return run_study(Study(folder, rows=(N1, N4), seeds=(0,), steps=steps))
