"""The test behind the verdicts of `bench --against`: the sign test and its interval, on one ratio of times a round.

The interval takes order statistics, so it assumes nothing of the shape of the noise, which has a long tail. Whether a
ratio is above 1 is a fair coin where nothing differs; n rounds without the `dropped` lowest and highest enclose the
median with the probability that neither side has so few of them.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from math import comb
from typing import NamedTuple

from .compare import Verdict, verdict_of

MINIMUM = 0.02
"""A smaller change of the median gets no verdict, however certain it is."""
SPARED = 2
"""Rounds that may be on the other side of 1, as one is where another job takes the processor from one build only."""
LOOKS = 2
"""How often a verdict is looked for (`is_open`); the probability of a false one is shared among them."""


class Interval(NamedTuple):
    """Bounds of a median, and the probability that they enclose it."""

    low: float
    high: float
    level: float


def sign_interval(values: Sequence[float], level: float) -> Interval:
    """The narrowest interval of order statistics that encloses the median with probability `level`, or of the extremes
    where there are too few values."""
    ordered, n = sorted(values), len(values)
    dropped = 0
    while 2 * (dropped + 1) < n and _coverage(n, dropped + 1) >= level:
        dropped += 1
    return Interval(ordered[dropped], ordered[-1 - dropped], _coverage(n, dropped))


def rounds_for(level: float, spared: int = SPARED) -> int:
    """The fewest values for which `sign_interval` reaches the level without the `spared` lowest and highest."""
    n = 2 * spared + 1
    while _coverage(n, spared) < level:
        n += 1
    return n


def judged(ratios: Sequence[float], level: float) -> Verdict:
    """What the ratios of rounds say: noise, unless their interval reaches the level and leaves out 1, and their median
    is MINIMUM from 1 or more."""
    interval = sign_interval(ratios, level)
    if interval.level < level or interval.low <= 1 <= interval.high:
        return "within noise"
    return verdict_of(statistics.median(ratios), MINIMUM)


def is_open(ratios: Sequence[float], level: float) -> bool:
    """Tells whether a verdict needs more rounds, and whether they could give one.

    The median has to be MINIMUM from 1, with at most SPARED rounds on the other side. A verdict is looked for twice:
    after as many rounds as the level needs if all agree, and after as many as it needs if SPARED do not.
    """
    opposite, n = min(sum(r <= 1 for r in ratios), sum(r >= 1 for r in ratios)), len(ratios)
    if verdict_of(statistics.median(ratios), MINIMUM) == "within noise" or opposite > SPARED:
        return False
    return n < rounds_for(level, 0 if opposite == 0 else SPARED)


def _coverage(n: int, dropped: int) -> float:
    return float(1 - 2 * sum(comb(n, i) for i in range(dropped + 1)) / 2**n)
