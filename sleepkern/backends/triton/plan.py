"""How the kernels are cut: chunk, value columns, warps and stages, from a table that is checked offline.

Nothing is tuned while a model runs: the same problem always takes the same kernels, so results repeat bit for bit and
a first call compiles once.
"""

from __future__ import annotations

from dataclasses import dataclass

STEP_LIMIT = 8
"""Tokens that are taken one by one rather than as a chunk."""


@dataclass(frozen=True)
class Tile:
    """One kernel: key and value columns at a time, warps, and stages of its loads in flight."""

    keys: int
    values: int
    warps: int
    stages: int


@dataclass(frozen=True)
class Plan:
    """The kernels of one problem; chunk is the number of rows of a chunk."""

    chunk: int
    prepare: Tile
    ingest: Tile
    adjoint: Tile
    gradients: Tile
    window: Tile
    step: Tile


def padded(width: int) -> int:
    """The power of two that a tile of `width` columns takes, at least 16 for the matrix units."""
    return max(16, 1 << (width - 1).bit_length())


def plan_for(K: int, V: int, bits: int, channel: bool, T: int, gradients: bool) -> Plan:
    """Plan for heads of K x V, operands of `bits` bits and sequences of up to T tokens."""
    chunk = _chunk(K, bits, channel, gradients)
    while chunk > 16 and chunk >= 2 * T:
        chunk //= 2
    values = min(padded(V), 64 if bits == 16 else 32)
    keys = 32 if channel else 64
    walk = Tile(padded(K), min(values, 32), 4, 2)
    return Plan(
        chunk=chunk,
        prepare=Tile(keys, values, 4, 1),
        ingest=walk,
        adjoint=walk,
        gradients=Tile(keys, values, 8, 1),
        window=Tile(keys, values, 4, 1),
        step=Tile(padded(K), min(padded(V), 32), 4, 1),
    )


def _chunk(K: int, bits: int, channel: bool, gradients: bool) -> int:
    """Rows of a chunk: 64, and fewer where tiles of [C, K] would not fit the registers."""
    width = padded(K) * (2 if bits == 32 else 1) * (2 if channel else 1) * (2 if gradients else 1)
    return 64 if width <= 256 else 32 if width <= 512 else 16
