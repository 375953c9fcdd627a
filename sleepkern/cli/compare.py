"""`sleepkern bench --compare`: two reports of `bench` side by side."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer
from rich import box
from rich.markup import escape
from rich.table import Table

from ..measure.compare import NOISE, STEADY, Compared, Comparison, compare, read_report
from .output import console, finish, given, option_of, three_digits, write_json

HELP = "show how two written results differ"
Reports = Annotated[tuple[Path, Path] | None, typer.Option(metavar="A.json B.json", help=HELP)]
COLORS = {"worse": "red", "wrong": "red", "better": "green", "unsteady": "yellow"}
BESIDE = ("compare", "json")
"""The options that --compare allows."""


def run(context: typer.Context, paths: tuple[Path, Path], json: Path | None) -> None:
    """Show how the cases of two reports differ. Exit status 1 when one is worse."""
    for name in context.params:
        if name not in BESIDE and given(context, name):
            raise typer.BadParameter("got it beside --compare, which times nothing; expected --json at most",
                                     param_hint=option_of(context, name))  # fmt: skip
    before, after = map(_report, paths)
    compared = compare(before["rows"], after["rows"])
    console.print(table(compared))
    for name, path, report in zip("AB", paths, (before, after), strict=True):
        where = report["environment"]
        place = f"{where['device']}, {where['threads']} thread(s), {where['date'][:16]}"
        console.print(f"[dim]{name}: {escape(f'{path}: {place}')}[/]")
    if before["environment"]["device"] != after["environment"]["device"]:
        console.print("[yellow]A and B were measured on different devices[/]")
    _explain(compared)
    write_json(json, to_dict(compared))
    finish(compared.passed)


def to_dict(compared: Compared) -> dict[str, Any]:
    """The comparison for JSON."""
    return {"command": "bench --compare", "passed": compared.passed, **asdict(compared)}


def table(compared: Compared) -> Table:
    """One line per case that both reports have."""
    result = Table(title="bench: medians of two reports", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    result.add_column("case")
    for heading in ("A ms", "B ms", "B / A"):
        result.add_column(heading, justify="right", no_wrap=True)
    result.add_column("", no_wrap=True)
    for row in compared.rows:
        result.add_row(escape(row.case), three_digits(row.before), three_digits(row.after), *_verdict(row))
    return result


def _report(path: Path) -> dict[str, Any]:
    try:
        return read_report(path)
    except OSError as error:
        message = f"got {path}; expected a report that `bench --json` has written: {error.strerror}"
        raise typer.BadParameter(message, param_hint="--compare") from error
    except ValueError as error:
        raise typer.BadParameter(str(error), param_hint="--compare") from error


def _explain(compared: Compared) -> None:
    console.print(f"[dim]within noise: medians less than {NOISE:.0%} apart[/]")
    if any(row.verdict == "unsteady" for row in compared.rows):
        console.print(f"[yellow]unsteady: best and median of a row differ by more than {STEADY:.0%}; measure again[/]")
    for name, cases in (("A", compared.only_before), ("B", compared.only_after)):
        for case in cases:
            console.print(f"[yellow]only in {name}: {escape(case)}[/]", soft_wrap=True)


def _verdict(row: Comparison) -> tuple[str, str]:
    color = COLORS.get(row.verdict, "dim")
    return "-" if row.ratio is None else f"{row.ratio:.2f}", f"[{color}]{row.verdict}[/]"
