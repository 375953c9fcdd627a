"""A tree of segments: level by level, each level one packed call whose initial states are its parents' final ones.

The segments of a level are independent of each other, so every backend computes them as packed sequences. torch records
where states and tokens come from, and so adds the gradients of children up in their parents.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import groupby

import torch
from torch import Tensor

from .. import transforms
from ..problems.branches import levels_of, read_parents
from ..problems.recurrence import RecurrenceResult, Tensors, check_offsets

Run = Callable[[Tensors], RecurrenceResult]
"""A packed call of a rule without parents."""


def ingest(x: Tensors, parents: Tensor | Sequence[int], state_every: int | None, run: Run) -> RecurrenceResult:
    """Outputs of all segments, the states that they end in [n,HV,K,V], and their states along the way."""
    found = read_parents(parents, x.cu_seqlens)
    assert x.cu_seqlens is not None
    offsets = transforms.offsets_of(x.cu_seqlens)
    check_offsets(offsets, x.k.shape[1])
    lengths = [b - a for a, b in zip(offsets, offsets[1:], strict=False)]
    levels = levels_of(found)
    results: list[RecurrenceResult] = []
    for depth, (segments, tokens) in enumerate(zip(levels, _tokens_of_levels(x, lengths, levels), strict=True)):
        state = x.state
        if depth > 0:
            above = {segment: row for row, segment in enumerate(levels[depth - 1])}
            state = _rows(results[-1].state, [above[found[segment]] for segment in segments])
        ends = torch.tensor([0, *(lengths[s] for s in segments)], dtype=torch.int64, device="cpu").cumsum(0)
        results.append(run(Tensors._make([*tokens, state, ends.to(x.cu_seqlens.device)])))
    order = [segment for level in levels for segment in level]
    rows = sorted(range(len(order)), key=order.__getitem__)
    state = _rows(torch.cat([r.state for r in results]), rows)
    o = _in_order([r.o for r in results], levels, lengths)
    if state_every is None:
        return RecurrenceResult(o, state)
    counts = [-(-length // state_every) for length in lengths]
    return RecurrenceResult(o, state, states=_in_order([r.states for r in results], levels, counts))


def _tokens_of_levels(x: Tensors, lengths: list[int], levels: list[list[int]]) -> list[list[Tensor | None]]:
    """q, k, v, g and beta of each level: views where its segments are neighbours."""
    depths = {segment: depth for depth, level in enumerate(levels) for segment in level}
    runs = [(depth, [*run]) for depth, run in groupby(range(len(lengths)), depths.__getitem__)]
    sizes = [sum(lengths[segment] for segment in run) for _, run in runs]
    columns = []
    for t in x[:5]:
        pieces: list[list[Tensor]] = [[] for _ in levels]
        if t is not None:
            for (depth, _), piece in zip(runs, t.split(sizes, 1), strict=True):
                pieces[depth].append(piece)
        columns.append([None if t is None else p[0] if len(p) == 1 else torch.cat(p, 1) for p in pieces])
    return [list(level) for level in zip(*columns, strict=True)]


def _in_order(parts: list[Tensor | None], levels: list[list[int]], sizes: list[int]) -> Tensor | None:
    """What each level has for its segments, `sizes` of them along dimension 1, in the order of the segments."""
    pieces: dict[int, Tensor] = {}
    for part, level in zip(parts, levels, strict=True):
        if part is None:
            return None
        pieces.update(zip(level, part.split([sizes[segment] for segment in level], 1), strict=True))
    return torch.cat([pieces[segment] for segment in sorted(pieces)], 1)


def _rows(states: Tensor, rows: list[int]) -> Tensor:
    if rows == list(range(states.shape[0])):
        return states
    return states.index_select(0, torch.tensor(rows, dtype=torch.int64, device="cpu").to(states.device))
