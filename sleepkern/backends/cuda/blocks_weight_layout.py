"""In what order the CUDA kernel for a stack of blocks multiplies by weights: csrc/cuda/blocks/weight_stream.cuh.

Computed with the places of numbers instead of the numbers, once for a stack's sizes and a plan: weights that change are
then put in order by one indexing.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import zip_longest
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from .blocks_plan import TILE, WARPS, Plan, Shape, paired, share, up

STAGE = 2
"""Fragments that a warp asks for at a time."""
_INDEX: Any = {"dtype": torch.int32, "device": "cpu"}
Round = tuple[Sequence[int], Sequence[int]]
"""Groups of 16 outputs that warps multiply by at a time: the first ones, one a warp, and the second ones."""


class Order(NamedTuple):
    """Of all weights of a stack, side by side after a 0.

    places  [n] of the numbers, in fragments of 16 outputs x 16 terms: warp after warp, thread block after thread block
    stages  [cluster, warps, 2] where a warp's begin, and how many
    """

    places: Tensor
    stages: Tensor


def sizes_of(s: Shape, d: int) -> list[tuple[int, int]]:
    """[outputs, terms] of a layer's weights: qkv, of gated DeltaNet gate and rates, out, up, down."""
    keys, values = s.heads * s.K, s.value_heads * s.V
    gated = [(values, d), (2 * s.value_heads, d)] if s.recurrent else []
    return [(2 * keys + values, d), *gated, (d, values), (s.hidden, d), (d, s.hidden)]


def order(d: int, shapes: tuple[Shape, ...], device: torch.device, p: Plan) -> Order:
    """For these layers and this plan, of which group and ring do not matter."""
    parts: list[list[list[Tensor]]] = [[[] for _ in range(WARPS)] for _ in range(p.cluster)]
    first = 1
    for s in shapes:
        weights = []
        for outputs, terms in sizes_of(s, d):
            weights.append(torch.arange(first, first + outputs * terms, **_INDEX).view(outputs, terms))
            first += outputs * terms
        for rank in range(p.cluster):
            for weight, rounds, splits in _products(weights, s, p, rank):
                for warp, fragments in _by_warp(_fragments(weight), rounds, splits):
                    parts[rank][warp].append(fragments)
    streams = [torch.cat(warp) if warp else torch.zeros(0, 256, **_INDEX) for rank in parts for warp in rank]
    counts = torch.tensor([len(stream) // STAGE for stream in streams], **_INDEX)
    stages = torch.stack([counts.cumsum(0, dtype=torch.int32) - counts, counts], dim=1)
    return Order(torch.cat(streams).flatten().to(device), stages.to(device))


def _products(weights: list[Tensor], s: Shape, p: Plan, rank: int) -> Iterator[tuple[Tensor, list[Round], int]]:
    """Each weight [outputs, terms] of a thread block, in what order, and in how many parts of its terms."""
    columns, keys = p.cluster * p.columns, s.heads * s.K
    qkv, *gated, out, wider, down = weights
    q, k, v = qkv.split([keys, keys, s.value_heads * s.V])
    inputs = [(q, s.heads, s.K), (k, s.heads, s.K), (v, s.value_heads, s.V)]
    if s.recurrent:
        inputs.append((gated[0], s.value_heads, s.V))
    into = torch.cat([heads_of(x, n, width, p.cluster, rank) for x, n, width in inputs])
    yield _padded(into, len(into), columns), _rounds(len(into) // TILE), 1
    if s.recurrent:
        rates = gated[1].view(2, p.cluster, -1, gated[1].shape[1])[:, rank].flatten(0, 1)
        groups, splits = -(-len(rates) // TILE), _splits(p)
        each: list[Round] = [([group] * splits, []) for group in range(groups)]
        yield _padded(rates, groups * TILE, columns), each, splits
    terms = heads_of(out.T, s.value_heads, s.V, p.cluster, rank)
    yield _padded(terms.T, columns, len(terms)), _exchanges(p), 1
    hidden = share(s, p.cluster)["hidden"]
    mine = slice(rank * hidden, (rank + 1) * hidden)
    yield _padded(wider[mine], hidden, columns), _rounds(hidden // TILE), 1
    yield _padded(down[:, mine], columns, hidden), _exchanges(p), 1


def heads_of(x: Tensor, heads: int, width: int, cluster: int, rank: int) -> Tensor:
    """Rows of one thread block's heads, each with zeros up to a multiple of 16."""
    mine = x.unflatten(0, (heads, width))[rank * (heads // cluster) : (rank + 1) * (heads // cluster)]
    return F.pad(mine, (0, 0, 0, up(width, TILE) - width)).flatten(0, 1)


def _padded(t: Tensor, rows: int, columns: int) -> Tensor:
    return F.pad(t, (0, columns - t.shape[1], 0, rows - t.shape[0]))


def _exchanges(p: Plan) -> list[Round]:
    """Of groups of columns of h, those that are summed together: of one owner after another."""
    own = p.columns // TILE
    exchanges = [
        [owner * own + group for group in range(first, min(own, first + p.exchange)) for owner in range(p.cluster)]
        for first in range(0, own, p.exchange)
    ]
    if not paired(p.tiles):  # one group a warp at a time
        return [(exchange, []) for exchange in exchanges]
    if p.cluster * p.exchange > WARPS:
        return [(exchange[:WARPS], exchange[WARPS:]) for exchange in exchanges]
    return list(zip_longest(exchanges[::2], exchanges[1::2], fillvalue=[]))


def _rounds(groups: int) -> list[Round]:
    every = range(groups)
    return [(every[i : i + WARPS], every[i + WARPS : i + 2 * WARPS]) for i in range(0, groups, 2 * WARPS)]


def _splits(p: Plan) -> int:
    """Parts of the terms of the rates, as csrc/cuda/blocks/params.h has it."""
    return next(n for n in (8, 4, 2, 1) if n <= p.cluster * p.exchange)


def _fragments(weight: Tensor) -> Tensor:
    """[outputs / 16, terms / 16, 256] of a weight [outputs, terms], as lanes hold right operands.

    csrc/cuda/arch/mma_tiles.h has the same order.
    """
    groups, steps = weight.shape[0] // TILE, weight.shape[1] // TILE
    x = weight.reshape(groups, 2, 8, steps, 2, 4, 2)  # group, half, g; step, half, t, pair
    return x.permute(0, 3, 2, 5, 1, 4, 6).reshape(groups, steps, 256)


def _by_warp(fragments: Tensor, rounds: list[Round], splits: int) -> Iterator[tuple[int, Tensor]]:
    """Fragments [n, 256] of a warp, in whole stages."""
    for one, other in rounds:
        for warp in range(len(one)):
            mine = [one[warp], other[warp]] if warp < len(other) else [one[warp]]
            taken = fragments[mine][:, warp % splits :: splits].transpose(0, 1).reshape(-1, 256)
            yield warp, F.pad(taken, (0, 0, 0, -len(taken) % STAGE))
