"""Medians, GFLOP/s, share of the core's measured peak, and the ratio to each peer in the same run.

Before anything is timed its result is checked against the float64 reference, on the first tokens of
the timed shape, and on a CPU all of it against `chunked` in float64. A case whose check fails is red:
it gets no time and no ratio. A peer that is wrong, on those first tokens, gets a time, but no ratio.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, replace
from multiprocessing import get_context
from typing import Any

import torch
from torch import Tensor

from ..dispatch import explain_problem
from ..testing import TOLERANCE, Shape, relative_error, to_float64, type_name
from ..testing.verify import Progress
from . import cases, suites, timing
from .block_cases import BlocksCase
from .cases import AnyCase, Case, Result
from .environment import environment
from .model_cases import ModelCase
from .peaks import Ceilings, ceilings
from .peers import OURS, Peer, peers_of

CHECKED_TOKENS = 300
"""Tokens of the check: several chunks, and a last one that is not full. 100 when quick."""

PEER_WRONG = 2e-2
"""Relative error above which a peer counts as wrong. Peers round to tf32 or bfloat16 inside, so
this is wide: another convention gives errors near 1."""


@dataclass(frozen=True)
class PeerRow:
    """A peer on a case, timed in `turns`. ratio: how many times faster ours is; None with its reason in `note`."""

    name: str
    milliseconds: float | None
    turns: int
    ratio: float | None
    error: float | None
    note: str | None


@dataclass(frozen=True)
class BenchRow:
    """A case. Times are per call, medians over `turns`; the rest is None when the check is red,
    share_of_peak also where no peak is known, and operations and bytes of a whole model are not
    counted. shape, passes, method and cached are those of the call; of a model or a stack of blocks
    the shape is that of its recurrence."""

    case: str
    op: str
    rule: str
    dtype: str
    shape: Shape
    passes: int
    method: str
    cached: bool
    tokens: int
    threads: int
    backend: str
    kernel: str
    error: float
    tolerance: float
    milliseconds: float | None
    best_milliseconds: float | None
    turns: int
    tokens_per_second: float | None
    gflops: float | None
    share_of_peak: float | None
    gigabytes_per_second: float | None
    share_of_bandwidth: float | None
    peers: tuple[PeerRow, ...]

    @property
    def passed(self) -> bool:
        """Tells whether the check of the result is green."""
        return self.error <= self.tolerance

    @property
    def details(self) -> str:
        """The case's name without its rule and without what most cases share."""
        name = self.case.removeprefix("forward ").replace(f"{self.rule} ", "")
        for common in (" H=16", " K=128 V=128", " float32"):
            name = name.replace(common, "")
        return name


@dataclass(frozen=True)
class Report:
    """Everything `bench` measured, and where. The peaks are measured too (peaks.py)."""

    environment: dict[str, Any]
    peak_gflops: float | None
    peak_gigabytes_per_second: float | None
    rows: tuple[BenchRow, ...]

    @property
    def passed(self) -> bool:
        """Tells whether every case is green."""
        return all(row.passed for row in self.rows)

    @property
    def peer_names(self) -> list[str]:
        """Peers that were timed on some case, in order of appearance."""
        timed = (p.name for row in self.rows for p in row.peers if p.milliseconds is not None)
        return list(dict.fromkeys(timed))

    @property
    def comparisons(self) -> list[tuple[float, str, str]]:
        """The (ratio, case, peer) of each comparison with another package, without sleepkern under other settings."""
        return [
            (peer.ratio, row.case, peer.name)
            for row in self.rows
            for peer in row.peers
            if peer.ratio is not None and not peer.name.startswith(OURS)
        ]

    def to_dict(self) -> dict[str, Any]:
        """The report as a dict, ready for JSON."""
        rows = [{**asdict(row), "passed": row.passed} for row in self.rows]
        return {
            "environment": self.environment, "peak_gflops": self.peak_gflops,
            "peak_gigabytes_per_second": self.peak_gigabytes_per_second, "passed": self.passed, "rows": rows,
        }  # fmt: skip


def bench(
    suite: str = "all",
    quick: bool = False,
    threads: int = 1,
    device: str = "cpu",
    progress: Progress | None = None,
    so_far: Callable[[Report], None] | None = None,
    apart: bool = False,
) -> Report:
    """Time a suite of cases and every peer that is installed.

    Args:
        suite: all, or one of measure.suites.SUITES: forward, heads, types, rules, decode, ingest,
            train, tiny, threads, model (model_cases.py), blocks (block_cases.py).
        quick: shorter sequences and fewer turns (about a minute).
        threads: torch threads of ours and of every peer.
        device: cpu or cuda; a GPU has suites of its own (gpu_cases.py), in bfloat16.
        progress: called with (text, done, total).
        so_far: called with what there is after each case, so that a run that is cut off leaves something.
        apart: each case in a fresh process. What earlier cases leave in the allocator saves later ones the first touch
            of their memory, up to a fifth of a call that makes many tensors. A script that sets it guards its
            `__main__`, as multiprocessing's "spawn" wants.

    Raises:
        ValueError: an unknown suite, or threads below 1.
    """
    if threads < 1:
        raise ValueError(f"threads: got {threads}; expected at least 1")
    chosen = suites.select(suite, quick, device)
    return bench_cases(chosen, quick, threads, device, progress, so_far, apart)


def bench_cases(
    chosen: Sequence[AnyCase],
    quick: bool = False,
    threads: int = 1,
    device: str = "cpu",
    progress: Progress | None = None,
    so_far: Callable[[Report], None] | None = None,
    apart: bool = False,
) -> Report:
    """`bench` on cases of your own."""
    with timing.threads(threads):
        best = ceilings(device)
        report = Report(environment(device), best.gflops, best.gigabytes_per_second, ())
    for done, case in enumerate(chosen):
        if progress is not None:
            progress(case.name, done, len(chosen))
        if apart:
            with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as process:
                row = process.submit(_row_of, case, quick, threads, device, best).result()
        else:
            row = _row_of(case, quick, threads, device, best)
        report = replace(report, rows=(*report.rows, row))
        if so_far is not None:
            so_far(report)
    if progress is not None:
        progress("measured", len(chosen), len(chosen))
    return report


def _row_of(case: AnyCase, quick: bool, threads: int, device: str, best: Ceilings) -> BenchRow:
    with timing.threads(threads):
        if isinstance(case, Case):
            return _measure(case, quick, threads, device, best)
        return _measure_whole(case, quick, threads, best)


def _measure(case: Case, quick: bool, threads: int, device: str, best: Ceilings) -> BenchRow:
    ours_threads = case.threads or threads
    small = case.shortened(100 if quick else CHECKED_TOKENS)
    expected = _expected(small, device)
    with timing.threads(ours_threads):
        error = _error(lambda x: lambda: cases.run(small, x), small, expected, device)
        if torch.device(device).type == "cpu" and error <= TOLERANCE[case.dtype]:
            error = max(error, _error(lambda x: lambda: cases.run(case, x), case, _expected_of_all(case), device))
    tolerance = TOLERANCE[case.dtype]
    times: dict[str, timing.Timing] = {}
    peers: dict[str, tuple[Peer, float | None, str | None]] = {}
    if error <= tolerance:
        for peer in peers_of(case, device):
            peers[peer.name] = (peer, *_check_peer(peer, small, expected, ours_threads, device))
        times = _time(
            case,
            [peer for peer, wrong, _ in peers.values() if wrong is not None],
            threads,
            quick,
            device,
        )
    return _row(case, ours_threads, error, tolerance, times, peers, best, device)


def _check_peer(
    peer: Peer, small: Case, expected: Result, threads: int, device: str
) -> tuple[float | None, str | None]:
    """(error, note): no error when the peer cannot do the case, a note when it gets no ratio."""
    reason = peer.why_not(small, device)
    if reason is not None:
        return None, reason
    try:
        error = _error(lambda x: peer.prepare(small, x, threads), small, expected, device)
    except Exception as failure:  # whatever a peer raises is a note on its row, not the end of the table
        return None, f"failed: {type(failure).__name__}: {str(failure)[:200]}"
    return error, _wrong(error)


def _wrong(error: float) -> str | None:
    return f"wrong: relative error {error:.1e}" if not error <= PEER_WRONG else None


def _expected(small: Case, device: str) -> Result:
    """The case by the reference in float64, on the CPU, from the same rounded inputs."""
    exact = to_float64(small.inputs(device=device))
    return cases.run(replace(small, dtype=torch.float64), exact, backend="reference")


def _expected_of_all(case: Case) -> Result:
    """The whole case by `chunked` in float64, which the reference vouches for elsewhere."""
    return cases.run(replace(case, dtype=torch.float64), to_float64(case.inputs()), backend="chunked")


def _error(
    prepare: Callable[[dict[str, Any]], Callable[[], Result]],
    small: Case,
    expected: Result,
    device: str,
) -> float:
    """Larger of the relative errors of the two results."""
    actual = prepare(small.inputs(device=device))()
    errors = [
        relative_error(a, e)
        for a, e in zip(actual, expected, strict=True)
        if isinstance(a, Tensor) and isinstance(e, Tensor)
    ]
    return max(errors)


def _time(case: Case, peers: list[Peer], threads: int, quick: bool, device: str) -> dict[str, timing.Timing]:
    """Ours and the peers in turns."""
    sets = case.rotation(device)
    ours_threads = case.threads or threads
    candidates = {
        "ours": timing.Candidate([_bound(case, x) for x in sets], ours_threads),
        **{
            peer.name: timing.Candidate(
                [peer.prepare(case, x, peer.threads or ours_threads) for x in sets],
                peer.threads or ours_threads,
            )
            for peer in peers
        },
    }
    return timing.time_in_turns(candidates, device, seconds=2.0 if quick else 8.0)


def _bound(case: Case, inputs: dict[str, Any]) -> Callable[[], Result]:
    return lambda: cases.run(case, inputs)


def _row(
    case: Case,
    threads: int,
    error: float,
    tolerance: float,
    times: dict[str, timing.Timing],
    peers: dict[str, tuple[Peer, float | None, str | None]],
    best: Ceilings,
    device: str,
) -> BenchRow:
    explained = explain_problem(case.problem(device))
    ours = times.get("ours")
    seconds = None if ours is None else ours.median
    gflops = None if seconds is None else case.flops / seconds * 1e-9
    gigabytes = None if seconds is None else case.bytes / seconds * 1e-9
    return BenchRow(
        case=case.name,
        op=case.op,
        rule=case.rule.name,
        dtype=type_name(case.dtype),
        shape=case.shape,
        passes=case.passes,
        method=case.method,
        cached=case.cached,
        tokens=case.shape.B * case.shape.T * case.passes,
        threads=threads,
        backend=explained.chosen or "none",
        kernel=explained.kernel,
        error=error,
        tolerance=tolerance,
        milliseconds=None if seconds is None else 1e3 * seconds,
        best_milliseconds=None if ours is None else 1e3 * ours.minimum,
        turns=0 if ours is None else len(ours.samples),
        tokens_per_second=None if seconds is None else case.shape.B * case.shape.T * case.passes / seconds,
        gflops=gflops,
        share_of_peak=None if gflops is None or best.gflops is None else gflops / (best.gflops * threads),
        gigabytes_per_second=gigabytes,
        share_of_bandwidth=None
        if gigabytes is None or best.gigabytes_per_second is None
        else gigabytes / best.gigabytes_per_second,
        peers=tuple(_peer_row(name, ours, times.get(name), *rest[1:]) for name, rest in peers.items()),
    )


def _peer_row(
    name: str,
    ours: timing.Timing | None,
    theirs: timing.Timing | None,
    error: float | None,
    note: str | None,
) -> PeerRow:
    compared = ours is not None and theirs is not None and note is None
    return PeerRow(
        name=name,
        milliseconds=None if theirs is None else 1e3 * theirs.median,
        turns=0 if theirs is None else len(theirs.samples),
        ratio=timing.ratio(ours, theirs) if compared else None,  # type: ignore[arg-type]
        error=error,
        note=note,
    )


def _measure_whole(case: ModelCase | BlocksCase, quick: bool, threads: int, best: Ceilings) -> BenchRow:
    """A whole model or stack of blocks, and peers that have to compute the same."""
    ours_threads, times = case.threads or threads, {}
    with timing.threads(ours_threads), case.quietly():
        calls, errors = case.prepare(quick)
        error = errors["ours"]
        if error <= case.tolerance:
            candidates = {name: timing.Candidate([call], ours_threads) for name, call in calls.items()}
            times = timing.time_in_turns(candidates, seconds=4.0 if quick else 24.0)
    inside = Case("forward", case.rule, Shape(T=case.timed_tokens, H=16, HV=32, K=128, V=128))
    explained = explain_problem(inside.problem())
    ours = times.get("ours")
    gflops = None if ours is None or case.flops is None else case.flops / ours.median * 1e-9
    return BenchRow(
        case=case.name,
        op=case.op,
        rule=case.rule.name,
        dtype=type_name(case.dtype),
        shape=case.shape,
        passes=case.passes,
        method="auto",
        cached=False,
        tokens=case.timed_tokens,
        threads=ours_threads,
        backend=explained.chosen or "none",
        kernel=explained.kernel,
        error=error,
        tolerance=case.tolerance,
        milliseconds=None if ours is None else 1e3 * ours.median,
        best_milliseconds=None if ours is None else 1e3 * ours.minimum,
        turns=0 if ours is None else len(ours.samples),
        tokens_per_second=None if ours is None else case.timed_tokens / ours.median,
        gflops=gflops,
        share_of_peak=None if gflops is None or best.gflops is None else gflops / (best.gflops * ours_threads),
        gigabytes_per_second=None,
        share_of_bandwidth=None,
        peers=tuple(_peer_row(name, ours, times[name], errors[name], _wrong(errors[name])) for name in list(times)[1:]),
    )
