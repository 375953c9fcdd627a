"""`sleepkern explain`: which kernel would a call take, and why not the others?"""

from __future__ import annotations

from typing import Annotated

import typer
from rich.table import Table

from .. import settings
from ..dispatch import explain_problem, other_families
from ..measure.cases import Case, Op
from ..problems.recurrence import FLOATS
from ..rules import RULES
from ..testing import Shape
from .output import console, finish

TYPES = {str(dtype).removeprefix("torch."): dtype for dtype in FLOATS}


def command(
    rule: Annotated[str, typer.Argument(help=", ".join(RULES))] = "gated_delta_rule",
    B: Annotated[int, typer.Option("--B", min=1, help="batch")] = 1,
    T: Annotated[int, typer.Option("--T", min=0, help="tokens")] = 2048,
    H: Annotated[int, typer.Option("--H", min=1, help="key heads")] = 16,
    HV: Annotated[
        int | None, typer.Option("--HV", min=1, help="value heads, a multiple of H", show_default="H")
    ] = None,
    K: Annotated[int, typer.Option("--K", min=1, help="key width")] = 128,
    V: Annotated[int, typer.Option("--V", min=1, help="value width")] = 128,
    passes: Annotated[int, typer.Option(min=1, help="passes of sleep_ingest over the window")] = 1,
    dtype: Annotated[str, typer.Option(help=", ".join(TYPES))] = "float32",
    device: Annotated[str, typer.Option(help="cpu or cuda; need not be there")] = "cpu",
    backward: Annotated[bool, typer.Option("--backward", help="count the work of the gradients too")] = False,
) -> None:
    """Which backend and kernel a call of this shape takes, why not the others, how much work it
    is."""
    choices = (("rule", rule, RULES), ("--dtype", dtype, TYPES), ("--device", device, ("cpu", "cuda")))
    for name, value, known in choices:
        if value not in known:
            raise typer.BadParameter(f"got {value!r}; expected one of {', '.join(known)}", param_hint=name)
    HV = H if HV is None else HV
    if HV % H:
        raise typer.BadParameter(f"got {HV}; expected a multiple of H = {H}", param_hint="--HV")
    shape = Shape(B=B, T=T, H=H, HV=HV, K=K, V=V)
    op: Op = "train" if backward else "ingest" if passes > 1 else "forward"
    case = Case(op, RULES[rule], shape, TYPES[dtype], passes=passes)
    explained = explain_problem(case.problem(device))
    table = Table(title=f"{case.name} on {device}")
    table.add_column("backend")
    table.add_column("")
    for name, reason in explained.reasons.items():
        chosen = name == explained.chosen
        table.add_row(name, f"[green]chosen: {explained.kernel}[/]" if chosen else reason or "could")
    console.print(table)
    for family, what in other_families().items():
        console.print(f"SLEEPKERN_BACKEND={settings.BACKEND}: {family} by {what}", soft_wrap=True)
    console.print(f"work: {work(case)}")
    finish(explained.chosen is not None)


def work(case: Case) -> str:
    """Operations and bytes, as measure/flops.py counts them."""
    gflop, megabytes = case.flops * 1e-9, case.bytes * 1e-6
    intensity = case.flops / max(case.bytes, 1)
    return f"{gflop:.3g} GFLOP, {megabytes:.3g} MB at least, {intensity:.3g} FLOP per byte"
