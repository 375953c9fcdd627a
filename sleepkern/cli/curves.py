"""`sleepkern curves`: a picture of several trainings, with their accuracy by step and by level."""

from __future__ import annotations

from itertools import cycle
from pathlib import Path
from statistics import fmean
from typing import Annotated, Any

import typer

from ..experiments.training.logs import Log, read_logs
from ..files import replacing
from .output import drawable, named_path, print_written, usage


def command(
    folders: Annotated[
        list[Path], typer.Argument(parser=named_path, metavar="PATH", help="that `train` or `study` has written to")
    ],
    out: Annotated[Path, typer.Option(parser=named_path, metavar="PATH", help="PNG to write")] = Path("curves.png"),
) -> None:
    """Draw accuracy at each level over the steps, and at the end; runs of one label share a colour."""
    drawable(out, "--out")
    try:
        draw_curves(read_logs(folders), out)
    except ValueError as error:
        raise usage(error) from error
    print_written(out)


def draw_curves(logs: list[Log], path: Path) -> None:
    """Write a PNG with a panel for each level, and one for the end of the trainings.

    Thin lines are seeds, thick lines means over seeds, dashed lines chance. Only this function imports matplotlib.
    """
    from matplotlib import pyplot

    from .plot import COLORS, PEAK_COLOR

    colors = [*COLORS[1:], COLORS[0]]
    labels = list(dict.fromkeys(log.label for log in logs))
    groups = {label: [log for log in logs if log.label == label] for label in labels}
    levels = list(logs[0].accuracy)
    columns = min(4, len(levels) + 1)
    rows = -(-(len(levels) + 1) // columns)
    figure, panels = pyplot.subplots(
        rows, columns, figsize=(3.2 * columns, 2.9 * rows + 0.5), sharey=True, squeeze=False, layout="constrained"
    )
    axes = list(panels.flat)
    for panel, level in zip(axes, levels, strict=False):
        for color, found in zip(cycle(colors), groups.values(), strict=False):
            _over_steps(panel, found, level, color)
        panel.set_title(f"{logs[0].level_name} {level}", fontsize=10)
        panel.set_xlabel("step")
    last = axes[len(levels)]
    for color, (label, found) in zip(cycle(colors), groups.items(), strict=False):
        means = [fmean(log.accuracy[level] for log in found) for level in levels]
        last.plot(levels, means, color=color, marker="o", label=label)
    last.set_title("at the end, mean of seeds", fontsize=10)
    last.set_xlabel(logs[0].level_name)
    last.set_xticks(levels)
    for panel in axes[: len(levels) + 1]:
        panel.axhline(logs[0].chance, color=PEAK_COLOR, linestyle="--", linewidth=0.8)
        panel.set_ylim(-0.03, 1.03)
        panel.spines[["top", "right"]].set_visible(False)
    for panel in axes[len(levels) + 1 :]:
        panel.set_visible(False)
    axes[0].set_ylabel("share of answers right")
    seeds = len({log.seed for log in logs})
    figure.legend(loc="outside upper center", ncols=min(3, len(labels)), fontsize=9, frameon=False)
    figure.text(0.995, 0.004, f"{seeds} seed(s); dashed: chance", ha="right", fontsize=7, color=PEAK_COLOR)
    with replacing(path) as partial:
        figure.savefig(partial, dpi=130)
    pyplot.close(figure)


def _over_steps(panel: Any, logs: list[Log], level: int, color: str) -> None:
    curves = [[(row["step"], row["accuracy"][str(level)]) for row in log.history] for log in logs]
    if len(curves) > 1:
        for curve in curves:
            panel.plot(*zip(*curve, strict=True), color=color, linewidth=0.6, alpha=0.5)
    shared = set.intersection(*({step for step, _ in curve} for curve in curves))
    steps = sorted(shared)
    means = [fmean(dict(curve)[step] for curve in curves) for step in steps]
    panel.plot(steps, means, color=color, linewidth=1.8)
