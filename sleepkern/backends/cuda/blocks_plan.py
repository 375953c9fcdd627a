"""How the CUDA kernel for a stack of blocks cuts a call: CTAs of a cluster, windows of a group.

csrc/cuda/blocks/smem_layout.cuh says what must fit into shared memory.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import lru_cache
from math import ceil
from typing import TYPE_CHECKING, NamedTuple

from ..native.module import _C
from .device import Device

if TYPE_CHECKING:
    from ..._C import CudaBlockLayer, CudaBlocks

CLUSTERS = (8, 4, 2, 1)
"""CTAs of a cluster, best first; 8 is the portable limit."""
RINGS = (16, 12, 8, 6, 4, 3, 2)
"""Stages in the ring of a warp, best first."""
MOST_ROUNDS = 6
"""Rounds of clusters on a device from which on ordinary operators are faster on an H200."""
TILE = 16
"""Rows and columns of a tile; value columns whose sums of squares are stored together."""


class BlocksPlan(NamedTuple):
    """How a call is cut.

    cluster   CTAs that share a group of windows
    group     windows of a group
    tiles     tiles of 16 rows that the rows of a group are padded to
    columns   columns of h in a CTA, a multiple of 16
    exchange  groups of 16 of these columns that are summed over the cluster at a time
    ring      stages of weights that a warp has in shared memory or requested
    """

    cluster: int
    group: int
    tiles: int
    columns: int
    exchange: int
    ring: int


class LayerShape(NamedTuple):
    """The sizes of a layer that a plan depends on; the fields are those of problems.layer_weights."""

    recurrent: bool
    heads: int
    value_heads: int
    K: int
    V: int
    W: int
    hidden: int


def plan(B: int, L: int, d: int, shapes: Sequence[LayerShape], device: Device) -> BlocksPlan | None:
    """Find the plan that takes least time by `_time`; None where nothing fits."""
    return _plan(B, L, d, tuple(shapes), device)


@lru_cache(maxsize=256)
def _plan(B: int, L: int, d: int, shapes: tuple[LayerShape, ...], device: Device) -> BlocksPlan | None:
    return min(plans(B, L, d, shapes, device), key=lambda p: _time(p, B, d, shapes, device), default=None)


def plans(B: int, L: int, d: int, shapes: Sequence[LayerShape], device: Device) -> Iterator[BlocksPlan]:
    """Yield every plan that fits; windows are shared out evenly."""
    clusters = device.capability >= (9, 0)
    for cluster in CLUSTERS if clusters else (1,):
        if cluster > device.multiprocessors or any(s.heads % cluster for s in shapes):
            continue
        columns = up(-(-d // cluster), TILE)
        kernels = _C.CudaBlocksConstants.TILES
        for tiles in kernels if clusters else kernels[:1]:  # a CTA alone has room for few rows
            most = 16 * tiles // up(L, 8)
            if most == 0:
                continue
            group = ceil(B / ceil(B / most))
            groups_at_once = (1 + _C.cuda_blocks_paired(tiles)) * _C.CudaBlocksConstants.WARPS
            exchange = min(columns // TILE, groups_at_once // cluster)
            fits = _fit(BlocksPlan(cluster, group, tiles, columns, exchange, RINGS[0]), L, shapes, device)
            if fits is not None:
                yield fits


def _fit(tried: BlocksPlan, L: int, shapes: Sequence[LayerShape], device: Device) -> BlocksPlan | None:
    """Find the widest exchange, then the longest ring, that shared memory holds: the cluster waits at exchanges."""
    layers = [share(s, tried.cluster) for s in shapes]
    for exchange in range(tried.exchange, 0, -1):
        for ring in RINGS:
            found = tried._replace(exchange=exchange, ring=ring)
            if _C.cuda_blocks_memory(call_of(found, L), layers) <= device.shared_memory:
                return found
            if ring <= 4 and exchange > 1:
                break
    return None


def slower(p: BlocksPlan, B: int, device: Device, captured: bool) -> str | None:
    """The sentence why ordinary operators are expected to be faster than one launch; None where one launch is.

    The limits were measured on an H200. captured: the operators are part of a CUDA graph, which saves their launches.
    """
    rounds, fewest = _rounds(p, B, device), _C.CudaBlocksConstants.TILES[0]
    if captured and p.tiles > fewest:
        return f"in a CUDA graph ordinary operators are faster for windows of more than {TILE * fewest} rows"
    if rounds > MOST_ROUNDS:
        return (
            f"{B} windows take {rounds} rounds on this device, and ordinary operators are faster from {MOST_ROUNDS} on"
        )
    return None


def _rounds(p: BlocksPlan, B: int, device: Device) -> int:
    return ceil(ceil(B / p.group) / (device.multiprocessors // p.cluster))


def _time(p: BlocksPlan, B: int, d: int, shapes: Sequence[LayerShape], device: Device) -> float:
    """Estimate the clocks of a pass: products or the transfer of their weights from L2, and waits."""
    total, warps = 0.0, _C.CudaBlocksConstants.WARPS
    for s in shapes:
        inner = s.value_heads * s.V
        weights = d * (2 * s.heads * s.K + inner * (3 if s.recurrent else 2) + 2 * s.hidden) / p.cluster
        total += max(2 * weights / 50, 2 * weights * 16 * p.tiles / 2000)
        total += 1000 * (4 if p.cluster > 1 else 2) + 300 * 2 * (p.columns // TILE // p.exchange - 1)
        total += 16 * p.tiles * d * 10 / 32 if p.cluster > 1 else 0
        heads, tokens = p.group * s.value_heads // p.cluster, p.tiles / p.group
        scan = 1000 * ceil(heads * tokens / warps) + 600 * tokens * ceil(heads * s.V / TILE / warps)
        total += scan + 3000 if s.recurrent else 2000
    return _rounds(p, B, device) * total


def share(s: LayerShape, cluster: int) -> CudaBlockLayer:
    """Give the sizes of a layer in one CTA of a cluster."""
    layer = _C.CudaBlockLayer()
    layer.recurrent = s.recurrent
    layer.heads, layer.value_heads = s.heads // cluster, s.value_heads // cluster
    layer.K, layer.V, layer.W = s.K, s.V, s.W
    layer.KP, layer.VP = up(s.K, TILE), up(s.V, TILE)
    layer.into = 2 * layer.heads * layer.KP + layer.value_heads * layer.VP * (2 if s.recurrent else 1)
    layer.hidden = up(-(-s.hidden // cluster), TILE)
    return layer


def call_of(p: BlocksPlan, L: int) -> CudaBlocks:
    """Give the sizes of a call for windows of L tokens; they suffice for cuda_blocks_memory."""
    call = _C.CudaBlocks()
    call.cluster, call.group, call.tiles = p.cluster, p.group, p.tiles
    call.columns, call.exchange, call.ring = p.columns, p.exchange, p.ring
    call.L = L
    return call


def up(n: int, multiple: int) -> int:
    """Round up to a multiple."""
    return -(-n // multiple) * multiple
