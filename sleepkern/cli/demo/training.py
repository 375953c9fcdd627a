"""Thinking at work: the same small model trained to follow chains of look-ups, with one pass a window and with four."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ...experiments.training.study import N1, N4, Study
from ..study import run_study


def run_thinking(folder: Path, steps: int | None = None) -> dict[str, Any]:
    """Train mini-Depo with N = 1 and N = 4, same steps and seed, side by side; show and write the results.

    Args:
        folder: for both runs, study.json, study.md and study.png. What is finished there is not trained again.
        steps: default those of the configuration.

    Returns:
        what study.json holds: rows with their accuracy by hops, and how far N = 4 is ahead.
    """
    return run_study(Study(folder, rows=(N1, N4), seeds=(0,), steps=steps))
