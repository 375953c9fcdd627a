"""The bench as a picture: speed-up over each peer, and share of the core's peak."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")

from matplotlib import pyplot
from matplotlib.ticker import FuncFormatter, MaxNLocator, NullLocator

from ..files import replacing
from ..measure import Report
from ..measure.bench import BenchRow

COLORS = (
    "#9aa5b1", "#2a78b5", "#e08a1e", "#3a9d5d", "#8a63b0", "#c0504d", "#7b4f2a", "#d77fb3", "#4bb8c4", "#b3a31f",
)  # fmt: skip
"""More than there are peers on a device; after the last comes the first again."""
PEAK_COLOR = "#39424e"
GROUP = 0.8
"""Height of the bars of a case together; cases are 1 apart."""
BAR = 0.26
"""The greatest height of one bar."""
TICKS = (0.25, 0.5, 1, 2, 5, 10, 20, 50, 100, 200)


def draw_report(report: Report, path: Path) -> None:
    """Write a PNG: one group of bars a case, logarithmic speed-ups on the left, share of peak on
    the right."""
    rows = [row for row in report.rows if row.milliseconds is not None]
    if not rows:
        raise ValueError("report: got no timed case; expected at least one to draw")
    with_peak = any(row.share_of_peak is not None for row in rows)
    most = max(sum(peer.ratio is not None for peer in row.peers) for row in rows)
    height = 1.8 + max(0.55, 0.16 * most) * len(rows)
    figure, panels = pyplot.subplots(
        1, 2 if with_peak else 1, figsize=(11, height), sharey=True, squeeze=False,
        layout="constrained", width_ratios=(3, 1) if with_peak else (1,),
    )  # fmt: skip
    _speedups(panels[0][0], rows, report.peer_names, min(BAR, GROUP / max(most, 1)))
    if with_peak:
        _shares(panels[0][1], rows, peak_of(report))
    where = report.environment
    figure.suptitle(
        f"sleepkern {where['versions']['sleepkern']}: {where['device']}, "
        f"{where['threads']} thread(s) unless said, {where['date'][:10]}",
        fontsize=11,
    )
    with replacing(path) as place:
        figure.savefig(place, dpi=130)
    pyplot.close(figure)


def peak_of(report: Report) -> str:
    """What the shares are of (measure/peaks.py): only of a GPU the bandwidth is known."""
    gpu = report.peak_gigabytes_per_second is not None
    return "a large bfloat16 product" if gpu else "the float32 peak"


def _speedups(panel: Any, rows: list[BenchRow], names: list[str], bar: float) -> None:
    ratios = {(i, p.name): p.ratio for i, row in enumerate(rows) for p in row.peers if p.ratio is not None}
    drawn: set[str] = set()
    for i in range(len(rows)):
        here = [name for name in names if (i, name) in ratios]
        for j, name in enumerate(here):
            value = ratios[i, name]
            place = i + (j - (len(here) - 1) / 2) * bar
            label = name if name not in drawn else None
            color = COLORS[names.index(name) % len(COLORS)]
            panel.barh(place, value - 1, 0.9 * bar, left=1, color=color, label=label)
            panel.annotate(
                f"{value:.1f}", (value, place), xytext=(3 if value >= 1 else -3, 0),
                textcoords="offset points", va="center", ha="left" if value >= 1 else "right",
                fontsize=7,
            )  # fmt: skip
            drawn.add(name)
    panel.set_xscale("log")
    low, high = min([0.8, *ratios.values()]) * 0.8, max([2.0, *ratios.values()]) * 1.4
    panel.set_xlim(low, high)
    panel.set_xticks([t for t in TICKS if low <= t <= high])
    panel.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:g}x"))
    panel.xaxis.set_minor_locator(NullLocator())
    panel.axvline(1, color="black", linewidth=0.8)
    panel.set_yticks(range(len(rows)), [_label(row) for row in rows], fontsize=8)
    panel.set_ylim(len(rows) - 0.5, -0.5)
    panel.set_xlabel("times faster than (logarithmic)")
    panel.legend(
        loc="lower center",
        bbox_to_anchor=(0.5, 1.0),
        ncols=min(len(names), 5) or 1,
        fontsize=8,
        frameon=False,
    )
    _tidy(panel)


def _label(row: BenchRow) -> str:
    return f"{row.rule}  {row.details}\n{row.milliseconds:.3g} ms"


def _shares(panel: Any, rows: list[BenchRow], peak: str) -> None:
    for i, row in enumerate(rows):
        if row.share_of_peak is not None:
            panel.barh(i, 100 * row.share_of_peak, 0.9 * BAR, color=PEAK_COLOR)
            panel.annotate(
                f"{row.share_of_peak:.0%}", (100 * row.share_of_peak, i), xytext=(3, 0),
                textcoords="offset points", va="center", fontsize=7,
            )  # fmt: skip
    largest = max(100 * row.share_of_peak for row in rows if row.share_of_peak is not None)
    panel.set_xlim(0, max(110, 1.3 * largest))  # the number stands behind its bar
    panel.xaxis.set_major_locator(MaxNLocator(6, steps=[1, 5, 10]))  # has 100, up to 600
    panel.tick_params(axis="x", labelsize=8)
    panel.set_xlabel(f"% of\n{peak}")
    _tidy(panel)


def _tidy(panel: Any) -> None:
    panel.spines[["top", "right", "left"]].set_visible(False)
    panel.tick_params(axis="y", length=0)
    panel.grid(axis="x", color="#dddddd", linewidth=0.6)
    panel.set_axisbelow(True)
