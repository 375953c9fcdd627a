"""What the demo says before its parts, and after them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from rich import box
from rich.markup import escape
from rich.table import Table

from ..heartbeat import clock
from .parts import Outcome, Part


def announcement(parts: Sequence[Part]) -> str:
    """How long the parts take, together and each."""
    minutes = sum(part.seconds for part in parts) / 60
    each = ", ".join(f"{part.name} {clock(part.seconds)}" for part in parts)
    took = f"{len(parts)} parts, about {minutes:.0f} minutes on two idle cores"
    return f"{took}: {each}; a finished training is not repeated"


def summary_table(parts: Sequence[Part], outcomes: Sequence[Outcome]) -> Table:
    """One line per part: its result, its time, what was found, and the files it has written."""
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for heading in ("part", "", "took"):
        table.add_column(heading, no_wrap=True, justify="right" if heading == "took" else "left")
    table.add_column("found, and files")
    for part, outcome in zip(parts, outcomes, strict=True):
        mark = "[green]pass[/]" if outcome.passed else "[red]FAIL[/]"
        files = f"\n[dim]{escape(', '.join(outcome.files))}[/]" if outcome.files else ""
        table.add_row(part.name, mark, clock(outcome.seconds), escape(outcome.found) + files)
    return table


def verdict(parts: Sequence[Part], outcomes: Sequence[Outcome], out: Path) -> str:
    """The last line: where the files are, and which parts failed."""
    failed = [part.name for part, outcome in zip(parts, outcomes, strict=True) if not outcome.passed]
    return f"files are in {out}; " + (f"failed: {', '.join(failed)}" if failed else "all parts passed")
