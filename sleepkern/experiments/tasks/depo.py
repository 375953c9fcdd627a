"""Depo: k-hop retrieval on a cycle (after "Physics of Language Models", part 4).

The context lists the edges x f(x) of one cycle in random order. Asked for a node and a number of hops k, the answer is
f^k(x): a chain of k look-ups, which one pass over a short stack of layers cannot make.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .task import IGNORED, Batch, draw, drawn_levels, generator


def orders(count: int, length: int, randomness: torch.Generator) -> Tensor:
    """Random orders of 0 .. length-1, [count,length]."""
    return torch.rand(count, length, generator=randomness).argsort(dim=1)


def rotated(cycles: Tensor) -> Tensor:
    """Cycles [n,m] of non-negative numbers, -1 behind the shorter ones, transposed so that the smallest comes first."""
    lengths = (cycles >= 0).sum(1, keepdim=True)
    smallest = cycles.where(cycles >= 0, cycles.max() + 1).argmin(1, keepdim=True)
    places = torch.arange(cycles.shape[1]).expand_as(cycles)
    transposed = cycles.gather(1, (places + smallest) % lengths)
    return transposed.where(places < lengths, -1)


@dataclass(frozen=True)
class Depo:
    """One window, one token a node, one k a problem: edges `x f(x) ...`, asked `x1 x2 ...`, k said of every token.

    nodes: of the cycle; tokens 0 .. nodes-1. hops: the k, kinds of tokens. queries: distinct nodes asked for.

    Two problems are the same if their cycles are; the order of edges and k do not matter.
    """

    nodes: int = 9
    hops: tuple[int, ...] = (1, 2, 3, 4)
    queries: int = 8

    level_name = "hops"

    def __post_init__(self) -> None:
        if not 1 <= self.queries <= self.nodes or max(self.hops) >= self.nodes:
            raise ValueError(
                f"depo: got {self.queries} queries and {max(self.hops)} hops; expected 1 to {self.nodes} queries and "
                f"fewer hops than nodes"
            )

    @property
    def vocabulary(self) -> int:
        return self.nodes

    @property
    def kinds(self) -> int:
        return len(self.hops)

    @property
    def window(self) -> int:
        return 2 * self.nodes

    @property
    def question_length(self) -> int:
        return self.queries

    @property
    def levels(self) -> tuple[int, ...]:
        return self.hops

    @property
    def test_levels(self) -> tuple[int, ...]:
        return self.hops

    @property
    def chance(self) -> float:
        return 1 / (self.nodes - 1)  # f^k(x) is not x

    def batch(
        self, size: int, seed: int, step: int = 0, split: str = "train", weights: Sequence[float] | None = None
    ) -> Batch:
        random = generator(seed, step, split)
        (cycles,) = draw(size, split, lambda n: (orders(n, self.nodes, random),), lambda found: rotated(found[0]))
        hops = drawn_levels(self.hops, weights, (size, 1), random)
        kind = self.nodes * (hops == torch.tensor(self.hops)).int().argmax(1, keepdim=True)
        order = orders(size, self.nodes, random)
        edges = torch.stack([cycles.gather(1, order), cycles.gather(1, (order + 1) % self.nodes)], dim=2)
        asked = orders(size, self.nodes, random)[:, : self.queries]
        return Batch(
            edges.flatten(1) + kind,
            cycles.gather(1, asked) + kind,
            cycles.gather(1, (asked + hops) % self.nodes),
            torch.arange(self.queries).expand(size, -1),
            hops.expand(-1, self.queries),
        )


@dataclass(frozen=True)
class NamedDepo:
    """Nodes with names of one or two tokens, several windows, k asked for with each query and not said before.

    A name's last token is marked: it is letters higher than the letter it stands for. Edges `name name` follow each
    other without a separator; a query is `<k> name <ans> name`. There is loss on <ans> and the answer. In training the
    number of nodes n has p(n) ~ 1 / (n + sqrt(nodes)) from 3, and k any of 1 .. max(hops) that is below n; at test
    n = nodes and k is one of hops. Rows are padded on the left of the context and behind the question.

    nodes: the most. letters: to make names from. hops: tested. queries: at most so many, on distinct nodes.
    window: divides 4 * nodes.
    """

    nodes: int = 75
    letters: int = 50
    hops: tuple[int, ...] = (1, 2, 4, 8, 16)
    queries: int = 10
    window: int = 75

    level_name = "hops"
    kinds = 1

    def __post_init__(self) -> None:
        if 4 * self.nodes % self.window or max(self.hops) >= self.nodes:
            raise ValueError(
                f"depo: got windows of {self.window} and {max(self.hops)} hops; expected a divisor of "
                f"4 * nodes = {4 * self.nodes} and fewer hops than nodes"
            )

    @property
    def vocabulary(self) -> int:
        return 2 * self.letters + max(self.hops) + 2  # letters, last letters, <k>, <ans>, padding

    @property
    def question_length(self) -> int:
        return 6 * self.queries

    @property
    def levels(self) -> tuple[int, ...]:
        return tuple(range(1, max(self.hops) + 1))

    @property
    def test_levels(self) -> tuple[int, ...]:
        return self.hops

    @property
    def chance(self) -> float:
        return 1 / (self.nodes - 1)

    def batch(
        self, size: int, seed: int, step: int = 0, split: str = "train", weights: Sequence[float] | None = None
    ) -> Batch:
        random = generator(seed, step, split)
        cycles, counts = draw(size, split, lambda n: self._cycles(n, split, random), lambda found: rotated(found[0]))
        hops = drawn_levels(self.levels, weights, (size, self.queries), random)
        rows = []
        for cycle, n, k in zip(cycles, counts.tolist(), hops, strict=True):
            rows.append(self._row(cycle[:n], (k - 1) % (n - 1) + 1, random))
        return Batch(*(torch.stack(parts) for parts in zip(*rows, strict=True)))

    def _cycles(self, count: int, split: str, random: torch.Generator) -> tuple[Tensor, Tensor]:
        """Names in the order of the cycle [count,nodes], -1 behind them, and how many [count]."""
        sizes = torch.arange(3, self.nodes + 1)
        shares = 1 / (sizes + self.nodes**0.5)
        n = torch.full((count,), self.nodes)
        if split == "train":
            n = sizes[torch.multinomial(shares, count, True, generator=random)]
        names = self._names(count, random)
        return names.where(torch.arange(self.nodes) < n[:, None], -1), n

    def _names(self, count: int, random: torch.Generator) -> Tensor:
        """Distinct names [count,nodes]: numbers below letters for those of one letter, in all as likely."""
        likely = torch.tensor([1.0, 1.0 / self.letters]).repeat_interleave(
            torch.tensor([self.letters, self.letters**2])
        )
        return torch.multinomial(likely.expand(count, -1), self.nodes, generator=random)

    def _spelt(self, name: int) -> list[int]:
        if name < self.letters:
            return [self.letters + name]
        first, last = divmod(name - self.letters, self.letters)
        return [first, self.letters + last]

    def _row(self, cycle: Tensor, hops: Tensor, random: torch.Generator) -> tuple[Tensor, ...]:
        """One problem: its cycle of names [n] and the hops of its queries."""
        names = [self._spelt(name) for name in cycle.tolist()]
        n, mark, padding = len(names), 2 * self.letters, self.vocabulary - 1
        context = [t for i in orders(1, n, random)[0].tolist() for t in names[i] + names[(i + 1) % n]]
        text, targets, answers = [], [], []
        asked = orders(1, n, random)[0, : self.queries].tolist()
        for number, (i, k) in enumerate(zip(asked, hops.tolist(), strict=False)):
            answer = names[(i + k) % n]
            text += [mark + k - 1, *names[i], padding - 1, *answer]
            targets += [IGNORED] * len(names[i]) + [padding - 1, *answer, IGNORED]
            answers += [-1] * (len(names[i]) + 1) + [number] * len(answer) + [-1]
        level = hops.where(torch.arange(self.queries) < n, 0)
        return (
            torch.tensor([padding] * (4 * self.nodes - len(context)) + context),
            _filled(text, self.question_length, padding),
            _filled(targets, self.question_length, IGNORED),
            _filled(answers, self.question_length, -1),
            level,
        )


def _filled(numbers: list[int], length: int, padding: int) -> Tensor:
    return torch.tensor(numbers + [padding] * (length - len(numbers)))
