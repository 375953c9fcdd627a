"""The candidates as data: what is tried for each stage on a Hopper, and why.

At most six a stage and key. The first of a stage is the table's tile, so that a trial says what the others gain.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from sleepkern.backends.triton.plan import decode_tile
from sleepkern.backends.triton.plan_table import PLAIN_HOPPER, Key, Tile
from sleepkern.measure.candidates import plan_in_table

HOPPER = 90
WIDTH = 128


@dataclass(frozen=True)
class Row:
    """One candidate without its prediction; heads, tokens and batch are the call that it is predicted for."""

    stage: str
    key: Key
    chunk: int
    tile: Tile
    why: str
    heads: int = 32
    tokens: int = 8192
    batch: int = 1


Wanted = tuple[int, Tile, str]
"""(rows of a chunk, tile, why)."""

STATE_PASS: tuple[Wanted, ...] = (
    (64, Tile(128, 32, 4, 2), "one chunk ahead hides the latency as well as two, with fewer addresses"),
    (64, Tile(128, 32, 4, 3, "decays"), "half of the barriers"),
    (64, Tile(128, 32, 4, 2, "decays"), "half of the barriers, one chunk ahead"),
    (64, Tile(128, 32, 8, 2, "decays"), "two warps a scheduler"),
    (64, Tile(128, 64, 8, 2, "decays"), "half of the bytes through L2, on half of the multiprocessors"),
)
STATE_PASS_PLAIN: tuple[Wanted, ...] = (
    (32, Tile(128, 16, 2, 3), "fewer addresses a chunk"),
    (32, Tile(128, 16, 2, 4, "decays"), "fewer instructions"),
    (32, Tile(128, 16, 2, 3, "decays"), "fewer instructions, three CTAs a multiprocessor"),
    (32, Tile(128, 32, 2, 2, "decays"), "half of the bytes through L2, which bound the table's"),
)
FACTORS: tuple[Wanted, ...] = (
    (64, Tile(64, 64, 4, 1), "three CTAs a multiprocessor forward instead of two"),
    (32, Tile(64, 64, 2, 1), "eight CTAs a multiprocessor"),
    (32, Tile(64, 64, 1, 1), "no barrier between warps"),
)
FACTORS_PLAIN: tuple[Wanted, ...] = (
    (32, Tile(64, 64, 1, 1), "no barrier between warps"),
    (32, Tile(32, 32, 1, 1), "no barrier between warps, twelve CTAs a multiprocessor"),
    (32, Tile(128, 128, 2, 1), "fewer loads"),
)
FACTORS_CHANNEL: tuple[Wanted, ...] = (
    (32, Tile(32, 64, 2, 1), "one level above 16 rows"),
    (32, Tile(64, 64, 4, 1), "half of the trips over the levels, no spills"),
    (16, Tile(32, 64, 1, 1), "no level above 16 rows, no barrier between warps"),
    (16, Tile(64, 64, 2, 1), "no level above 16 rows, half of the trips"),
)
BACKWARD: tuple[Wanted, ...] = (
    (64, Tile(64, 64, 8, 1, "products"), "by products: the values' kernel needs 172 registers, the keys' spills none"),
    (32, Tile(64, 64, 4, 1), "two CTAs a multiprocessor"),
    (32, Tile(32, 32, 2, 1), "four CTAs a multiprocessor, barriers of two warps"),
    (32, Tile(32, 32, 2, 1, "products"), "by products: six CTAs a multiprocessor for the values' kernel"),
)
BACKWARD_PLAIN: tuple[Wanted, ...] = BACKWARD[2:]
BACKWARD_CHANNEL: tuple[Wanted, ...] = (
    (32, Tile(32, 64, 4, 1), "one level above 16 rows"),
    (32, Tile(32, 64, 4, 1, "products"), "by products"),
    (16, Tile(32, 64, 2, 1), "no level above 16 rows, no spills"),
    (16, Tile(64, 64, 4, 1), "no level above 16 rows, half of the trips"),
)
SINGLE: tuple[Wanted, ...] = ((64, Tile(64, 64, 4, 1), "fewer instructions a multiprocessor"),)
FEW: tuple[Wanted, ...] = (
    (64, Tile(128, 32, 4, 3, "decays"), "half of the barriers"),
    (64, Tile(128, 32, 4, 3, "segments"), "two levels fill the multiprocessors"),
    (64, Tile(128, 64, 8, 2, "segments"), "two levels of more segments, half of the bytes through L2"),
)
DECODE: tuple[Wanted, ...] = (
    (64, Tile(128, 32, 2, 1), "fewer instructions a byte"),
    (64, Tile(128, 32, 1, 1), "one warp a program, half of the instructions a byte"),
    (64, Tile(128, 16, 1, 1), "one warp a program, sixteen CTAs a multiprocessor"),
    (64, Tile(128, 64, 4, 1), "two tiles a head"),
    (64, Tile(128, 128, 8, 1), "a whole state a program"),
)


def _of(stage: str, key: Key, more: tuple[Wanted, ...], **call: int) -> Iterator[Row]:
    """The table's tile, then the others that are not the same."""
    plan = plan_in_table(key)
    first = getattr(plan, stage) or decode_tile(key.width, key.width)
    yield Row(stage, key, plan.chunk, first, "the table's", **call)
    for chunk, wanted, why in more:
        tile = wanted._replace(warp_groups=first.warp_groups)
        if (chunk, tile) != (plan.chunk, first):
            yield Row(stage, key, chunk, tile, why, **call)


def rows() -> list[Row]:
    """All candidates, in the order in which they are tried."""
    found: list[Row] = []
    key = Key(HOPPER, "forward", "bf16", False, WIDTH)
    back, plain = key._replace(direction="backward"), key._replace(capability=PLAIN_HOPPER)
    plain_back = back._replace(capability=PLAIN_HOPPER)
    for one, factors, state_pass, channel in (
        (key, FACTORS, STATE_PASS, FACTORS_CHANNEL),
        (plain, FACTORS_PLAIN, STATE_PASS_PLAIN, FACTORS_CHANNEL[1:3]),
    ):
        found += _of("chunk_factors", one, factors)
        found += _of("state_pass", one, state_pass)
        found += _of("chunk_factors", one._replace(channel=True), channel)
    for one, factors, state_pass, backward, channel in (
        (back, FACTORS[1:], STATE_PASS[1:4], BACKWARD, BACKWARD_CHANNEL),
        (plain_back, FACTORS_PLAIN[:1], STATE_PASS_PLAIN[1:3], BACKWARD_PLAIN, BACKWARD_CHANNEL[1:3]),
    ):
        found += _of("chunk_factors", one, factors)
        found += _of("state_pass", one, state_pass)
        found += _of("state_pass_backward", one, state_pass)
        found += _of("chunk_backward", one, backward)
        found += _of("chunk_backward", one._replace(channel=True), channel)
    for one in (key, back):
        found += _of("single_chunk", one, SINGLE, tokens=64, batch=64)
    for heads in (2, 8):
        found += _of("state_pass", key, FEW, heads=heads)
    found += _of("decode", key, DECODE, tokens=1, batch=32)
    return found
