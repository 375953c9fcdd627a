"""Arithmetic along a graph of dependencies, in the manner of GSM-Infinite: the question first, then shuffled facts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .depo import orders
from .task import IGNORED, Batch, draw, drawn_levels, generator, hashed

OPERATIONS = 3
"""+, - and *, in this order."""


def combine(operation: Tensor, first: Tensor, second: Tensor, modulus: int) -> Tensor:
    """first (operation) second, of equal shape."""
    return torch.stack([first + second, first - second, first * second]).gather(0, operation[None])[0] % modulus


@dataclass(frozen=True)
class Arithmetic:
    """`X = ? ? ?`, then statements `X = Y (+ or - or *) Z` in random order, operands earlier variables or numbers.

    A statement is four tokens: X, Y, the operation, Z. The answer needs exactly `level` of the statements, each of
    which uses the one before it (and perhaps more); the others distract: they depend on the same variables, but nothing
    depends on them. It is one number below the modulus, asked for by `X ?`.

    Tokens: numbers, variables, operations, ?. Two problems are the same if their statements are, in any order, and the
    variable asked for is.
    """

    statements: int = 11
    operations: tuple[int, ...] = (1, 2, 3, 4, 5, 6, 7, 8)
    modulus: int = 23
    windows: int = 2

    level_name = "operations"
    kinds = 1

    def __post_init__(self) -> None:
        if max(self.operations) > self.statements or 4 * (self.statements + 1) % self.windows:
            raise ValueError(
                f"arithmetic: got {max(self.operations)} operations in {self.windows} windows of {self.statements} "
                f"statements and a question; expected at most {self.statements}, and windows of equal length"
            )

    @property
    def vocabulary(self) -> int:
        return self.modulus + self.statements + OPERATIONS + 1

    @property
    def window(self) -> int:
        return 4 * (self.statements + 1) // self.windows

    @property
    def question_length(self) -> int:
        return 2

    @property
    def levels(self) -> tuple[int, ...]:
        return self.operations

    @property
    def test_levels(self) -> tuple[int, ...]:
        return self.operations

    @property
    def chance(self) -> float:
        return 1 / self.modulus  # a little more for 0, which products meet more often

    def batch(
        self, size: int, seed: int, step: int = 0, split: str = "train", weights: Sequence[float] | None = None
    ) -> Batch:
        random = generator(seed, step, split)

        def propose(count: int) -> tuple[Tensor, ...]:
            levels = drawn_levels(self.operations, weights, (count,), random)
            facts, values = self._facts(levels, random)
            rows = torch.arange(count)
            return facts, facts[rows, levels - 1, 0], values[rows, levels - 1], levels

        facts, asked, values, levels = draw(size, split, propose, self._canonical)
        order = orders(size, self.statements, random)[..., None].expand(-1, -1, 4)
        mark = torch.full((size, 1), self.vocabulary - 1)
        asked = asked[:, None]
        return Batch(
            torch.cat([asked, mark.expand(-1, 3), facts.gather(1, order).flatten(1)], dim=1),
            torch.cat([asked, mark], dim=1),
            torch.stack([torch.full((size,), IGNORED), values], dim=1),
            torch.tensor([-1, 0]).expand(size, -1),
            levels[:, None],
        )

    def _facts(self, levels: Tensor, random: torch.Generator) -> tuple[Tensor, Tensor]:
        """Statements [n,statements,4], each after those it needs, the first `levels` of them needed, and values.

        A needed statement has the one before it as one operand; the other is a number, or any needed one before it. The
        first operand of the first is a number.
        """
        count, places = len(levels), torch.arange(self.statements)
        names = self.modulus + orders(count, self.statements, random)
        numbers = torch.randint(1, self.modulus, (count, self.statements, 2), generator=random)
        operation = torch.randint(OPERATIONS, (count, self.statements), generator=random)
        chosen = torch.rand(count, self.statements, generator=random)
        linked = torch.rand(count, self.statements, generator=random) < 0.5
        swapped = torch.rand(count, self.statements, 1, generator=random) < 0.5
        values = torch.zeros(count, self.statements, dtype=torch.int64)
        facts, needed = [], levels[:, None] > places
        for i in places.tolist():
            backbone = needed[:, i] if i > 0 else torch.zeros(count, dtype=torch.bool)
            earlier = (chosen[:, i] * torch.minimum(levels, torch.tensor(i))).long()
            before = torch.full_like(earlier, i - 1)
            first = torch.where(backbone, before, torch.where(linked[:, i] & (i > 0), earlier, -1))
            second = torch.where(backbone & linked[:, i], earlier, -1)
            operands = torch.stack([first, second], dim=1)
            operands = torch.where(swapped[:, i], operands.flip(1), operands)
            at = operands.clamp_min(0)
            known = torch.where(operands < 0, numbers[:, i], values.gather(1, at))
            values[:, i] = combine(operation[:, i], known[:, 0], known[:, 1], self.modulus)
            said = torch.where(operands < 0, numbers[:, i], names.gather(1, at))
            sign = self.modulus + self.statements + operation[:, i]
            facts.append(torch.stack([names[:, i], said[:, 0], sign, said[:, 1]], dim=1))
        return torch.stack(facts, dim=1), values

    @staticmethod
    def _canonical(problem: tuple[Tensor, ...]) -> Tensor:
        facts, asked = problem[0], problem[1]
        each = hashed(facts.flatten(0, 1)).view(facts.shape[:2])
        return torch.cat([each.sort(1).values, asked[:, None]], dim=1)
