"""`sleepkern demo`: checks, times, a patched model, a sleeping model and a training, in five to six minutes."""

from __future__ import annotations

import time
import traceback
from pathlib import Path
from typing import Annotated

import typer

from ..output import console, finish, named_path, writable
from .parts import PARTS, Outcome
from .summary import announcement, summary_table, verdict


def command(
    out: Annotated[
        Path, typer.Option(parser=named_path, metavar="PATH", help="folder for JSON, PNG and HTML files")
    ] = Path("out/demo"),
    text: Annotated[Path, typer.Option(parser=named_path, metavar="PATH", help="what the model reads")] = Path(
        "README.md"
    ),
) -> None:
    """Verify and bench (quick), a model with and without sleepkern, sleep, and thinking; a summary. Exit status 1 when
    red."""
    check_text(text)
    writable(out, "--out", folder=True)
    console.print(announcement(PARTS), soft_wrap=True)
    outcomes = [run_part(i, text, out) for i in range(len(PARTS))]
    console.rule("Summary")
    console.print(summary_table(PARTS, outcomes))
    console.print(verdict(PARTS, outcomes, out), soft_wrap=True, markup=False)
    finish(all(outcome.passed for outcome in outcomes))


def check_text(text: Path) -> None:
    """A usage error of --text unless the file can be read and holds something."""
    if not text.is_file():
        raise typer.BadParameter(f"{text} is not a file", param_hint="--text")
    try:
        with text.open("rb") as file:
            empty = not file.read(1)
    except OSError as error:
        message = f"got {text}; expected a file that can be read: {error.strerror}"
        raise typer.BadParameter(message, param_hint="--text") from error
    if empty:
        raise typer.BadParameter(f"got {text}, which is empty; expected a text", param_hint="--text")


def run_part(index: int, text: Path, out: Path) -> Outcome:
    """The part of this index, with the seconds that it took.

    A part that breaks off has failed, and the parts after it run.
    """
    part, began = PARTS[index], time.monotonic()
    console.rule(f"{index + 1}. {part.title}")
    with console.doing(lambda: f"part {index + 1} of {len(PARTS)}, {part.name}"):
        try:
            outcome = part.run(text, out)
        except Exception as error:
            console.print(traceback.format_exc(), style="red", markup=False, highlight=False, soft_wrap=True)
            outcome = Outcome(False, f"broke off: {type(error).__name__}: {error}")
    return outcome._replace(seconds=time.monotonic() - began)
