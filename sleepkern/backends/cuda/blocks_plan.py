"""How the CUDA kernel for a stack of blocks cuts a call: thread blocks of a cluster, windows of a group.

csrc/cuda/blocks/smem_layout.cuh says what must fit into shared memory.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import lru_cache
from math import ceil
from typing import NamedTuple

from ..native.module import _C
from . import recurrence as cuda

WARPS = 8
"""Of a thread block."""
TILES = (2, 5, 8)
"""Of 16 rows, which kernels there are for; before compute capability 9.0, which has no clusters, only the first."""
CLUSTERS = (8, 4, 2, 1)
RINGS = (16, 12, 8, 6, 4, 3, 2)
"""Stages of a warp, best first."""
MOST_TURNS = 6
"""Groups of windows that a cluster's place on the device takes one after the other."""
TILE = 16
"""Rows and columns of a tile; value columns whose sums of squares stand together."""


class Plan(NamedTuple):
    """How a call is cut.

    cluster   thread blocks that share a group of windows
    group     windows of a group
    tiles     of 16 rows, which a group fills up
    columns   of h in a thread block
    exchange  of those how many, by 16, are summed over the cluster at a time
    ring      stages of weights that a warp has on their way
    """

    cluster: int
    group: int
    tiles: int
    columns: int
    exchange: int
    ring: int


class Shape(NamedTuple):
    """Of a layer, what a plan depends on."""

    recurrent: bool
    heads: int
    value_heads: int
    K: int
    V: int
    W: int
    hidden: int


def plan(B: int, L: int, d: int, shapes: Sequence[Shape], device: cuda.Device) -> Plan | None:
    """The plan that takes least time by `_time`; None where nothing fits."""
    return _plan(B, L, d, tuple(shapes), device)


@lru_cache(maxsize=256)
def _plan(B: int, L: int, d: int, shapes: tuple[Shape, ...], device: cuda.Device) -> Plan | None:
    return min(plans(B, L, d, shapes, device), key=lambda p: _time(p, B, d, shapes, device), default=None)


def plans(B: int, L: int, d: int, shapes: Sequence[Shape], device: cuda.Device) -> Iterator[Plan]:
    """All that fit; windows are shared out evenly."""
    clusters = device.capability >= (9, 0)
    for cluster in CLUSTERS if clusters else (1,):
        if cluster > device.multiprocessors or any(s.heads % cluster for s in shapes):
            continue
        columns = up(-(-d // cluster), TILE)
        for tiles in TILES if clusters else TILES[:1]:
            most = 16 * tiles // up(L, 8)
            if most == 0:
                continue
            group = ceil(B / ceil(B / most))
            exchange = min(columns // TILE, (1 + paired(tiles)) * WARPS // cluster)
            fits = _fit(Plan(cluster, group, tiles, columns, exchange, RINGS[0]), L, shapes, device)
            if fits is not None:
                yield fits


def _fit(tried: Plan, L: int, shapes: Sequence[Shape], device: cuda.Device) -> Plan | None:
    """With as much at a time as shared memory holds: exchanges first, they make the cluster wait."""
    layers = [share(s, tried.cluster) for s in shapes]
    for exchange in range(tried.exchange, 0, -1):
        for ring in RINGS:
            found = tried._replace(exchange=exchange, ring=ring)
            if _C.cuda_blocks_memory(sizes(found) | {"L": L}, layers) <= device.shared_memory:
                return found
            if ring <= 4 and exchange > 1:
                break
    return None


def slower(p: Plan, B: int, device: cuda.Device, captured: bool) -> str | None:
    """The sentence why ordinary operators are expected to be faster than one launch, by what an H200 was seen to do;

    None where one launch is. captured: they would be part of a CUDA graph, which spares them their launches.
    """
    turns = _turns(p, B, device)
    if captured and p.tiles > TILES[0]:
        return f"in a CUDA graph ordinary operators are faster for windows of more than {16 * TILES[0]} rows"
    if turns > MOST_TURNS:
        return f"{B} windows take {turns} turns on this device, and ordinary operators are faster from {MOST_TURNS} on"
    return None


def _turns(p: Plan, B: int, device: cuda.Device) -> int:
    return ceil(ceil(B / p.group) / (device.multiprocessors // p.cluster))


def _time(p: Plan, B: int, d: int, shapes: Sequence[Shape], device: cuda.Device) -> float:
    """Clocks of a pass, roughly: of products or of their weights' way from L2, and of what is waited for."""
    total = 0.0
    for s in shapes:
        inner = s.value_heads * s.V
        weights = d * (2 * s.heads * s.K + inner * (3 if s.recurrent else 2) + 2 * s.hidden) / p.cluster
        total += max(2 * weights / 50, 2 * weights * 16 * p.tiles / 2000)
        total += 1000 * (4 if p.cluster > 1 else 2) + 300 * 2 * (p.columns // TILE // p.exchange - 1)
        total += 16 * p.tiles * d * 10 / 32 if p.cluster > 1 else 0
        heads, tokens = p.group * s.value_heads // p.cluster, p.tiles / p.group
        walks = 1000 * ceil(heads * tokens / WARPS) + 600 * tokens * ceil(heads * s.V / TILE / WARPS)
        total += walks + 3000 if s.recurrent else 2000
    return _turns(p, B, device) * total


def share(s: Shape, cluster: int) -> dict[str, int]:
    """Sizes of a layer in one thread block."""
    KP, VP = up(s.K, TILE), up(s.V, TILE)
    heads, value_heads = s.heads // cluster, s.value_heads // cluster
    return {
        "recurrent": s.recurrent,
        "heads": heads,
        "value_heads": value_heads,
        "K": s.K,
        "V": s.V,
        "KP": KP,
        "VP": VP,
        "W": s.W,
        "into": 2 * heads * KP + value_heads * VP * (2 if s.recurrent else 1),
        "hidden": up(-(-s.hidden // cluster), 16),
    }


def paired(tiles: int) -> bool:
    """Whether a warp holds sums of two groups of columns while others' come in: up to so many tiles it can."""
    return tiles < TILES[-1]


def sizes(p: Plan) -> dict[str, int]:
    """As fields of a call."""
    return p._asdict()


def up(n: int, multiple: int) -> int:
    """To the next multiple."""
    return -(-n // multiple) * multiple
