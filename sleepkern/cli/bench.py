"""`sleepkern bench`: how fast, against whom, and how near to what the machine can do?"""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Annotated, Any, cast, get_args

import typer
from rich import box
from rich.markup import escape
from rich.measure import Measurement
from rich.table import Table

from ..measure import Report, bench_cases, gpu_cases
from ..measure.bench import BenchRow
from ..measure.cases import AnyCase, Case, Op
from ..measure.peers import OURS
from ..measure.suites import SUITES, select
from ..rules import RULES
from ..testing import Shape
from . import against as against_command
from . import compare as compare_command
from . import model_bench, sizes
from . import report as report_option
from .output import (
    check_device,
    console,
    drawable,
    finish,
    given,
    named_path,
    print_written,
    progress_bar,
    three_digits,
    usage,
    writable,
    write_json,
)

SUITES_HELP = f"all, or one of {', '.join(SUITES)}; with --device cuda one of {', '.join(gpu_cases.SUITES)}"
Written = Annotated[Path | None, typer.Option(parser=named_path, metavar="PATH", help="write the results to this file")]
OPS: tuple[str, ...] = get_args(Op)
USUAL = Shape(T=2048, H=16, HV=16, K=128, V=128)
"""The sizes of a call of one's own that are not given."""
USUAL_STEP = Shape(T=1, H=16, HV=16, K=128, V=128)
"""The same for op decode."""
CHECKED = 8
"""Bytes that the check of a result takes for each byte of the call: it computes in float64, with intermediates."""
Picture = Annotated[
    Path | None, typer.Option(parser=named_path, metavar="PATH", help="draw them into this file: .png, .pdf, .svg, ...")
]
TITLE = "bench: medians, results checked against the reference before"
NOT_TIMED = "[dim]-[/]"

CaseNames = Annotated[
    list[str] | None, typer.Option(metavar="TEXT", help="only cases whose name contains this; may be repeated")
]
OwnOps = Annotated[
    list[str] | None, typer.Option(help=f"a call of one's own: {', '.join(OPS)}", show_default="forward")
]
OwnTypes = Annotated[list[str] | None, typer.Option(help=f"its type: {', '.join(sizes.TYPES)}", show_default="float32")]


def command(
    context: typer.Context,
    suite: Annotated[str, typer.Option(help=SUITES_HELP)] = "all",
    case: CaseNames = None,
    device: Annotated[str, typer.Option(help="cpu or cuda")] = "cpu",
    threads: Annotated[int, typer.Option(metavar="N", help="threads of ours and of every peer")] = 1,
    quick: Annotated[bool, typer.Option("--quick", help="shorter sequences, about a minute")] = False,
    op: OwnOps = None,
    rule: Annotated[list[str] | None, typer.Option(help="its rule; may be repeated", show_default="all")] = None,
    B: sizes.Batch = None,
    T: sizes.ManyTokens = None,
    H: sizes.KeyHeads = None,
    HV: sizes.ValueHeads = None,
    K: sizes.KeyWidth = None,
    V: sizes.ValueWidth = None,
    dtype: OwnTypes = None,
    model: model_bench.Model = None,
    layers: model_bench.Layers = None,
    compare: compare_command.Reports = None,
    against: against_command.Folder = None,
    json: Written = None,
    plot: Picture = None,
    report_to: report_option.Folder = None,
) -> None:
    """Time every suite next to its peers, results checked first, or a call of one's own. Exit status 1 when one is
    wrong."""
    check_device(device)
    writable(json, "--json")
    drawable(plot, "--plot")
    report_option.check(report_to, report_option.BENCH)
    if compare is not None:
        compare_command.run(context, compare, json)
        return
    if model is not None or layers is not None:
        model_bench.run(context, model, layers, json)
        return
    own = {"B": B, "H": H, "HV": HV, "K": K, "V": V}
    try:
        cases = chosen(context, suite, case, quick, device, own_cases(op, rule, dtype, T, own))
        if against is not None:
            against_command.run(context, against, cases, quick, threads, device, json)
            return
        report = run(threads=threads, quick=quick, device=device, json=json, cases=cases)
    except ValueError as error:
        raise usage(error) from error
    show(report)
    write_json(json, to_dict(report))
    if plot is not None:
        draw(report, plot)
    report_option.write_bench(report, report_to)
    finish(report.passed)


def own_cases(
    ops: list[str] | None,
    rules: list[str] | None,
    dtypes: list[str] | None,
    lengths: list[int] | None,
    own: dict[str, int | None],
) -> tuple[Case, ...]:
    """The cases of one's own that the options describe: each operation, length, rule and type. None without an
    option."""
    if not (ops or rules or dtypes or lengths or any(size is not None for size in own.values())):
        return ()
    sizes.one_of("--op", ops or (), OPS)
    sizes.one_of("--rule", rules or (), RULES)
    sizes.one_of("--dtype", dtypes or (), sizes.TYPES)
    found = []
    for op, T in itertools.product(ops or OPS[:1], lengths or (None,)):
        shape = sizes.own_shape({**own, "T": T}, USUAL_STEP if op == "decode" else USUAL)
        for rule, dtype in itertools.product(rules or RULES, dtypes or ("float32",)):
            case = Case(cast(Op, op), RULES[rule], shape, sizes.TYPES[dtype])
            sizes.fits_memory(CHECKED * case.bytes, shape, "the call and the check of its result take")
            found.append(case)
    return tuple(dict.fromkeys(found))


def chosen(
    context: typer.Context, suite: str, names: list[str] | None, quick: bool, device: str, own: tuple[Case, ...]
) -> tuple[AnyCase, ...]:
    """The cases of one's own, or those of the suite whose name contains one of `names`; both together are wrong
    usage."""
    if not own:
        return select(suite, quick, device, names or ())
    for option in ("suite", "case"):
        if given(context, option):
            raise typer.BadParameter(
                "got a choice of suites beside a call of one's own; expected one of the two", param_hint=f"--{option}"
            )
    return own


def run(
    suite: str = "all",
    quick: bool = False,
    threads: int = 1,
    device: str = "cpu",
    json: Path | None = None,
    cases: tuple[AnyCase, ...] | None = None,
) -> Report:
    """`bench` under a progress bar, of a suite or of these cases; what is there after each case goes to `json` at once.
    Unless quick, cases on a CPU run in processes of their own."""
    if threads < 1:
        raise ValueError(f"threads: got {threads}; expected at least 1")
    cases = select(suite, quick, device) if cases is None else cases

    def keep(report: Report) -> None:
        write_json(json, to_dict(report), quiet=True)

    with progress_bar() as progress:
        apart = not quick and device == "cpu"
        return bench_cases(cases, quick, threads, device, progress, so_far=keep, apart=apart)


def to_dict(report: Report) -> dict[str, Any]:
    """The report for JSON."""
    return {"command": "bench", **report.to_dict()}


def draw(report: Report, path: Path) -> None:
    """The plot, if there is something to draw; matplotlib is only imported here."""
    if all(row.milliseconds is None for row in report.rows):
        console.print("[yellow]no case was timed: nothing to draw[/]")
        return
    from .plot import draw_report

    draw_report(report, path)
    print_written(path)


def show(report: Report) -> None:
    """The table, where it was measured, and what is red."""
    for table in tables(report):
        console.print(table)
    where = report.environment
    peak = "" if report.peak_gflops is None else f", peak of a core {report.peak_gflops:.0f} GFLOP/s (float32)"
    if report.peak_gigabytes_per_second is not None and report.peak_gflops is not None:
        tera, giga = report.peak_gflops / 1e3, report.peak_gigabytes_per_second
        peak = f", large bfloat16 products {tera:.0f} TFLOP/s, large copies {giga:.0f} GB/s"
    console.print(f"[dim]{where['device']}, {where['threads']} thread(s){peak}, {where['date'][:16]}[/]")
    console.print("[dim]x: how many times faster sleepkern is, median over turns of one run[/]")
    for row in report.rows:
        if not row.passed:
            wrong = f"relative error {row.error:.1e} > {row.tolerance:.0e}"
            console.print(f"[red]{row.case}: not timed, {wrong}[/]")
        for peer in row.peers:
            if peer.error is not None and peer.note is not None:
                console.print(f"[yellow]{row.case}: {escape(f'{peer.name} is {peer.note}')}[/]")


def tables(report: Report) -> list[Table]:
    """One line per case: figures, then a column per peer that was timed, and one for ours under other settings.

    Peers for which the console has no room come in tables of their own below, so that no figure is cut; these list only
    the cases that have such a peer.
    """
    theirs = [[name] for name in report.peer_names if not name.startswith(OURS)]
    others = [name for name in report.peer_names if name.startswith(OURS)]
    left = theirs + ([others] if others else [])
    found: list[Table] = []
    while left or not found:
        first, shown = not found, len(left)
        while shown > 1 and not _fits(_table(report, left[:shown], first)):
            shown -= 1
        if first and left and not _fits(_table(report, left[:shown], first)):
            shown = 0
        found.append(_table(report, left[:shown], first))
        left = left[shown:]
    return found


def _fits(table: Table) -> bool:
    return Measurement.get(console, console.options.update(max_width=10_000), table).maximum <= console.width


def _table(report: Report, peers: list[list[str]], figures: bool) -> Table:
    """Cases by peers, each the names that share a column; with the figures of the cases or without."""
    bandwidth = figures and report.peak_gigabytes_per_second is not None
    result = Table(title=TITLE if figures else None, box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    result.add_column("case", no_wrap=True)
    headings = ["ms", "GFLOP\n/s", "of\npeak"] if figures else []
    headings += ["of\nbytes/s"] if bandwidth else []
    for heading in [*headings, *map(_heading, peers)]:
        result.add_column(heading, justify="right", no_wrap=True)
    for row in report.rows:
        ratios = [_ratio(row, names) for names in peers]
        if not figures and set(ratios) <= {NOT_TIMED}:
            continue
        cells = list(_figures(row)) if figures else []
        if bandwidth:
            cells.append("" if row.share_of_bandwidth is None else f"{row.share_of_bandwidth:.0%}")
        result.add_row(row.rule + "\n  " + row.details, *cells, *ratios)
    return result


def _heading(names: list[str]) -> str:
    if names[0].startswith(OURS):
        return "x ours,\n" + "\n".join(name.removeprefix(OURS) for name in names)
    return "x " + names[0].replace("transformers", "trans-\nformers").replace(" ", "\n")


def _figures(row: BenchRow) -> tuple[str, ...]:
    if row.milliseconds is None:
        return "[red]wrong[/]", "", ""
    share = "" if row.share_of_peak is None else f"{row.share_of_peak:.0%}"
    return three_digits(row.milliseconds), "" if row.gflops is None else f"{row.gflops:.1f}", share


def _ratio(row: BenchRow, names: list[str]) -> str:
    for peer in row.peers:
        if peer.name in names and peer.milliseconds is not None:
            return "[yellow]wrong[/]" if peer.ratio is None else f"{peer.ratio:.2f}"
    return NOT_TIMED
