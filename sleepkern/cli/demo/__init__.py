"""`sleepkern demo`: checks, times, a patched model, a sleeping model and a training, in five to seven minutes."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.table import Table

from ...measure import environment
from ...measure.model_cases import CLOSE
from ...measure.timing import threads
from .. import bench as bench_command
from .. import verify as verify_command
from ..output import console, finish, named_path, writable, write_json
from .patched_model import same_model


def command(
    out: Annotated[Path, typer.Option(parser=named_path, metavar="PATH", help="folder for JSON and PNG files")] = Path(
        "out/demo"
    ),
    text: Annotated[Path, typer.Option(parser=named_path, metavar="PATH", help="what the model reads")] = Path(
        "README.md"
    ),
) -> None:
    """Verify and bench (quick), a model with and without sleepkern, sleep, and thinking. Exit status 1 when red."""
    if not text.is_file():
        raise typer.BadParameter(f"{text} is not a file", param_hint="--text")
    writable(out, "--out", folder=True)
    console.rule("1. Is it right?")
    with threads(1):
        rows = verify_command.run(quick=True)
    console.print(verify_command.table(rows))
    verify_command.print_details(rows)
    write_json(out / "verify.json", verify_command.to_dict(rows, "cpu"))
    console.rule("2. Is it fast?")
    report = bench_command.run(quick=True)
    bench_command.show(report)
    write_json(out / "bench.json", bench_command.to_dict(report))
    bench_command.draw(report, out / "bench.png")
    console.rule("3. In a model")
    result = _show_patched_model(text)
    write_json(
        out / "dropin.json", {"command": "dropin", "environment": environment(), "passed": same_model(result), **result}
    )
    console.rule("4. Asleep")
    slept = _show_sleep(text)
    write_json(out / "sleep.json", {"command": "sleep", "environment": environment(), **slept})
    console.rule("5. Does it think?")
    trained = _show_training(out / "thinking")
    finish(verify_command.passed(rows) and report.passed and same_model(result) and trained["passed"])


def _show_patched_model(text: Path) -> dict[str, Any]:
    from .patched_model import run_patched_model

    with console.status("loading transformers") as status:
        result = run_patched_model(text.read_bytes(), progress=status.update)
    console.print(result["model"])
    console.print(patched_model_table(result, text.name))
    if not same_model(result):
        console.print(f"[red]not the same model: expected the same bytes, and logits within {CLOSE:.0e}[/]")
    return result


def patched_model_table(result: dict[str, Any], source: str) -> Table:
    """Tokens a second with and without sleepkern, and the largest difference of the logits."""
    table = Table(title=f"{result['tokens']} bytes of {source}, {torch.get_num_threads()} thread(s)")
    for heading in ("", "stock", "with sleepkern", "faster"):
        table.add_column(heading, justify="right" if heading else "left")
    for label, key in (("reading", "read"), ("generating", "generate")):
        rates = result[f"{key}_tokens_per_second"]
        stock, patched = rates["stock"], rates["patched"]
        table.add_row(f"{label}, tokens/s", f"{stock:.0f}", f"{patched:.0f}", f"{patched / stock:.2f}x")
    difference, relative = result["max_logit_difference"], result["relative_logit_difference"]
    table.add_row("largest difference of logits", "", f"{difference:.1e}", f"{relative:.1e} of the largest")
    table.add_row("same bytes generated", "", "yes" if result["same_tokens"] else "no", "")
    return table


def _show_sleep(text: Path) -> dict[str, Any]:
    from .sleeping import run_sleep

    with console.status("building the model") as status:
        result = run_sleep(text.read_bytes(), progress=status.update)
    console.print(sleep_table(result, text.name))
    return result


def _show_training(folder: Path) -> dict[str, Any]:
    from .training import run_training

    console.print("two small models learn to follow chains x, f(x), f(f(x)), ... through what they slept over")
    return run_training(folder)


def sleep_table(result: dict[str, Any], source: str) -> Table:
    """Tokens a second and memory for each number of passes."""
    tokens, window = result["tokens"], result["window"]
    table = Table(
        title=f"sleep over {tokens} bytes of {source}, {window} at a time, {torch.get_num_threads()} thread(s)"
    )
    for heading in ("passes", "tokens/s", "memory after a quarter", "at the end", "over N plain forwards"):
        table.add_column(heading, justify="right")
    for row in result["rows"]:
        memory = (f"{size / 1e6:.2f} MB" for size in row["memory_bytes"])
        table.add_row(str(row["passes"]), f"{row['tokens_per_second']:.0f}", *memory, f"{100 * row['overhead']:+.0f} %")
    table.caption = f"keys and values of the whole text would take {result['kept_bytes'] / 1e6:.1f} MB"
    return table
