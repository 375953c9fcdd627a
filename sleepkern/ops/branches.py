"""A tree of packed segments, level by level: each level is one packed call that starts from its parents' final states.

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
Convolve = Callable[[Tensor, "Tensor | None", Tensor], "tuple[Tensor, Tensor]"]
"""(x, past, cu_seqlens) -> y and the last inputs of each segment"""


def ingest(x: Tensors, parents: Tensor | Sequence[int], state_every: int | None, run: Run) -> RecurrenceResult:
    """Outputs of all segments, the states that they end in [n,HV,K,V], and their states along the way."""
    tree, results, state = Tree(parents, x.cu_seqlens, x.k.shape[1]), list[RecurrenceResult](), x.state
    columns = [tree.split(t) for t in x[:5]]
    for depth in range(len(tree.levels)):
        if depth > 0:
            state = tree.inherited(depth, results[-1].state)
        tokens = [None if column is None else column[depth] for column in columns]
        results.append(run(Tensors._make([*tokens, state, tree.offsets_of_level(depth)])))
    outputs = [r.o for r in results if r.o is not None]
    o = tree.join(outputs, tree.lengths) if outputs else None
    final = tree.in_order([r.state for r in results])
    if state_every is None:
        return RecurrenceResult(o, final)
    counts = [-(-length // state_every) for length in tree.lengths]
    states = [r.states for r in results if r.states is not None]
    return RecurrenceResult(o, final, states=tree.join(states, counts))


def convolve(
    x: Tensor, past: Tensor | None, cu_seqlens: Tensor | None, parents: Tensor | Sequence[int], run: Convolve
) -> tuple[Tensor, Tensor]:
    """y of all segments [1,T,D], and the last inputs of each [n,W-1,D]."""
    tree, results = Tree(parents, cu_seqlens, x.shape[1]), list[tuple[Tensor, Tensor]]()
    pieces = tree.split(x)
    assert pieces is not None
    for depth, piece in enumerate(pieces):
        if depth > 0:
            past = tree.inherited(depth, results[-1][1])
        results.append(run(piece, past, tree.offsets_of_level(depth)))
    return tree.join([y for y, _ in results], tree.lengths), tree.in_order([last for _, last in results])


class Tree:
    """The segments of a packed row of T tokens by level; it takes tensors apart by level and joins them again.

    lengths  tokens of each segment
    levels   the segments of each level, in order

    Raises:
        TypeError, ValueError: parents or offsets that do not fit.
    """

    def __init__(self, parents: Tensor | Sequence[int], cu_seqlens: Tensor | None, T: int) -> None:
        self.parents = read_parents(parents, cu_seqlens)
        assert cu_seqlens is not None
        offsets = transforms.offsets_of(cu_seqlens)
        check_offsets(offsets, T)
        self.device = cu_seqlens.device
        self.lengths = [b - a for a, b in zip(offsets, offsets[1:], strict=False)]
        self.levels = levels_of(self.parents)
        depths = {segment: depth for depth, level in enumerate(self.levels) for segment in level}
        runs = [(depth, [*run]) for depth, run in groupby(range(len(self.lengths)), depths.__getitem__)]
        self.runs = [(depth, sum(self.lengths[segment] for segment in run)) for depth, run in runs]
        """Neighbours of one level: the level and their tokens."""

    def split(self, t: Tensor | None) -> list[Tensor] | None:
        """The tokens [1,T,...] of each level: views where its segments are neighbours."""
        if t is None:
            return None
        pieces: list[list[Tensor]] = [[] for _ in self.levels]
        for (depth, _), piece in zip(self.runs, t.split([size for _, size in self.runs], 1), strict=True):
            pieces[depth].append(piece)
        return [p[0] if len(p) == 1 else torch.cat(p, 1) for p in pieces]

    def join(self, parts: list[Tensor], sizes: list[int]) -> Tensor:
        """What each level has for its segments, `sizes` of them along dimension 1, in the order of the segments."""
        pieces: dict[int, Tensor] = {}
        for part, level in zip(parts, self.levels, strict=True):
            pieces.update(zip(level, part.split([sizes[segment] for segment in level], 1), strict=True))
        return torch.cat([pieces[segment] for segment in sorted(pieces)], 1)

    def in_order(self, parts: list[Tensor]) -> Tensor:
        """What each level has for its segments along dimension 0, in the order of the segments."""
        order = [segment for level in self.levels for segment in level]
        return _rows(torch.cat(parts), sorted(range(len(order)), key=order.__getitem__))

    def inherited(self, depth: int, above: Tensor) -> Tensor:
        """The row of its parent for each segment of a level, `above` has those of the level before."""
        rows = {segment: row for row, segment in enumerate(self.levels[depth - 1])}
        return _rows(above, [rows[self.parents[segment]] for segment in self.levels[depth]])

    def offsets_of_level(self, depth: int) -> Tensor:
        """cu_seqlens of a level."""
        lengths = [0, *(self.lengths[segment] for segment in self.levels[depth])]
        return torch.tensor(lengths, dtype=torch.int64, device="cpu").cumsum(0).to(self.device)


def _rows(t: Tensor, rows: list[int]) -> Tensor:
    if rows == list(range(t.shape[0])):
        return t
    return t.index_select(0, torch.tensor(rows, dtype=torch.int64, device="cpu").to(t.device))
