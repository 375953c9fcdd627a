"""`sleepkern bench --against`: this build of sleepkern and another one, in turns in one run."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from rich import box
from rich.markup import escape
from rich.table import Table

from ..measure.against import AgainstReport, AgainstRow, bench_against
from ..measure.builds import BuildFacts
from ..measure.cases import AnyCase
from ..measure.sign_test import MINIMUM
from .output import console, finish, given, named_path, option_of, progress_bar, three_digits, write_json

HELP = "time another build of sleepkern in turns with this one: its folder, or the Python that imports it"
Folder = Annotated[Path | None, typer.Option(parser=named_path, metavar="BUILD", help=HELP)]
COLORS = {"worse": "red", "wrong": "red", "better": "green", "not timed": "yellow"}
NOT_BESIDE = ("plot", "report_to")
"""The options that --against does not allow; --compare and --model refuse --against."""
WIDE = 0.10
"""The interval of a case on a quiet machine is narrower."""


def run(
    context: typer.Context, build: Path, cases: Sequence[AnyCase], quick: bool, threads: int, device: str,
    json: Path | None,
) -> None:  # fmt: skip
    """Time the cases in both builds and show how they differ. Exit status 1 when one is worse or wrong."""
    for name in NOT_BESIDE:
        if given(context, name):
            raise typer.BadParameter(
                "got it beside --against; expected one of the two", param_hint=option_of(context, name)
            )
    with progress_bar() as progress:
        report = bench_against(cases, build, quick, threads, device, progress)
    show(report)
    write_json(json, to_dict(report))
    finish(report.passed)


def to_dict(report: AgainstReport) -> dict[str, Any]:
    """The report for JSON."""
    return {"command": "bench --against", **report.to_dict()}


def show(report: AgainstReport) -> None:
    """The table, which builds were timed, and what is red or was not timed."""
    console.print(table(report))
    for name, facts in (("other", report.other), ("this", report.this)):
        console.print(f"[dim]{name}: {escape(_described(facts))}[/]", soft_wrap=True)
    where = report.environment
    console.print(f"[dim]{where['device']}, {where['threads']} thread(s), {where['date'][:16]}[/]")
    console.print(f"[dim]within noise: medians less than {MINIMUM:.0%} apart, or an interval around 1[/]")
    if report.other.torch != report.this.torch:
        console.print(f"[yellow]the builds have other versions of torch: {report.other.torch}, {report.this.torch}[/]")
    for row in report.rows:
        if row.error is not None and not row.error <= row.tolerance:
            error = f"relative error {row.error:.1e} > {row.tolerance:.0e}"
            console.print(f"[red]{row.case}: not timed, the results of the builds differ: {error}[/]", soft_wrap=True)
        if row.note is not None:
            color = COLORS[row.verdict]
            console.print(f"[{color}]{row.case}: not timed, {escape(row.note)}[/]", soft_wrap=True, highlight=False)
    wide = sum(row.interval is not None and row.interval.high > (1 + WIDE) * row.interval.low for row in report.rows)
    if wide:
        console.print(f"[yellow]{wide} case(s) have an interval of more than {WIDE:.0%}: the machine is not quiet[/]")
    for name in report.left_out:
        console.print(f"[yellow]left out: {name}, for which public functions are not enough[/]", soft_wrap=True)


def table(report: AgainstReport) -> Table:
    """One line per case."""
    result = Table(title="bench: two builds in turns", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    result.add_column("case")
    for heading in ("other\nms", "this\nms", "this /\nother", "interval"):
        result.add_column(heading, justify="right", no_wrap=True)
    result.add_column("", no_wrap=True)
    for row in report.rows:
        result.add_row(row.case, three_digits(row.other), three_digits(row.this), *_change(row), _verdict(row))
    return result


def _described(facts: BuildFacts) -> str:
    return f"{Path(facts.file).parent}, version {facts.version}, {facts.native}"


def _change(row: AgainstRow) -> tuple[str, str]:
    if row.ratio is None or row.interval is None:
        return "-", "-"
    return f"{row.ratio:.3f}", f"{row.interval.low:.2f} to {row.interval.high:.2f}"


def _verdict(row: AgainstRow) -> str:
    return f"[{COLORS.get(row.verdict, 'dim')}]{row.verdict}[/]"
