"""Candidates for the plan table: tiles and kernel variants that are worth a trial on a device, with predicted times.

A file of candidates is made without a device (`python -m benchmarks.candidates`), from the machine code of each kernel.
`sleepkern tune --candidates FILE` times them and writes the fastest as a table for `use_plans`.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from ..backends.triton.plan_table import TABLE, Key, Tile, TilePlan


@dataclass(frozen=True)
class PlanCandidate:
    """A tile for one stage of the plan of a key.

    stage is a field of TilePlan. heads, tokens and batch are the call that the prediction is for; predicted_us is the
    time of the stage's kernels in microseconds, and reason says in words what the prediction rests on.
    """

    stage: str
    name: str
    key: Key
    chunk: int
    tile: Tile
    predicted_us: float
    reason: str
    heads: int = 32
    tokens: int = 8192
    batch: int = 1

    def plan(self, base: TilePlan | None = None) -> TilePlan:
        """`base`, or the table's plan of the key, with this tile in its stage and this chunk."""
        change: dict[str, Any] = {self.stage: self.tile, "chunk": self.chunk}
        return replace(base or plan_in_table(self.key), **change)


def plan_in_table(key: Key) -> TilePlan:
    """The table's plan of a key, or of the same key for all devices."""
    return TABLE.get(key) or TABLE[key._replace(capability=0)]


def read_candidates(path: str | Path) -> list[PlanCandidate]:
    """The candidates of a file that `python -m benchmarks.candidates` has written.

    Raises:
        ValueError: the file holds something else.
    """
    rows = json.loads(Path(path).read_text())
    try:
        return [
            PlanCandidate(**{**row, "key": Key(**row["key"]), "tile": Tile(*row["tile"])}) for row in rows["candidates"]
        ]
    except (KeyError, TypeError) as error:
        raise ValueError(f"path: got {path}, which is not a file of candidates ({error!r})") from error


def candidate_rows(candidates: Sequence[PlanCandidate]) -> list[dict[str, object]]:
    """The rows that `read_candidates` reads back, ready for JSON."""
    return [{**asdict(one), "key": one.key._asdict()} for one in candidates]


def of_key(candidates: Sequence[PlanCandidate], key: Key, heads: int) -> list[PlanCandidate]:
    """The candidates for one key and one number of heads."""
    return [one for one in candidates if one.key == key and one.heads == heads]


def first_plan(candidates: Sequence[PlanCandidate], key: Key, chunk: int) -> TilePlan:
    """The plan that a trial with chunks of `chunk` rows starts from.

    It is the table's where the chunk is the table's. Elsewhere each stage that has candidates takes its first one,
    because tiles for another chunk need not fit into a multiprocessor.
    """
    plan = plan_in_table(key)
    if plan.chunk == chunk:
        return plan
    first = {one.stage: one.tile for one in reversed(candidates) if one.chunk == chunk}
    change: dict[str, Any] = {"chunk": chunk, **first}
    return replace(plan, **change)
