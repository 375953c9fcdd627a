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


def rounds_for(level: float) -> int:
    """Values from which `sign_interval` reaches the level and leaves out one on each side."""
    n = 3
    while _coverage(n, 1) < level:
        n += 1
    return n


def judged(ratios: Sequence[float], level: float) -> Verdict:
    """What the ratios of rounds say: noise, unless their interval reaches the level and leaves out 1, and their median
    is MINIMUM from 1 or more."""
    interval = sign_interval(ratios, level)
    if interval.level < level or interval.low <= 1 <= interval.high:
        return "within noise"
    return verdict_of(statistics.median(ratios), MINIMUM)


def is_open(ratios: Sequence[float]) -> bool:
    """Tells whether more rounds could give a verdict: the median is far enough from 1, and at most one round is on
    the other side."""
    opposite = min(sum(r <= 1 for r in ratios), sum(r >= 1 for r in ratios))
    return verdict_of(statistics.median(ratios), MINIMUM) != "within noise" and opposite <= 1


def _coverage(n: int, dropped: int) -> float:
    return float(1 - 2 * sum(comb(n, i) for i in range(dropped + 1)) / 2**n)
