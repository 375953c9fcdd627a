"""`sleepkern curves`: accuracy by step and by level of several trainings, as a picture."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ..experiments.training.logs import Log, read_logs
from .output import console, drawable, named_path, usage


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
    console.print(f"wrote {out}", soft_wrap=True)


def draw_curves(logs: list[Log], path: Path) -> None:
    """The picture as a PNG; matplotlib is only imported here."""
    from .plot_curves import draw_curves

    draw_curves(logs, path)
