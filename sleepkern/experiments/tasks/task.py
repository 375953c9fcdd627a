"""What all tasks share: the shape of a batch, seeds, difficulties, and the split into training and test problems."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple, Protocol, TypeVar

import torch
from torch import Tensor

IGNORED = -100
"""Target where there is no loss: what `torch.nn.functional.cross_entropy` ignores."""

SPLITS = ("train", "test")
TEST_SHARE = 10
"""One problem in so many is a test problem."""
FRUITLESS = 10_000
"""Proposals in a row that are all of the other split, after which there seem to be none of this one."""


class Batch(NamedTuple):
    """Problems and their answers, int64 on the CPU.

    context   [B, windows * window]  what is slept over
    question  [B, Tq]                what is asked when it is gone, in one pass
    targets   [B, Tq]                the token that should follow each of the question's; IGNORED where there is no loss
    answers   [B, Tq]                which answer of its row a target is part of; -1 where it is part of none
    level     [B, A]                 difficulty of each answer; 0 where a row has fewer than A
    """

    context: Tensor
    question: Tensor
    targets: Tensor
    answers: Tensor
    level: Tensor

    def part(self, rows: slice) -> Batch:
        """Some of the rows."""
        return Batch(*(t[rows] for t in self))

    def to(self, device: torch.device) -> Batch:
        """The same on a device; the copy does not wait."""
        return Batch(*(t.to(device, non_blocking=True) for t in self))


class Task(Protocol):
    """A frozen dataclass: the same settings, seed, step and split give the same batch."""

    @property
    def vocabulary(self) -> int:
        """Tokens."""

    @property
    def kinds(self) -> int:
        """What may be said of a token: an id is token + vocabulary * kind (`SleepLM`)."""

    @property
    def window(self) -> int:
        """Tokens between two sleeps; contexts are whole windows."""

    @property
    def question_length(self) -> int:
        """Tq."""

    @property
    def levels(self) -> tuple[int, ...]:
        """Difficulties in training, the easiest first: hops, steps, operations."""

    @property
    def test_levels(self) -> tuple[int, ...]:
        """Those that are measured."""

    @property
    def level_name(self) -> str:
        """What a difficulty counts."""

    @property
    def chance(self) -> float:
        """Share of answers right of one who knows the question but not the context, at any level."""

    def batch(
        self, size: int, seed: int, step: int = 0, split: str = "train", weights: Sequence[float] | None = None
    ) -> Batch:
        """`size` problems; weights: how often each of `levels` comes, default equally often."""


def generator(seed: int, step: int, split: str) -> torch.Generator:
    """Randomness of its own for each (seed, step, split).

    Raises:
        ValueError: no such split.
    """
    if split not in SPLITS:
        raise ValueError(f"split: got {split!r}; expected one of {', '.join(SPLITS)}")
    numbers = torch.tensor([[seed, step, SPLITS.index(split)]])
    return torch.Generator().manual_seed(int(hashed(numbers)[0]))


def drawn_levels(
    levels: tuple[int, ...], weights: Sequence[float] | None, size: tuple[int, ...], randomness: torch.Generator
) -> Tensor:
    """Difficulties [size]."""
    if weights is not None and len(weights) != len(levels):
        raise ValueError(f"weights: got {len(weights)}; expected one for each of {len(levels)} levels")
    shares = torch.ones(len(levels)) if weights is None else torch.tensor(weights, dtype=torch.float32)
    count = torch.Size(size).numel()
    return torch.tensor(levels)[torch.multinomial(shares, count, True, generator=randomness)].view(size)


def hashed(numbers: Tensor) -> Tensor:
    """int64 rows [n,m] to [n] numbers from 0 to 2^31 - 1, of which every bit depends on all of a row."""
    mixed = torch.zeros(numbers.shape[0], dtype=torch.int64)
    for column in numbers.unbind(1):
        mixed = (mixed + column + 1) * 0x2545F4914F6CDD1D  # wraps around
        mixed = mixed ^ (mixed >> 29 & 0x7FFFFFFFF)
    return (mixed * 0x369DEA0F31A53F85) >> 33 & 0x7FFFFFFF


def belongs(canonical: Tensor, split: str) -> Tensor:
    """Which problems [n] of canonical forms int64 [n,m] are in a split."""
    test = hashed(canonical) % TEST_SHARE == 0
    return test if split == "test" else ~test


Problem = TypeVar("Problem", bound=Sequence[Tensor])


def draw(size: int, split: str, propose: Callable[[int], Problem], canonical: Callable[[Problem], Tensor]) -> Problem:
    """`size` problems of a split out of as many proposals as it takes.

    propose: makes n problems, as a tuple of tensors [n,...]. canonical: their form [n,m], equal for equal problems.

    Raises:
        ValueError: so many proposals in a row were all of the other split that this one seems to have no problems.
    """
    kept: list[Problem] = []
    found = fruitless = 0
    while found < size:
        missing = size - found
        problems = propose(missing * 12 + 32 if split == "test" else missing * 5 // 4 + 8)
        mine = belongs(canonical(problems), split)
        kept.append(type(problems)(t[mine] for t in problems))  # type: ignore[call-arg]
        found += int(mine.sum())
        fruitless = 0 if bool(mine.any()) else fruitless + len(mine)
        if fruitless > FRUITLESS:
            raise ValueError(
                f"split: got {split!r}; expected one that has problems, which none of {fruitless} proposals is in"
            )
    return type(kept[0])(torch.cat(parts)[:size] for parts in zip(*kept, strict=True))  # type: ignore[call-arg]
