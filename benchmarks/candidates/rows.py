"""The candidates as data: what is tried for each stage on a Hopper, and why.

At most six a stage and key. The first of a stage is the tile of the table, so that a trial says what it gains.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from sleepkern.backends.triton.plan_table import PLAIN_HOPPER, Direction, Key, Tile

HOPPER = 90
WIDTH = 128


@dataclass(frozen=True)
class Row:
    """One candidate without its prediction."""

    stage: str
    key: Key
    chunk: int
    tile: Tile
    why: str
    heads: int = 32


def _key(capability: int, direction: Direction, channel: bool = False) -> Key:
    return Key(capability, direction, "bf16", channel, WIDTH)


def _state_pass(direction: Direction) -> Iterator[Row]:
    key = _key(HOPPER, direction)
    for tile, why in (
        (Tile(128, 32, 4, 3), "the table's"),
        (Tile(128, 32, 4, 2), "one chunk ahead hides the latency as well as two, with fewer addresses"),
        (Tile(128, 64, 8, 2), "half of the bytes from L2, on half of the multiprocessors"),
    ):
        yield Row("state_pass", key, 64, tile, why)
    plain = _key(PLAIN_HOPPER, direction)
    for tile, why in (
        (Tile(128, 16, 2, 4), "the table's"),
        (Tile(128, 16, 2, 3), "fewer addresses a chunk"),
        (Tile(128, 32, 2, 2), "half of the bytes from L2, which bound the table's"),
    ):
        yield Row("state_pass", plain, 32, tile, why)


def _chunk_factors(direction: Direction) -> Iterator[Row]:
    key = _key(HOPPER, direction)
    for chunk, tile, why in (
        (64, Tile(128, 128, 4, 1), "the table's"),
        (64, Tile(64, 64, 4, 1), "three CTAs a multiprocessor instead of two"),
        (32, Tile(64, 64, 1, 1), "no barrier between warps"),
    ):
        yield Row("chunk_factors", key, chunk, tile, why)
    plain = _key(PLAIN_HOPPER, direction)
    for tile, why in (
        (Tile(64, 64, 2, 1), "the table's"),
        (Tile(64, 64, 1, 1), "no barrier between warps"),
        (Tile(32, 32, 1, 1), "no barrier between warps, twelve CTAs a multiprocessor"),
    ):
        yield Row("chunk_factors", plain, 32, tile, why)


def rows() -> list[Row]:
    """All candidates, in the order in which they are tried."""
    both: tuple[Direction, ...] = ("forward", "backward")
    return [row for direction in both for make in (_chunk_factors, _state_pass) for row in make(direction)]
