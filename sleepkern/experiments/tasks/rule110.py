"""Rule 110: what an elementary cellular automaton, able to compute anything, makes of a string in t steps."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .task import IGNORED, Batch, draw, drawn_levels, generator

RULE = 110


def evolve(bits: Tensor) -> Tensor:
    """One step of periodic strings [...,W] of 0 and 1."""
    neighbourhood = 4 * bits.roll(1, -1) + 2 * bits + bits.roll(-1, -1)
    return RULE >> neighbourhood & 1


@dataclass(frozen=True)
class Rule110:
    """Strings of `width` bits, one a window; the question asks for all of them, t steps later, bit after bit.

    With several steps to choose from, t is said at the start of every window and of the question, by a token of its
    own. Tokens: 0, 1, one to ask for each string, one for each of steps. An answer is a whole string.

    Two strings are the same problem if one is a rotation of the other, with which the automaton commutes.
    """

    width: int = 24
    strings: int = 4
    steps: tuple[int, ...] = (32,)

    level_name = "steps"
    kinds = 1

    @property
    def vocabulary(self) -> int:
        return 2 + self.strings + len(self.steps)

    @property
    def window(self) -> int:
        return self.width + int(self._says)

    @property
    def question_length(self) -> int:
        return self.strings * self.width + int(self._says)

    @property
    def levels(self) -> tuple[int, ...]:
        return self.steps

    @property
    def test_levels(self) -> tuple[int, ...]:
        return self.steps

    @property
    def chance(self) -> float:
        return 2.0**-self.width

    @property
    def _says(self) -> bool:
        return len(self.steps) > 1

    def batch(
        self, size: int, seed: int, step: int = 0, split: str = "train", weights: Sequence[float] | None = None
    ) -> Batch:
        random = generator(seed, step, split)
        (strings,) = draw(
            size * self.strings,
            split,
            lambda n: (torch.randint(2, (n, self.width), generator=random),),
            lambda found: necklaces(found[0]),
        )
        strings = strings.view(size, self.strings, self.width)
        t = drawn_levels(self.steps, weights, (size, 1, 1), random)
        later = self._evolved(strings, t)
        ask = torch.arange(2, 2 + self.strings).view(1, -1, 1).expand(size, -1, 1)
        question = torch.cat([ask, later[:, :, :-1]], dim=2).flatten(1)
        number = torch.arange(self.strings).repeat_interleave(self.width).expand(size, -1)
        targets = later.flatten(1)
        if self._says:
            mark = 2 + self.strings + (t == torch.tensor(self.steps)).int().argmax(2, keepdim=True)
            strings = torch.cat([mark.expand(-1, self.strings, 1), strings], dim=2)
            first = (mark[:, :, 0], torch.full((size, 1), IGNORED), torch.full((size, 1), -1))
            joined = zip(first, (question, targets, number), strict=True)
            question, targets, number = (torch.cat(pair, dim=1) for pair in joined)
        return Batch(strings.flatten(1), question, targets, number, t[:, :, 0].expand(-1, self.strings))

    def _evolved(self, strings: Tensor, t: Tensor) -> Tensor:
        now, later = strings, strings
        for done in range(1, max(self.steps) + 1):
            now = evolve(now)
            later = now.where(t == done, later)
        return later


def necklaces(strings: Tensor) -> Tensor:
    """The smallest rotation of each string [n,W], as a number [n,1]."""
    width = strings.shape[1]
    number = (strings << torch.arange(width)).sum(1)
    mask, smallest = (1 << width) - 1, number
    for _ in range(width - 1):
        number = number >> 1 | (number << width - 1 & mask)
        smallest = torch.minimum(smallest, number)
    return smallest[:, None]
