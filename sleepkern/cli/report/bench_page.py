"""The page of `bench`: all cases, all peers, and the plots that the cases have data for."""

from __future__ import annotations

from collections.abc import Sequence

from ...measure import Report
from ...measure.bench import BenchRow, PeerRow
from .page import MISSING, Cell, Plot, Table, facts, number, percent, render
from .plots import lines, ratios, roofline
from .series import ONE_CALL, Series, by_batch, by_length, by_passes


def bench_page(report: Report) -> str:
    """The page, one text of HTML that loads nothing."""
    plots, absent = drawn(report)
    where = report.environment
    return render(
        "bench.html",
        title="sleepkern bench",
        passed=report.passed,
        summary=summary(report),
        where=f"{where['device']}, {where['threads']} thread(s), {where['date'][:16].replace('T', ' ')}",
        plots=plots,
        absent=absent,
        cases=cases_table(report),
        peers=peers_table(report),
        untimed=untimed(report),
        facts=[*facts(where), *_peaks(report)],
    )


def summary(report: Report) -> str:
    """How many cases were timed, how often sleepkern is faster than a peer, and where it loses the most."""
    if not report.rows:
        return "No case was measured."
    timed = [row for row in report.rows if row.milliseconds is not None]
    said = f"{len(timed)} of {len(report.rows)} cases have the right result and were timed."
    compared = report.comparisons
    if not compared:
        return f"{said} No peer was timed."
    lost = [one for one in compared if one[0] < 1]
    said += f" sleepkern is faster than the peer in {len(compared) - len(lost)} of {len(compared)} comparisons"
    if not lost:
        return f"{said}."
    ratio, case, name = min(lost)
    return f"{said} and slower in {len(lost)}, at worst {ratio:.2f} x as fast as {name} ({case})."


def drawn(report: Report) -> tuple[list[Plot], list[str]]:
    """The plots, and a line for each that the report has no data for."""
    timed = [row for row in report.rows if row.milliseconds is not None]
    found: list[Plot] = []
    absent: list[str] = []

    def add(name: str, series: list[Series], title: str, axes: tuple[str, str], caption: str, without: str) -> None:
        if series:
            beside = " Dashed: the peers." if len(series) == 1 and series[0].peers else ""
            found.append(lines(name, title, series, *axes, caption + beside, report.peer_names))
        else:
            absent.append(f"{title}: {without}")

    add("throughput", by_length(timed), "Throughput by length", ("T, tokens of a sequence", "tokens per second"),
        "Higher is better.", "two calls that differ in T alone, as in --suite forward")  # fmt: skip
    add("decode", by_batch(timed), "Decode time by batch", ("B x T, tokens of a call", "milliseconds"),
        "Lower is better; a batch of B sequences takes T tokens each.",
        "two calls of decode that differ in B or T, as in --suite decode without --quick")  # fmt: skip
    add("passes", by_passes(timed), "Time by passes", ("N, passes over the window", "milliseconds"),
        "Lower is better; sleep_ingest of one window, state only.",
        "two replays that differ in N alone, as in --suite ingest without --quick")  # fmt: skip
    if any(row.gflops and row.gigabytes_per_second for row in timed):
        found.append(roofline(report, timed))
    else:
        absent.append("Roofline: a call whose operations and bytes are counted, as in --suite forward")
    compared = [row for row in timed if any(peer.ratio is not None for peer in row.peers)]
    for what in dict.fromkeys(map(_work, compared)):
        found.append(ratios(what, [row for row in compared if _work(row) == what], report.peer_names))
    if not compared:
        absent.append("Against peers: a case with a peer that is installed")
    return found, absent


def _work(row: BenchRow) -> str:
    """The operation, with both of a whole model under one name."""
    return row.op if row.op in (*ONE_CALL, "blocks") else "model"


def cases_table(report: Report) -> Table:
    """A line for each case with everything that was measured of it."""
    headings = ["case", "result", "ms", "best ms", "turns", "tokens/s", "GFLOP/s", "of peak", "GB/s",
                "of bytes/s", "error / limit", "threads", "backend", "kernel"]  # fmt: skip
    return Table("All cases, times per call", headings, [_case(row) for row in report.rows], labels=2)


def _case(row: BenchRow) -> list[Cell]:
    return [
        Cell(row.case),
        Cell("right", "good") if row.passed else Cell("WRONG", "bad"),
        number(row.milliseconds),
        number(row.best_milliseconds),
        Cell(str(row.turns)),
        number(row.tokens_per_second),
        number(row.gflops),
        percent(row.share_of_peak),
        number(row.gigabytes_per_second),
        percent(row.share_of_bandwidth),
        Cell(f"{row.error:.1e} / {row.tolerance:.0e}", "" if row.passed else "bad"),
        Cell(str(row.threads)),
        Cell(row.backend),
        Cell(row.kernel),
    ]


def peers_table(report: Report) -> Table:
    """A line for each peer that was timed, the lost ones too."""
    headings = ["case", "peer", "", "times as fast", "sleepkern, ms", "peer, ms", "turns", "peer's error", "note"]
    rows = [_peer(row, peer) for row in report.rows for peer in row.peers if peer.milliseconds is not None]
    return Table("sleepkern beside each peer that was timed", headings, rows, labels=3)


def _peer(row: BenchRow, peer: PeerRow) -> list[Cell]:
    if peer.ratio is None:
        verdict, ratio = Cell("no ratio", "none"), Cell(MISSING, "none")
    elif peer.ratio < 1:
        verdict, ratio = Cell("slower", "lost"), Cell(f"{peer.ratio:.2f}", "lost")
    else:
        verdict, ratio = Cell("faster", "good"), number(peer.ratio, 3)
    error = Cell(MISSING, "none") if peer.error is None else Cell(f"{peer.error:.1e}")
    return [Cell(row.case), Cell(peer.name), verdict, ratio, number(row.milliseconds), number(peer.milliseconds),
            Cell(str(peer.turns)), error, Cell(peer.note or "")]  # fmt: skip


def untimed(report: Report) -> list[str]:
    """Why peers were not timed, with the number of cases of each reason."""
    found: dict[tuple[str, str], int] = {}
    for row in report.rows:
        for peer in row.peers:
            if peer.milliseconds is None:
                key = (peer.name, peer.note or "no reason given")
                found[key] = found.get(key, 0) + 1
    return [f"{name}: {reason} ({count} case{'s' * (count > 1)})" for (name, reason), count in found.items()]


def _peaks(report: Report) -> Sequence[tuple[str, str]]:
    peaks = []
    if report.peak_gflops is not None:
        of = "of a core, float32" if report.peak_gigabytes_per_second is None else "of large bfloat16 products"
        peaks.append((f"peak {of}", f"{number(report.peak_gflops).text} GFLOP/s"))
    if report.peak_gigabytes_per_second is not None:
        peaks.append(("peak of large copies", f"{number(report.peak_gigabytes_per_second).text} GB/s"))
    return peaks
