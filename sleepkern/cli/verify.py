"""`sleepkern verify`: is every backend right?"""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer
from rich import box
from rich.markup import escape
from rich.table import Table

from ..measure import environment, verify
from ..rules import RULES
from ..testing import Shape
from ..testing.verify import Row
from . import report as report_option
from . import sizes
from .output import check_device, console, finish, named_path, progress_bar, usage, writable, write_json

USUAL = Shape(T=65)
"""The sizes of a shape of one's own that are not given."""
STATES = 4
"""States that the reference keeps of each token for the gradients."""
SHOWN = 12
"""Red comparisons listed one by one under the table; the JSON has them all."""


def command(
    device: Annotated[str, typer.Option(help="cpu or cuda")] = "cpu",
    backend: Annotated[list[str] | None, typer.Option(help="only this backend; may be repeated")] = None,
    rule: Annotated[list[str] | None, typer.Option(help="only this rule; may be repeated")] = None,
    quick: Annotated[bool, typer.Option("--quick", help="fewer shapes and variants")] = False,
    dtype: Annotated[list[str] | None, typer.Option(help=f"only this type of {', '.join(sizes.TYPES)}")] = None,
    B: sizes.Batch = None,
    T: sizes.Tokens = None,
    H: sizes.KeyHeads = None,
    HV: sizes.ValueHeads = None,
    K: sizes.KeyWidth = None,
    V: sizes.ValueWidth = None,
    tf32: Annotated[bool, typer.Option("--tf32", help="let float32 products on a GPU round to tf32")] = False,
    json: Annotated[
        Path | None, typer.Option(parser=named_path, metavar="PATH", help="write every comparison to this file")
    ] = None,
    report_to: report_option.Folder = None,
) -> None:
    """Compare every backend with the float64 reference: outputs and gradients. Exit status 1 when one is wrong.

    With a size, one shape of one's own takes the place of the shape classes; sizes that are not given are B=1 T=65 H=2
    K=64 V=64, and HV is H.
    """
    check_device(device)
    sizes.one_of("--dtype", dtype or (), sizes.TYPES)
    sizes.one_of("--rule", rule or (), RULES)
    shape = own_shape({"B": B, "T": T, "H": H, "HV": HV, "K": K, "V": V})
    writable(json, "--json")
    report_option.check(report_to, report_option.VERIFY)
    try:
        rows = run(device, backend, rule, quick, dtype, tf32, shape)
    except ValueError as error:
        raise usage(error) from error
    console.print(table(rows))
    print_details(rows)
    write_json(json, to_dict(rows, device, backend))
    report_option.write_verify(rows, device, passed(rows, backend), report_to)
    finish(passed(rows, backend))


def run(
    device: str = "cpu",
    backends: list[str] | None = None,
    rules: list[str] | None = None,
    quick: bool = False,
    dtypes: list[str] | None = None,
    tf32: bool = False,
    shape: Shape | None = None,
) -> list[Row]:
    """`verify` under a progress bar, at its shape classes or at this shape."""
    types = None if not dtypes else [sizes.TYPES[name] for name in dtypes]
    shapes = None if shape is None else [shape]
    with progress_bar() as progress:
        return verify(backends, rules, types, quick, device, progress, shapes, tf32)


def own_shape(own: dict[str, int | None]) -> Shape | None:
    """The shape that the options describe; None without a size. The reference has to fit into memory."""
    if all(size is None for size in own.values()):
        return None
    shape = sizes.own_shape(own, USUAL)
    states = 8 * shape.B * shape.T * shape.HV * shape.K * shape.V
    sizes.fits_memory(STATES * states, shape, "the float64 reference takes")
    return shape


def passed(rows: list[Row], backends: list[str] | None = None) -> bool:
    """Nothing is red, something was compared, and so was every backend that was asked for by
    name."""
    ran = {row.backend for row in rows if row.refused is None}
    return all(row.passed for row in rows) and bool(ran) and ran.issuperset(backends or ())


def to_dict(rows: list[Row], device: str, backends: list[str] | None = None) -> dict[str, Any]:
    """The result for JSON; backends: those that were requested by name."""
    return {
        "command": "verify",
        "environment": environment(device),
        "passed": passed(rows, backends),
        "rows": [{**asdict(row), "worst": row.worst, "passed": row.passed} for row in rows],
    }


def table(rows: list[Row]) -> Table:
    """One line per backend and rule: the largest error of each type, and the count."""
    types = {row.dtype: row.tolerance for row in rows}
    title = "verify: largest relative error against the float64 reference"
    result = Table(title=title, box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for heading in ("backend", "rule"):
        result.add_column(heading, no_wrap=True)
    for dtype, tolerance in types.items():
        result.add_column(f"{dtype}\n<= {tolerance:.0e}", justify="right")
    result.add_column("done", justify="right")
    result.add_column("")
    order = list(dict.fromkeys(row.backend for row in rows))
    pairs = dict.fromkeys((row.backend, row.rule) for row in rows)
    for backend, rule in sorted(pairs, key=lambda pair: order.index(pair[0])):
        group = [row for row in rows if (row.backend, row.rule) == (backend, rule)]
        ran = [row for row in group if row.refused is None]
        worst = [_worst([row for row in ran if row.dtype == dtype]) for dtype in types]
        good = all(row.passed for row in ran)
        mark = "[dim]refused[/]" if not ran else "[green]pass[/]" if good else "[red]FAIL[/]"
        result.add_row(backend, rule, *worst, f"{len(ran)}/{len(group)}", mark)
    return result


def print_details(rows: list[Row]) -> None:
    """Why backends refused, and what is red."""
    for backend, reason in dict.fromkeys((row.backend, row.refused) for row in rows if row.refused):
        console.print(f"[dim]{backend} refused: {escape(str(reason))}[/]")
    red = [row for row in rows if not row.passed]
    for row in red[:SHOWN]:
        errors = ", ".join(f"{name} {e:.1e}" for name, e in row.errors.items() if not e <= row.tolerance)
        where = f"{row.backend} {row.rule} {row.dtype} {row.op} {row.shape}, {row.variant}"
        console.print(f"[red]{escape(where)}: {errors}[/]")
    if len(red) > SHOWN:
        console.print(f"[red]... and {len(red) - SHOWN} more[/]")


def _worst(rows: list[Row]) -> str:
    if not rows:
        return "-"
    text = f"{max(row.worst for row in rows):.1e}"
    return text if all(row.passed for row in rows) else f"[red]{text}[/]"
