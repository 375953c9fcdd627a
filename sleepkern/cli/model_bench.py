"""`sleepkern bench --model`: a hybrid model with and without the patch."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from rich import box
from rich.markup import escape
from rich.table import Table

from ..measure.models import LengthRow, ModelReport, Phase, bench_model
from ..measure.models.sources import find_model, needed_bytes
from . import sizes
from .output import console, finish, given, option_of, progress_bar, three_digits, usage, write_json

_HELP = "a hybrid model with and without the patch: a family of patch, a config.json, or a folder with one"
Model = Annotated[str | None, typer.Option(metavar="FAMILY|PATH", help=_HELP)]
Layers = Annotated[int | None, typer.Option(metavar="N", help="keep as many layers of the model")]
BESIDE = ("model", "layers", "B", "T", "dtype", "threads", "device", "quick", "json")
"""The options that --model allows."""
OTHERS = [f"--{name}" for name in BESIDE[1:]]


def run(context: typer.Context, model: str | None, layers: int | None, json: Path | None) -> None:
    """Measure the model, show it and write it. Exit status 1 when logits differ with the patch."""
    if model is None:
        raise typer.BadParameter("got it without --model, whose layers it counts", param_hint="--layers")
    for name in context.params:
        if name not in BESIDE and given(context, name):
            message = f"got it beside --model, which times a whole model; expected at most {', '.join(OTHERS)}"
            raise typer.BadParameter(message, param_hint=option_of(context, name))
    report = _measured(model, layers, context.params)
    show(report)
    write_json(json, {"command": "bench --model", **report.to_dict()})
    finish(report.passed)


def _measured(model: str, layers: int | None, options: dict[str, Any]) -> ModelReport:
    types, lengths = options["dtype"] or ["float32"], options["T"]
    sizes.one_of("--dtype", types, sizes.TYPES)
    if len(types) > 1:
        raise typer.BadParameter(f"got {', '.join(types)}; expected one type beside --model", param_hint="--dtype")
    batch, device, dtype = options["B"] or 1, options["device"], sizes.TYPES[types[0]]
    for name, value in (("B", options["B"]), *(("T", tokens) for tokens in lengths or ())):
        if value is not None and value < 1:
            raise typer.BadParameter(f"got {value}; expected at least 1", param_hint=f"--{name}")
    try:
        source = find_model(model, layers)
        needed = needed_bytes(source, dtype, batch, max(lengths or (0,)))
        count = f"{source.parameters / 1e9:.2f} billion parameters in {types[0]}, for which the measurement takes"
        sizes.refuse_too_large(needed, count, "a model (--layers), --B and --T", "--model", device)
        with progress_bar() as progress:
            return bench_model(
                model, lengths, batch, dtype, layers, options["threads"], device, options["quick"], progress=progress
            )
    except (ValueError, ImportError) as error:
        raise usage(ValueError(str(error))) from error


def show(report: ModelReport) -> None:
    """The tables, what was measured and where, and what is red."""
    timed = [row for row in report.rows if row.prefill is not None]
    if timed:
        console.print(f"[italic]{escape(report.model)}: tokens a second, without and with the patch[/]")
        console.print(_speeds(report, timed))
        console.print("[italic]MB: the cache after T tokens, and the peak beside the weights[/]")
        console.print(_memory(timed))
    if any(row.sleep for row in timed):
        console.print("[italic]seconds of a sleep over one window of T tokens, N passes, with the patch[/]")
        console.print(_sleeps(timed))
    if report.no_sleep is not None:
        console.print(f"[yellow]no sleep for this family: {escape(report.no_sleep)}[/]")
    _explain(report)
    for row in report.rows:
        if not row.passed:
            wrong = f"the logits differ with the patch, relative error {row.error:.1e} > {row.tolerance:.0e}"
            console.print(f"[red]T={row.tokens}: not timed, {wrong}[/]")


def _speeds(report: ModelReport, rows: list[LengthRow]) -> Table:
    table = _table("T", "", "without", "with", "x")
    for row in rows:
        for name, phase in (("prefill", row.prefill), (f"decode {report.decoded}", row.decode)):
            if phase is not None:
                rates = (phase.stock_tokens_per_second, phase.patched_tokens_per_second)
                table.add_row(str(row.tokens), name, *map(three_digits, rates), f"{phase.ratio:.2f}")
    return table


def _memory(rows: list[LengthRow]) -> Table:
    headings = ("T", "keys,\nvalues", "fast\nweights", "prefill\nwithout", "\nwith", "decode\nwithout", "\nwith")
    table = _table(*headings)
    for row in rows:
        peaks = [size for phase in (row.prefill, row.decode) for size in _peaks(phase)]
        table.add_row(str(row.tokens), *map(_megabytes, (row.kv_bytes, row.recurrent_bytes, *peaks)))
    return table


def _sleeps(rows: list[LengthRow]) -> Table:
    slept = [row for row in rows if row.sleep]
    table = _table("T", *(heading for cost in slept[0].sleep for heading in (f"N = {cost.passes}", "x")))
    for row in slept:
        table.add_row(str(row.tokens), *(text for c in row.sleep for text in (f"{c.seconds:.3g}", f"{c.relative:.2f}")))
    return table


def _explain(report: ModelReport) -> None:
    kinds = dict.fromkeys(report.layer_types)
    layers = ", ".join(f"{report.layer_types.count(kind)} {kind or 'of one kind'}" for kind in kinds)
    size = f"{three_digits(report.parameters / 1e6)} million parameters"
    weights = "random weights" if report.weights == "random" else f"weights of {report.weights}"
    where = report.environment
    names = (name.rpartition(".modeling_")[2].partition(".")[2] or name for name in report.replaced)
    for line in (
        f"{report.class_name}, {weights}, {size}, layers: {layers}",
        f"{report.dtype}, B = {report.batch}, {where['device']}, {where['threads']} thread(s), {where['date'][:16]}",
        f"replaced by the patch: {', '.join(names)}",
        "x: with the patch over without; of a sleep, over the first N. Logits were compared before.",
    ):
        console.print(f"[dim]{escape(line)}[/]", highlight=False)
    for reason in report.left:
        console.print(f"[yellow]the original function is used: {escape(reason)}[/]")


def _table(*headings: str) -> Table:
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for heading in headings:
        table.add_column(heading, justify="right" if heading else "left", no_wrap=True)
    return table


def _peaks(phase: Phase | None) -> tuple[int | None, int | None]:
    return (None, None) if phase is None else (phase.stock_peak_bytes, phase.patched_peak_bytes)


def _megabytes(size: int | None) -> str:
    return three_digits(None if size is None else size / 1e6)
