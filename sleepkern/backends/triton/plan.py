"""Which tiles the kernels of a call take: the look-up in plan_table.py, cut down to the call's sizes.

Nothing is tuned while a model runs: the same problem always takes the same kernels, so results repeat bit for bit and
a first call compiles once. `sleepkern tune` measures on a device and writes a table of the same form, which `use_plans`
puts in front of the built-in one.
"""

from __future__ import annotations

import json
import math
from dataclasses import asdict, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

from ...problems.recurrence import Problem
from .plan_table import TABLE, Direction, Key, Precision, Tile, TilePlan

DECODE_LIMIT = 8
"""The largest number of tokens that are decoded one by one and not taken as a chunk."""
MULTIPROCESSORS = 132
"""Multiprocessors of the Hoppers that the plans with segments are for."""
_FORMER_NAMES = {
    "operands": "precision", "exact": "ieee", "prepare": "chunk_factors", "ingest": "state_pass",
    "adjoint": "state_pass_backward", "gradients": "chunk_backward", "window": "single_chunk",
}  # fmt: skip
"""Names in files of older versions of `sleepkern tune`, and what they are called in this one."""


def plan_for(
    K: int, V: int, precision: Precision, channel: bool, T: int, direction: Direction, capability: int = 0
) -> TilePlan:
    """Plan for heads of K x V and sequences of up to T tokens: the table's, cut down to these sizes."""
    width = min(w for w in (64, 128, 256) if padded(K) <= w)
    plan = TABLE.get(Key(capability, direction, precision, channel, width))
    if plan is None:
        plan = TABLE[Key(0, direction, precision, channel, width)]
    return _cut_down(plan, K, V, min(T, plan.chunk))


def dividing(plan: TilePlan, problem: Problem) -> TilePlan:
    """The plan with chunks that divide state_every, so that every state along a sequence is one that a chunk ends with.

    A multiple of the table's chunk, such as most multiples of 64, keeps the plan. Any other takes the largest power of
    two that divides both, at least 16, with tiles as for short sequences.
    """
    if problem.state_every is None or problem.state_every % plan.chunk == 0:
        return plan
    return _cut_down(plan, problem.K, problem.V, problem.T, math.gcd(plan.chunk, problem.state_every))


def decode_tile(K: int, V: int) -> Tile:
    """The decode kernel's tile: 32 value columns, so that several multiprocessors share the state of one head."""
    return Tile(keys=padded(K), values=min(padded(V), 32), warps=4, stages=1)


def padded(width: int) -> int:
    """The power of two that a tile of `width` columns takes, at least 16 for the matrix units."""
    return max(16, 1 << (width - 1).bit_length())


def segments_of(problem: Problem, plan: TilePlan) -> int:
    """Segments of each sequence for a state pass on two levels; 1 where it has one level.

    There are as many as the multiprocessors have room for, a power of two that divides the chunks. Two do not pay for
    the maps of the segments. A call with states along its sequences has one level.
    """
    p, tile = problem, plan.state_pass
    if p.state_every is not None or tile.variant != "segments" or p.packed or p.passes > 1:
        return 1
    if p.K % tile.values or p.T % plan.chunk:
        return 1
    programs, chunks, segments = p.sequences * p.HV * -(-p.V // tile.values), p.T // plan.chunk, 1
    while 2 * segments * programs <= MULTIPROCESSORS and chunks % (2 * segments) == 0 and chunks > 2 * segments:
        segments *= 2
    return segments if segments > 2 else 1


def use_plans(path: str | Path) -> int:
    """Put the plans of a file written by `sleepkern tune` in front of the built-in ones; returns how many they are.

    Raises:
        ValueError: the file holds something else.
    """
    rows = json.loads(Path(path).read_text())
    try:
        plans = {_key_from(row["key"]): _plan_from(row["plan"]) for row in rows["plans"]}
    except (KeyError, TypeError) as error:
        raise ValueError(f"path: got {path}, which is not a table of `sleepkern tune` ({error!r})") from error
    TABLE.update(plans)
    return len(plans)


def table_rows(plans: dict[Key, TilePlan]) -> list[dict[str, object]]:
    """The rows that `use_plans` reads back, ready for JSON."""
    return [{"key": key._asdict(), "plan": asdict(plan)} for key, plan in plans.items()]


def _key_from(row: dict[str, Any]) -> Key:
    row = _renamed(row)
    return Key(**{**row, "precision": _FORMER_NAMES.get(row["precision"], row["precision"])})


def _plan_from(row: dict[str, Any]) -> TilePlan:
    tiles = {name: Tile(*value) for name, value in _renamed(row).items() if isinstance(value, (list, tuple))}
    return TilePlan(chunk=int(row["chunk"]), **tiles)


def _renamed(row: dict[str, Any]) -> dict[str, Any]:
    return {_FORMER_NAMES.get(name, name): value for name, value in row.items()}


@lru_cache(maxsize=1024)
def _cut_down(plan: TilePlan, K: int, V: int, T: int, most: int | None = None) -> TilePlan:
    """A plan with no more rows than twice the sequence's, at most `most`, and no wider than the heads."""
    chunk = plan.chunk if most is None else min(plan.chunk, most)
    while chunk > 16 and chunk >= 2 * T:
        chunk //= 2
    tiles = (
        plan.chunk_factors, plan.state_pass, plan.state_pass_backward, plan.chunk_backward, plan.single_chunk,
    )  # fmt: skip
    decode = plan.decode and plan.decode._replace(keys=padded(K), values=min(plan.decode.values, padded(V)))
    return replace(TilePlan(chunk, *(_fitted(tile, K, V, chunk) for tile in tiles)), decode=decode)


def _fitted(tile: Tile, K: int, V: int, chunk: int) -> Tile:
    """A tile no wider than the head; a chunk of 16 rows keeps no more than four warps busy."""
    warps = min(tile.warps, 4) if chunk == 16 and tile.stages == 1 and tile.keys < padded(K) else tile.warps
    return tile._replace(keys=min(tile.keys, padded(K)), values=min(tile.values, padded(V)), warps=warps)
