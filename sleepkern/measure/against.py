"""Two builds of sleepkern in one run: is a case faster or slower than in the other build, or is it noise?

One process times each build, and both take bursts in turns, never at once: other, this, this, other, then the other way
round. So a drift of the machine meets both, and the ratio of a pair is that of neighbours in time.

Pairs of two processes are not enough. Where the system puts the memory of a process decides which addresses share a
set of a cache, so two processes of the same code can differ by some per cent for as long as they live, and more pairs
only make that difference look certain. So each round starts both processes anew and yields one ratio, the median of
its pairs, and the test counts rounds: they are independent draws of the layout.

A verdict needs a median change of MINIMUM at least, and an interval of the rounds' ratios that leaves out 1. The
interval is that of the sign test, which takes order statistics and assumes nothing of the shape of the noise. A run has
many cases and a case two looks, so each interval's level is 1 - 0.05 / (2 cases) (Bonferroni): noise alone gives any
verdict at all in at most one of 20 runs. Most cases need few rounds: one whose median is within MINIMUM after four is
within noise. The others are measured on until the level is reached, which takes longer where not all rounds agree.
"""

from __future__ import annotations

import itertools
import statistics
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..nn import SleepLM
from ..testing import TOLERANCE, relative_error
from ..testing.verify import Progress
from . import timing
from .block_cases import BlocksCase
from .builds import Build, BuildFacts, CallFailed, Worker, build_at, this_build
from .cases import AnyCase, Case
from .compare import Verdict
from .environment import environment
from .sign_test import LOOKS, Interval, is_open, judged, sign_interval


@dataclass(frozen=True)
class Effort:
    """How long a case is measured, and how certain a verdict is.

    rounds       of each case; a case without a verdict then may take more
    most_rounds  of such a case; None takes as many as the level of its interval needs
    turns        of a round, four bursts each: other, this, this, other
    seconds      of a burst
    false_alarm  probability that noise alone gives a verdict in a run, over all of its cases
    """

    rounds: int = 4
    most_rounds: int | None = None
    turns: int = 4
    seconds: float = 0.1
    false_alarm: float = 0.05


QUICK = Effort(seconds=0.05)


class Round(NamedTuple):
    """A case in one pair of processes: medians in milliseconds, and the median of this / other over the pairs."""

    other: float
    this: float
    ratio: float


@dataclass(frozen=True)
class AgainstRow:
    """A case in two builds.

    other, this  median milliseconds, None where the case was not timed
    ratio        this / other, the median over rounds, so above 1 this build is slower
    interval     bounds of the ratio; a case that stopped early has a lower level than a verdict needs
    error        relative error between the results of both builds; above `tolerance` the case is wrong
    note         why a case was not timed
    """

    case: str
    threads: int
    other: float | None
    this: float | None
    ratio: float | None
    interval: Interval | None
    ratios: tuple[float, ...]
    error: float | None
    tolerance: float
    verdict: Verdict
    note: str | None


@dataclass(frozen=True)
class AgainstReport:
    """All cases in two builds, and those that the processes cannot run."""

    environment: dict[str, Any]
    other: BuildFacts
    this: BuildFacts
    rows: tuple[AgainstRow, ...]
    left_out: tuple[str, ...]

    @property
    def passed(self) -> bool:
        """Tells whether no case is slower or wrong, and at least one was timed."""
        timed = any(row.ratio is not None for row in self.rows)
        return timed and all(row.verdict not in ("worse", "wrong") for row in self.rows)

    def to_dict(self) -> dict[str, Any]:
        """The report as a dict, ready for JSON."""
        rows = [{**asdict(row), "interval": row.interval and row.interval._asdict()} for row in self.rows]
        return {**asdict(self), "passed": self.passed, "rows": rows}


def bench_against(
    cases: Sequence[AnyCase],
    build: Path,
    quick: bool = False,
    threads: int = 1,
    device: str = "cpu",
    progress: Progress | None = None,
    effort: Effort | None = None,
) -> AgainstReport:
    """Time cases in this build of sleepkern and in another, in turns.

    Args:
        cases: what to time (measure.suites.select). Those of a whole model are left out, for they need more than
            sleepkern's public functions.
        build: a folder that holds a compiled sleepkern (a checkout, or the target of `pip install --target`), or the
            Python interpreter of another virtual environment.
        quick: bursts of 0.05 seconds, not of 0.1.
        threads: torch threads of both builds, at least 1; a case with a number of its own keeps it.
        device: "cpu" or "cuda".
        progress: called with (text, done, total).
        effort: how long a case is measured; by default it follows from `quick`.

    Returns:
        An AgainstReport with one row for each case, in their order, without those that are left out.

    Raises:
        ValueError: `build` is no build that can be timed, or every case is left out, or threads is below 1.
    """
    if threads < 1:
        raise ValueError(f"threads: got {threads}; expected at least 1")
    other = build_at(build)
    jobs = [_Job(case, case.threads or threads) for case in cases if isinstance(case, (Case, BlocksCase))]
    left_out = tuple(case.name for case in cases if not isinstance(case, (Case, BlocksCase)))
    if not jobs:
        raise ValueError(f"case: got {', '.join(left_out)}; expected a case of other suites than model")
    effort = effort or (QUICK if quick else Effort())
    with tempfile.TemporaryDirectory() as folder, timing.threads(threads):
        run = _Run(other, jobs, effort, Path(folder), device, progress)
        run.measure()
        rows = tuple(job.row(run.level) for job in jobs)
        return AgainstReport(environment(device), run.facts["other"], run.facts["this"], rows, left_out)


@dataclass
class _Job:
    """A case, and what is known of it so far."""

    case: Case | BlocksCase
    threads: int
    rounds: list[Round] = field(default_factory=list)
    error: float | None = None
    failures: dict[str, str] = field(default_factory=dict)

    @property
    def tolerance(self) -> float:
        return TOLERANCE[self.case.dtype]

    @property
    def ratios(self) -> tuple[float, ...]:
        return tuple(one.ratio for one in self.rounds)

    def wants_round(self, number: int, effort: Effort, level: float) -> bool:
        """Tells whether the case takes part in this round."""
        if self.failures or self.error is not None and not self.error <= self.tolerance:
            return False
        if number < effort.rounds:
            return True
        return (effort.most_rounds is None or number < effort.most_rounds) and is_open(self.ratios, level)

    def row(self, level: float) -> AgainstRow:
        timed, note = bool(self.rounds), "; ".join(f"{who}: {why}" for who, why in self.failures.items()) or None
        return AgainstRow(
            case=self.case.name,
            threads=self.threads,
            other=statistics.median(one.other for one in self.rounds) if timed else None,
            this=statistics.median(one.this for one in self.rounds) if timed else None,
            ratio=statistics.median(self.ratios) if timed else None,
            interval=sign_interval(self.ratios, level) if timed else None,
            ratios=self.ratios,
            error=self.error,
            tolerance=self.tolerance,
            verdict=self._verdict(level),
            note=note,
        )

    def _verdict(self, level: float) -> Verdict:
        if self.failures:  # a case that only this build fails at is broken; one that the other lacks may be new
            return "wrong" if set(self.failures) == {"this"} else "not timed"
        if self.error is None or not self.error <= self.tolerance:
            return "wrong"
        return judged(self.ratios, level)


class _Run:
    """Both builds, the cases, and the rounds."""

    def __init__(
        self, other: Build, jobs: list[_Job], effort: Effort, folder: Path, device: str, progress: Progress | None
    ) -> None:
        self.builds = {"other": other, "this": this_build()}
        self.jobs, self.effort, self.folder, self.device, self.progress = jobs, effort, folder, device, progress
        self.level = 1 - effort.false_alarm / (LOOKS * len(jobs))
        self.facts: dict[str, BuildFacts] = {}

    def measure(self) -> None:
        """Rounds until every case has its verdict."""
        done = 0
        for number in itertools.count():
            jobs = [job for job in self.jobs if job.wants_round(number, self.effort, self.level)]
            if not jobs:
                return
            ahead = len(self.jobs) * max(0, self.effort.rounds - 1 - number)
            total = done + len(jobs) + ahead
            while jobs:  # more than once where a case ends a process
                with self._processes(number) as workers:
                    while jobs:
                        self._report(f"round {number + 1}, {jobs[0].case.name}", done, total)
                        self._round(workers, jobs.pop(0), number)
                        done += 1
                        if any(worker.ended for worker in workers.values()):
                            break

    def _report(self, text: str, done: int, total: int) -> None:
        if self.progress is not None:
            self.progress(text, done, total)

    @contextmanager
    def _processes(self, number: int) -> Iterator[dict[str, Worker]]:
        """A process of each build; both start at the same time, and each round the other one is the first."""
        order = self._order(number)
        with ExitStack() as stack:
            workers = {who: stack.enter_context(Worker(self.builds[who])) for who in order}
            self.facts = {who: worker.facts() for who, worker in workers.items()}
            yield workers

    def _order(self, number: int) -> tuple[str, str]:
        return ("this", "other") if number % 2 else ("other", "this")

    def _round(self, workers: dict[str, Worker], job: _Job, number: int) -> None:
        inputs, results = self.folder / "case.pt", {who: self.folder / f"{who}.pt" for who in workers}
        torch.save(_request(job.case, self.device), inputs)
        for who in workers:
            order = {"load": str(inputs), "result": None if number else str(results[who])}
            self._ask(workers, job, who, **order, threads=job.threads, device=self.device)
        inputs.unlink()
        if not job.failures and number == 0:
            job.error = _difference(*(torch.load(results[who], weights_only=True) for who in ("this", "other")))
        if job.wants_round(number, self.effort, self.level):
            self._time(workers, job, number)

    def _time(self, workers: dict[str, Worker], job: _Job, number: int) -> None:
        """Bursts in turns; the first of each process warms it up and does not count."""
        bursts: dict[str, list[float]] = {who: [] for who in workers}
        for turn in range(-1, self.effort.turns):
            first, second = self._order(number + turn)
            for who in (first, second) if turn < 0 else (first, second, second, first):
                answer = self._ask(workers, job, who, burst=self.effort.seconds)
                if answer is None:
                    return
                bursts[who].append(1e3 * answer["seconds"])
        other, this = (bursts[who][1:] for who in ("other", "this"))
        ratio = statistics.median(b / a for a, b in zip(other, this, strict=True))
        job.rounds.append(Round(statistics.median(other), statistics.median(this), ratio))

    def _ask(self, workers: dict[str, Worker], job: _Job, who: str, **order: Any) -> dict[str, Any] | None:
        """The answer of a process; None where the build fails, whose reason the case then holds."""
        try:
            return workers[who].ask(**order)
        except CallFailed as error:
            job.failures[who] = str(error)
            return None


def _request(case: Case | BlocksCase, device: str) -> dict[str, Any]:
    """The case as against_worker.py reads it, with its inputs."""
    if isinstance(case, BlocksCase):
        torch.manual_seed(0)
        sizes = (2, case.width, case.heads, case.blocks, case.L)
        weights = SleepLM(*sizes, factor=4).to(case.dtype).state_dict()
        h = torch.randn(case.batch, case.L, case.width, dtype=case.dtype)
        inputs = {**weights, "h": h}
        return {"op": case.op, "sizes": sizes, "factor": 4, "passes": case.passes, "sets": 1, "inputs": inputs}
    inputs = {name: x.cpu() for name, x in case.inputs(device=device).items() if isinstance(x, Tensor)}
    options = {"passes": case.passes, "method": case.method, "sets": case.sets(inputs)}
    return {"op": case.op, "rule": case.rule.name, **options, "inputs": inputs}


def _difference(this: list[Tensor | None], other: list[Tensor | None]) -> float:
    """The largest relative error of this build's results against the other's; infinite where they have other shapes."""
    worst = 0.0 if len(this) == len(other) else float("inf")
    for x, y in zip(this, other, strict=False):
        if x is None or y is None or x.shape != y.shape:
            worst = worst if x is y else float("inf")
        else:
            worst = max(worst, relative_error(x, y))
    return worst
