"""How a time is taken, written once.

Candidates are timed in turns (A, B, A, B, ...), so that a drift of the machine meets all of them
alike, and a ratio is the median of the quotients of one turn. Each candidate gets a warm-up and its
inputs are rotated, so that no operand is found in a cache because the previous call left it there
(cases.py says of how many sets).
Short calls are repeated within one sample. On a GPU a sample lies between two events; elsewhere
perf_counter is read.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

SHORTEST_SAMPLE = 2e-3
"""Seconds a sample lasts at least: calls shorter than that are repeated in a sample. Clock reads
cost about 1e-7."""

MOST_THREADS = 1024
"""More than machines have cores; where the system refuses a thread, OpenMP ends the process."""

LONGEST_WARM_UP = 0.5
"""Seconds after which no further set of inputs is warmed up."""


@dataclass(frozen=True)
class Candidate:
    """Something to time: one callable per set of inputs (rotated), and the torch threads it runs
    with."""

    calls: Sequence[Callable[[], Any]]
    threads: int = 1


@dataclass(frozen=True)
class Timing:
    """Seconds per call of one candidate, one number a turn."""

    samples: tuple[float, ...]

    @property
    def median(self) -> float:
        """Median of the samples, seconds."""
        return statistics.median(self.samples)

    @property
    def minimum(self) -> float:
        """Smallest sample, seconds."""
        return min(self.samples)


def ratio(ours: Timing, peer: Timing) -> float:
    """How many times faster ours is: the median over turns of peer / ours."""
    pairs = zip(ours.samples, peer.samples, strict=False)
    return statistics.median(theirs / mine for mine, theirs in pairs)


def time_in_turns(
    candidates: dict[str, Candidate],
    device: str = "cpu",
    seconds: float = 3.0,
    turns: tuple[int, int] = (3, 40),
    skip_slow: bool = True,
) -> dict[str, Timing]:
    """Time all candidates in turns for about `seconds`, at least turns[0] and at most turns[1]
    turns.

    A candidate whose call takes more than a third of `seconds` takes part in the first turns[0] only, and one whose
    call takes longer than `seconds` in the first. With skip_slow=False all take part in every turn.
    """
    took = {name: _warm_up(c, device) for name, c in candidates.items()}
    samples: dict[str, list[float]] = {name: [] for name in candidates}
    start = time.perf_counter()
    for turn in range(turns[1]):
        if turn >= turns[0] and time.perf_counter() - start > seconds:
            break
        for name, candidate in candidates.items():
            slow = turn and took[name] > seconds or turn >= turns[0] and took[name] > seconds / 3
            if slow and skip_slow:
                continue
            repeats = max(1, round(SHORTEST_SAMPLE / max(took[name], 1e-7)))
            with threads(candidate.threads):
                samples[name].append(_sample(candidate, repeats, device))
    return {name: Timing(tuple(s)) for name, s in samples.items()}


@contextmanager
def threads(count: int) -> Iterator[None]:
    """torch's intra-op threads set to `count`, and back afterwards.

    Raises:
        ValueError: a count below 1 or above MOST_THREADS.
    """
    if not 1 <= count <= MOST_THREADS:
        raise ValueError(f"threads: got {count}; expected 1 to {MOST_THREADS}")
    before = torch.get_num_threads()
    if before == count:
        yield
        return
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _warm_up(candidate: Candidate, device: str) -> float:
    """Run the sets of inputs once each, unless that takes long; seconds of a call."""
    with threads(candidate.threads):
        start = time.perf_counter()
        for call in candidate.calls:
            took = _sample(Candidate([call]), 1, device)
            if time.perf_counter() - start > LONGEST_WARM_UP:
                return took
        took = _sample(candidate, 1, device)
        return took if took >= SHORTEST_SAMPLE else _sample(candidate, 10, device)


def _sample(candidate: Candidate, repeats: int, device: str) -> float:
    """Seconds per call over `repeats` calls."""
    calls = [candidate.calls[i % len(candidate.calls)] for i in range(repeats)]
    if torch.device(device).type == "cuda":
        with torch.cuda.device(device):  # events are recorded on the current device
            event: Any = torch.cuda.Event
            first, last = event(enable_timing=True), event(enable_timing=True)
            torch.cuda.synchronize()
            first.record()
            for call in calls:
                call()
            last.record()
            torch.cuda.synchronize()
            return float(first.elapsed_time(last)) * 1e-3 / repeats
    start = time.perf_counter()
    for call in calls:
        call()
    return (time.perf_counter() - start) / repeats
