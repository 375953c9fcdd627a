"""The plots of the page of `bench`, as SVG that takes its colours of text and lines from the page."""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Sequence
from itertools import cycle
from typing import Any

from matplotlib import pyplot, rc_context
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter, NullLocator

from ...measure import Report
from ...measure.bench import BenchRow
from ..plot import BAR, COLORS, TICKS
from .page import Plot
from .series import ONE_CALL, Point, Series

TEXT, LINE = "#010203", "#040506"
"""Colours of a drawing that the page replaces by its own."""
WIDTH = 4.6
"""The width of a picture in inches, with which a telephone shows its letters in a legible size."""
MARKERS = "osD^vP*X"
STYLE: dict[Any, Any] = {
    "svg.fonttype": "none", "font.size": 9.5, "font.family": "sans-serif", "text.color": TEXT, "axes.edgecolor": LINE,
    "axes.labelcolor": TEXT, "xtick.color": TEXT, "ytick.color": TEXT, "xtick.major.width": 0.6,
    "ytick.major.width": 0.6,
    "axes.spines.top": False, "axes.spines.right": False, "grid.color": LINE, "grid.linewidth": 0.4, "grid.alpha": 0.35,
    "axes.grid": True, "axes.axisbelow": True, "legend.frameon": False, "legend.fontsize": 8.5, "text.usetex": False,
    "text.parse_math": False,
}  # fmt: skip


def picture(name: str, alt: str, caption: str, height: float, draw: Callable[[Any], None]) -> Plot:
    """What `draw` puts into the axes, as SVG; `name` keeps the ids of one page apart."""
    with rc_context({**STYLE, "svg.hashsalt": name}):
        figure, axes = pyplot.subplots(figsize=(WIDTH, height), layout="constrained")
        try:
            draw(axes)
            figure.patch.set_alpha(0)
            axes.patch.set_alpha(0)
            written = io.StringIO()
            figure.savefig(written, format="svg", metadata={"Date": None, "Creator": None})
        finally:
            pyplot.close(figure)
    return Plot(_inline(written.getvalue(), name, alt), alt, caption)


def _inline(text: str, name: str, alt: str) -> str:
    """The svg element alone, with a label for screen readers, in the colours of the page."""
    from markupsafe import escape

    body = text[text.index("<svg") :]
    body = re.sub(r"<metadata>.*?</metadata>|<!--.*?-->", "", body, flags=re.S)
    body = re.sub(r' id="[\w.]+_\d+"', "", body)  # groups, named alike in every picture
    label = f'<svg role="img" aria-label="{escape(alt)}" data-plot="{name}"'
    body = body.replace("<svg", label, 1)
    return body.replace(TEXT, "currentColor").replace(LINE, "var(--faint)")


def color_of(peer: str, peers: Sequence[str]) -> str:
    """The colour of a peer, the same in every plot of a page; the second of COLORS is that of sleepkern."""
    return COLORS[2 + peers.index(peer) % (len(COLORS) - 2)]


def lines(
    name: str, title: str, groups: Sequence[Series], x: str, y: str, caption: str, peers: Sequence[str] = ()
) -> Plot:
    """A line for each series over a logarithmic x; a single one has its peers beside it, dashed."""

    def draw(axes: Any) -> None:
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        for color, marker, group in zip(cycle(COLORS[1:]), cycle(MARKERS), groups, strict=False):
            _line(axes, group.label, group.points, color=color, marker=marker)
        if len(groups) == 1:
            for peer, points in groups[0].peers.items():
                _line(axes, peer, points, color=color_of(peer, peers), marker="o", linestyle="--", linewidth=1)
        places = sorted({point.x for group in groups for point in group.points})
        axes.set_xticks(places, [f"{place:g}" for place in places])
        axes.xaxis.set_minor_locator(NullLocator())
        _number_y(axes)
        axes.set_xlabel(x)
        axes.set_ylabel(y)
        axes.set_title(title, fontsize=10.5, loc="left")
        axes.figure.legend(loc="outside lower left", ncols=1 if len(groups) > 1 else 2)

    told = "; ".join(
        f"{group.label}: " + ", ".join(f"{_short(point.y)} at {point.x:g}" for point in group.points)
        for group in groups
    )
    rows = len(groups) if len(groups) > 1 else (len(groups[0].peers) + 2) // 2
    return picture(name, f"{title}. {y} by {x}. {told}", caption, 2.9 + 0.19 * rows, draw)


def _line(axes: Any, label: str, points: Sequence[Point], **style: Any) -> None:
    axes.plot([point.x for point in points], [point.y for point in points], label=label, markersize=4, **style)


def _number_y(axes: Any) -> None:
    """Numbers at 1, 2 and 5 of each decade, or at its beginning where there are many."""
    low, high = axes.get_ylim()
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if high < 100 * low else (1,)))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: _short(value)))


def roofline(report: Report, rows: Sequence[BenchRow]) -> Plot:
    """GFLOP/s of a thread against useful operations per byte, with the peaks that the run has measured."""
    found = [
        (row.op, row.gflops / row.gigabytes_per_second, row.gflops / row.threads)
        for row in rows
        if row.gflops and row.gigabytes_per_second
    ]
    ops = list(dict.fromkeys(op for op, _, _ in found))
    peak, bandwidth = report.peak_gflops, report.peak_gigabytes_per_second
    xs = [x for _, x, _ in found]
    low, high = 0.6 * min(xs), 1.7 * max(xs)

    def draw(axes: Any) -> None:
        axes.set_xscale("log")
        axes.set_yscale("log")
        for color, marker, op in zip(cycle(COLORS[1:]), cycle(MARKERS), ops, strict=False):
            points = [(x, y) for name, x, y in found if name == op]
            axes.plot(*zip(*points, strict=True), marker, color=color, markersize=4.5, label=op)
        if peak is not None and bandwidth is not None:
            knee = peak / bandwidth
            reach = sorted({low, min(max(knee, low), high), high})
            axes.plot(reach, [min(peak, bandwidth * x) for x in reach], color=TEXT, linewidth=1, label="measured peaks")
        elif peak is not None:
            axes.plot([low, high], [peak, peak], color=TEXT, linewidth=1, label="measured peak")
        _number_y(axes)
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axes.xaxis.set_minor_formatter(NullFormatter())
        axes.set_xlabel("useful operations per byte that must cross memory")
        axes.set_ylabel("GFLOP/s per thread")
        axes.set_title("Roofline", fontsize=10.5, loc="left")
        axes.figure.legend(loc="outside lower left", ncols=3)

    told = "; ".join(f"{op}: {y:.3g} GFLOP/s at {x:.3g} operations per byte" for op, x, y in found)
    ceiling = "" if peak is None else f" The peak is {peak:.3g} GFLOP/s."
    caption = "Each point is a case; the line is what this run has measured the device to do."
    if bandwidth is None:
        caption += " The memory bandwidth of a CPU is not measured, so the roof has no slope."
    return picture("roofline", f"Roofline.{ceiling} {told}", caption, 3.4, draw)


def ratios(what: str, rows: Sequence[BenchRow], peers: Sequence[str]) -> Plot:
    """A bar for each peer of each case, to the left of 1 where sleepkern is slower."""
    bars = [(row, [peer for peer in row.peers if peer.ratio is not None]) for row in rows]
    values = [peer.ratio for _, some in bars for peer in some if peer.ratio is not None]
    low, high = min([0.8, *values]) * 0.8, max([2.0, *values]) * 1.6
    height = sum(2 + len(some) for _, some in bars) * BAR

    def draw(axes: Any) -> None:
        y, labelled = 0.0, set()
        for row, some in bars:
            axes.annotate(_label(row), (0, y), xycoords=("axes fraction", "data"), fontsize=8.5, va="center")
            for peer in some:
                y += 1
                color = color_of(peer.name, peers)
                label = None if peer.name in labelled else peer.name
                labelled.add(peer.name)
                value = peer.ratio or 1.0
                axes.barh(y, value - 1, 0.85, left=1, color=color, label=label)
                right = value >= 1
                axes.annotate(
                    f"{value:.3g}", (value, y), xytext=(3 if right else -3, 0), textcoords="offset points",
                    va="center", ha="left" if right else "right", fontsize=8.5,
                )  # fmt: skip
            axes.vlines(1, y - len(some) + 0.5, y + 0.5, color=TEXT, linewidth=0.8)
            y += 2
        axes.set_xscale("log")
        axes.set_xlim(low, high)
        axes.set_ylim(y - 1, -1)
        axes.set_xticks([tick for tick in TICKS if low <= tick <= high])
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g} x"))
        axes.xaxis.set_minor_locator(NullLocator())
        axes.set_yticks([])
        axes.grid(axis="y", visible=False)
        axes.spines["left"].set_visible(False)
        axes.set_xlabel("times as fast as the peer (logarithmic)")
        axes.set_title(f"Against peers: {what}", fontsize=10.5, loc="left")
        axes.figure.legend(loc="outside lower left", ncols=2)

    told = "; ".join(
        f"{row.case}: " + ", ".join(f"{peer.ratio:.3g} x {peer.name}" for peer in some) for row, some in bars
    )
    legend = 0.19 * -(-len({peer.name for _, some in bars for peer in some}) // 2)
    caption = "Right of 1 sleepkern is faster, left of 1 slower. Median over turns of one run."
    return picture(f"ratios-{what}", f"How many times as fast as its peers sleepkern is, {what}. {told}", caption,
                   0.85 + legend + 0.62 * height, draw)  # fmt: skip


def _label(row: BenchRow) -> str:
    """The case without the operation, which the title has."""
    if row.op not in ONE_CALL:
        return row.case
    return f"{row.rule} {row.details.removeprefix(row.op + ' ')}"


def _short(value: float) -> str:
    """A number with a prefix of thousands: 26.4 k."""
    for size, prefix in ((1e9, " G"), (1e6, " M"), (1e3, " k")):
        if abs(value) >= size:
            return f"{value / size:.3g}{prefix}"
    return f"{value:.3g}"
