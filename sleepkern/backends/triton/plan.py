"""How the kernels are cut: rows of a chunk, columns, warps and stages, from a table that is checked offline.

Nothing is tuned while a model runs: the same problem always takes the same kernels, so results repeat bit for bit and
a first call compiles once. The rows below come from compiling for sm_80, sm_90 and sm_100 without a device
(tests/triton_offline): the largest tiles that neither spill beyond a stated budget nor exceed 99 KB of shared memory
where a smaller part has no more. `sleepkern tune` measures on a device and writes a table of the same form, which
`use_plans` puts in front of this one.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import Literal, NamedTuple

STEP_LIMIT = 8
"""Tokens that are taken one by one rather than as a chunk."""

Operands = Literal["bf16", "tf32", "exact"]
"""What products multiply: bfloat16, float32 rounded to tf32 (float16 too), or float32 exactly."""
Direction = Literal["forward", "backward"]
_DIRECTIONS: tuple[Direction, ...] = ("forward", "backward")


class Tile(NamedTuple):
    """One kernel: key and value columns at a time, warps, and stages of its loads in flight."""

    keys: int
    values: int
    warps: int
    stages: int


@dataclass(frozen=True)
class Plan:
    """The kernels of one problem; chunk is the number of rows of a chunk. ingest and adjoint hold all key columns."""

    chunk: int
    prepare: Tile
    ingest: Tile
    adjoint: Tile
    gradients: Tile
    window: Tile


PLAIN_HOPPER = -90
"""The capability of a Hopper whose assembler is not sound (ptxas.py): its plans have no warp-group products, which
Triton takes where a product has 64 rows and its kernel a multiple of four warps."""


class Key(NamedTuple):
    """What a plan is looked up by: capability 80 for devices of 8.x, 90 for 9.x ..., PLAIN_HOPPER, 0 for all; width, K

    at most.
    """

    capability: int
    direction: Direction
    operands: Operands
    channel: bool
    width: int


def _row(
    width: int, chunk: int, prepare: tuple[int, int, int], walk: tuple[int, int, int], gradients: tuple[int, int, int]
) -> tuple[int, Plan]:
    """prepare, gradients: (keys, values, warps); walk: (values, warps, stages). Windows of the widest heads, which hold

    all key columns of the state beside what a chunk needs, take few columns at a time.
    """
    values, warps, stages = walk
    whole, cut = Tile(width, values, warps, stages), Tile(*gradients, 1)
    window = cut if width < 256 else Tile(16, 16, 2 if chunk == 32 else 4, 1)
    return width, Plan(chunk, Tile(*prepare, 1), whole, whole, cut, window)


_HEAD: dict[Operands, tuple[tuple[int, Plan], ...]] = {
    "bf16": (
        _row(64, 64, (64, 64, 4), (32, 4, 2), (64, 64, 8)),
        _row(128, 64, (64, 64, 4), (32, 4, 2), (64, 64, 8)),
        _row(256, 32, (64, 64, 4), (32, 8, 2), (64, 64, 4)),
    ),
    "tf32": (
        _row(64, 32, (32, 32, 4), (32, 4, 2), (32, 32, 8)),
        _row(128, 32, (32, 32, 4), (16, 4, 2), (32, 32, 8)),
        _row(256, 16, (32, 32, 4), (16, 8, 2), (32, 32, 4)),
    ),
    "exact": (
        _row(64, 16, (32, 32, 4), (16, 4, 1), (16, 16, 4)),
        _row(128, 16, (32, 32, 4), (16, 8, 1), (16, 16, 4)),
        _row(256, 16, (32, 32, 4), (16, 16, 1), (16, 16, 4)),
    ),
}
_CHANNEL: dict[Operands, tuple[tuple[int, Plan], ...]] = {
    "bf16": (
        _row(64, 64, (32, 64, 8), (32, 4, 2), (32, 64, 8)),
        _row(128, 64, (32, 64, 8), (32, 4, 2), (32, 64, 8)),
        _row(256, 32, (32, 64, 4), (32, 8, 2), (32, 64, 4)),
    ),
    "tf32": (
        _row(64, 16, (32, 32, 4), (32, 4, 2), (32, 32, 4)),
        _row(128, 16, (32, 32, 4), (16, 4, 2), (32, 32, 4)),
        _row(256, 16, (32, 32, 4), (16, 8, 2), (32, 32, 4)),
    ),
    "exact": (
        _row(64, 16, (16, 32, 4), (16, 4, 1), (16, 16, 4)),
        _row(128, 16, (16, 32, 4), (16, 8, 1), (16, 16, 4)),
        _row(256, 16, (16, 32, 4), (16, 16, 1), (16, 16, 4)),
    ),
}

_AMPERE = {
    False: _row(128, 64, (64, 64, 4), (32, 4, 2), (32, 32, 8)),
    True: _row(128, 32, (32, 64, 8), (32, 4, 2), (64, 64, 8)),
}
"""Backward rows of bf16 for capability 8.x, whose matrix products hold their operands in registers."""

TABLE: dict[Key, Plan] = {
    Key(0, direction, operands, channel, width): plan
    for channel, table in ((False, _HEAD), (True, _CHANNEL))
    for operands, rows in table.items()
    for width, plan in rows
    for direction in _DIRECTIONS
}
TABLE |= {Key(80, "backward", "bf16", channel, w): plan for channel, (_, plan) in _AMPERE.items() for w in (64, 128)}
"""One plan for every key with capability 0; keys with a capability come first, and `use_plans` adds more of them."""


def _hopper(
    prepare: tuple[int, int, int], walk: Tile, gradients: tuple[int, int, int], window: tuple[int, int, int]
) -> Plan:
    """Chunks of 64 rows, on an H200 with a sound assembler.

    Without channel decay the fastest that keep within the gate's limits; with it only the walk of 128 channels was
    measured.
    """
    return Plan(64, Tile(*prepare, 1), walk, walk, Tile(*gradients, 1), Tile(*window, 1))


_HOPPER = {
    (False, 64): _hopper((64, 64, 4), Tile(64, 16, 4, 3), (64, 64, 4), (32, 32, 4)),
    (False, 128): _hopper((128, 128, 4), Tile(128, 32, 4, 3), (64, 64, 8), (64, 64, 8)),
    (True, 64): _hopper((32, 64, 8), Tile(64, 16, 4, 3), (32, 64, 8), (32, 64, 8)),
    (True, 128): _hopper((32, 64, 8), Tile(128, 32, 4, 3), (32, 64, 8), (32, 64, 8)),
}
TABLE |= {Key(90, d, "bf16", channel, w): plan for (channel, w), plan in _HOPPER.items() for d in _DIRECTIONS}


def _plain(plan: Plan, operands: Operands) -> Plan:
    """A plan without warp-group products: chunks of at most 32 rows; walks, whose products have as many rows as keys,

    and windows, which walk too, on two warps.
    """
    width = plan.ingest.keys
    walk, columns = Tile(width, 16, 2, 2), 32 if operands == "bf16" and width < 256 else 16
    chunk = 16 if operands == "tf32" and width == 256 else min(plan.chunk, 32)
    return Plan(chunk, plan.prepare, walk, walk, plan.gradients, Tile(columns, columns, 2, 1))


def _plain_measured(prepare: tuple[int, int, int], walk: Tile, gradients: tuple[int, int, int]) -> Plan:
    """The same, the fastest on an H200 with the assembler of Triton 3.6, but for 64 channels: like 128."""
    return Plan(32, Tile(*prepare, 1), walk, walk, Tile(*gradients, 1), Tile(32, 32, 2, 1))


_PLAIN = {
    (False, 64): _plain_measured((64, 64, 1), Tile(64, 16, 2, 4), (64, 64, 2)),
    (False, 128): _plain_measured((64, 64, 2), Tile(128, 16, 2, 4), (64, 64, 4)),
    (True, 64): _plain_measured((32, 64, 2), Tile(64, 16, 2, 3), (32, 64, 4)),
    (True, 128): _plain_measured((32, 64, 2), Tile(128, 16, 2, 3), (32, 64, 4)),
}
TABLE |= {
    key._replace(capability=PLAIN_HOPPER): _plain(plan, key.operands)
    for key, plan in TABLE.items()
    if key.capability == 0 and key.operands != "exact"
}
TABLE |= {Key(PLAIN_HOPPER, d, "bf16", channel, w): plan for (channel, w), plan in _PLAIN.items() for d in _DIRECTIONS}


def plan_for(
    K: int, V: int, operands: Operands, channel: bool, T: int, direction: Direction, capability: int = 0
) -> Plan:
    """Plan for heads of K x V and sequences of up to T tokens: the table's, cut down to what is there."""
    width = min(w for w in (64, 128, 256) if padded(K) <= w)
    plan = TABLE.get(Key(capability, direction, operands, channel, width))
    if plan is None:
        plan = TABLE[Key(0, direction, operands, channel, width)]
    return _cut_down(plan, K, V, min(T, plan.chunk))


def step_tile(K: int, V: int) -> Tile:
    """The decode kernel's tile: 32 value columns, so that one head's state comes from several multiprocessors."""
    return Tile(padded(K), min(padded(V), 32), 4, 1)


def padded(width: int) -> int:
    """The power of two that a tile of `width` columns takes, at least 16 for the matrix units."""
    return max(16, 1 << (width - 1).bit_length())


def use_plans(path: str | Path) -> int:
    """Put the plans of a file written by `sleepkern tune` in front of the built-in ones; returns how many they are.

    Raises:
        ValueError: the file holds something else.
    """
    rows = json.loads(Path(path).read_text())
    try:
        plans = {Key(**row["key"]): _plan_from(row["plan"]) for row in rows["plans"]}
    except (KeyError, TypeError) as error:
        raise ValueError(f"path: got {path}, which is not a table of `sleepkern tune` ({error!r})") from error
    TABLE.update(plans)
    return len(plans)


def table_rows(plans: dict[Key, Plan]) -> list[dict[str, object]]:
    """What `use_plans` reads back, ready for JSON."""
    return [{"key": key._asdict(), "plan": asdict(plan)} for key, plan in plans.items()]


def _plan_from(row: dict[str, object]) -> Plan:
    tiles = {name: Tile(*value) for name, value in row.items() if isinstance(value, (list, tuple))}
    return Plan(chunk=int(str(row["chunk"])), **tiles)


@lru_cache(maxsize=1024)
def _cut_down(plan: Plan, K: int, V: int, T: int) -> Plan:
    """A plan with no more rows than twice the sequence's and no wider than the heads."""
    chunk = plan.chunk
    while chunk > 16 and chunk >= 2 * T:
        chunk //= 2
    tiles = (plan.prepare, plan.ingest, plan.adjoint, plan.gradients, plan.window)
    return Plan(chunk, *(_fitted(tile, K, V, chunk) for tile in tiles))


def _fitted(tile: Tile, K: int, V: int, chunk: int) -> Tile:
    """A tile no wider than the head; a chunk of 16 rows keeps no more than four warps busy."""
    warps = min(tile.warps, 4) if chunk == 16 and tile.stages == 1 and tile.keys < padded(K) else tile.warps
    return Tile(min(tile.keys, padded(K)), min(tile.values, padded(V)), warps, tile.stages)
