"""`sleepkern tune`: measure which plans of the Triton kernels are fastest here, and write them as a table to ship."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.table import Table

from ..backends.triton.plan import table_rows
from ..backends.triton.plan_table import Key, TilePlan
from ..measure.candidates import read_candidates
from ..measure.environment import environment
from ..measure.tune import CHUNKS, PlanTrial, tune
from ..rules import RULES
from ..testing import Shape
from .output import check_device, console, finish, named_path, progress_bar, usage, writable, write_json

BOTH = ("gated_delta_rule", "kda")
TYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


def command(
    out: Annotated[
        Path,
        typer.Argument(
            parser=named_path, metavar="PATH", help="file to write; `backends.triton.plan.use_plans` reads it"
        ),
    ],
    rule: Annotated[list[str] | None, typer.Option(help="once per rule", show_default=", ".join(BOTH))] = None,
    dtype: Annotated[str, typer.Option(help=", ".join(TYPES))] = "bfloat16",
    K: Annotated[int, typer.Option("--K", min=1, help="key width")] = 128,
    V: Annotated[int, typer.Option("--V", min=1, help="value width")] = 128,
    T: Annotated[int, typer.Option("--T", min=1, help="tokens")] = 8192,
    H: Annotated[int, typer.Option("--H", min=1, help="heads")] = 32,
    device: Annotated[str, typer.Option(help="where to measure")] = "cuda",
    chunk: Annotated[
        list[int] | None, typer.Option(help="rows of a chunk to try", show_default=", ".join(map(str, CHUNKS)))
    ] = None,
    seconds: Annotated[float, typer.Option(help="how long a candidate is timed")] = 0.2,
    candidates: Annotated[
        Path | None, typer.Option(help="time the candidates of this file and no others (benchmarks/candidates.json)")
    ] = None,
) -> None:
    """Time every candidate of every stage on the current device; some minutes, most of them compiling."""
    for name, value, known in (("--dtype", dtype, set(TYPES)), *(("--rule", r, set(RULES)) for r in rule or ())):
        if value not in known:
            raise typer.BadParameter(f"got {value!r}; expected one of {', '.join(sorted(known))}", param_hint=name)
    check_device(device)
    writable(out, "out")
    plans: dict[Key, TilePlan] = {}
    trials: list[PlanTrial] = []
    listed = None if candidates is None else read_candidates(candidates)
    with progress_bar() as step:
        for name in rule or BOTH:
            shape = Shape(T=T, H=H, HV=H, K=K, V=V)
            try:
                found, tried = tune(RULES[name], shape, TYPES[dtype], device, chunk or CHUNKS, seconds, step, listed)
            except ValueError as error:
                raise usage(error) from error
            plans |= found
            trials += tried
    console.print(_table(plans, trials))
    rows = [
        {"key": t.key._asdict(), "stage": t.stage, "plan": str(t.plan), "seconds": t.seconds, "note": t.note}
        for t in trials
    ]
    write_json(out, {"command": "tune", "environment": environment(), "plans": table_rows(plans), "trials": rows})
    finish(bool(plans))


def _table(plans: dict[Key, TilePlan], trials: list[PlanTrial]) -> Table:
    table = Table(title="fastest plans found")
    for column in ("direction", "plan", "ms", "built-in ms", "tried", "refused"):
        table.add_column(column)
    for key, plan in plans.items():
        mine = [t for t in trials if t.key == key]
        times = [t.seconds for t in mine if t.plan == plan and t.seconds is not None]
        first = next((t.seconds for t in mine if t.stage == "all" and t.seconds is not None), None)
        shown = [f"{s * 1e3:.3f}" if s is not None else "-" for s in (min(times, default=None), first)]
        refused = sum(t.seconds is None for t in mine)
        table.add_row(key.direction, str(plan), *shown, str(len(mine)), str(refused))
    return table
