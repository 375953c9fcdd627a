"""`sleepkern train`: train a small model on a task that needs several steps of computation."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import torch.distributed as dist
import typer
from rich.progress import TimeRemainingColumn
from rich.table import Table

from ..experiments.training import CONFIGURATIONS, Run, Training, configuration, current_placement
from ..experiments.training.estimate import estimate
from ..experiments.training.expected import compare, expected_losses
from ..experiments.training.logs import CHECKPOINT, LOG, default_label, log_content
from ..measure.timing import threads
from .output import bars, check_device, console, named_path, usage, writable, write_json


def command(
    task: Annotated[str | None, typer.Argument(help=", ".join(CONFIGURATIONS))] = None,
    size: Annotated[str, typer.Option(help="mini, gpu or paper")] = "mini",
    passes: Annotated[int, typer.Option("--passes", "-N", min=1, help="over each window")] = 4,
    feedback: Annotated[str, typer.Option(help="what a pass starts from: raw, reinject or replay")] = "reinject",
    eviction: Annotated[str, typer.Option(help="hard or sliding")] = "hard",
    settled: Annotated[
        float | None, typer.Option("--tol", "--settled", help="stop passes that change the fast weights by less")
    ] = None,
    checkpoint: Annotated[bool, typer.Option(help="keep only what lies between passes; run each again backwards")] = (
        False
    ),
    steps: Annotated[int | None, typer.Option(min=1, help="default: the configuration's")] = None,
    batch: Annotated[int | None, typer.Option(min=1, help="problems a step; default: the configuration's")] = None,
    seconds: Annotated[
        float | None, typer.Option(min=0, help="end this slice after so long, with a checkpoint; --resume goes on")
    ] = None,
    seed: Annotated[int, typer.Option(help="of weights and problems")] = 0,
    device: Annotated[str, typer.Option(help="cpu or cuda")] = "cpu",
    distributed: Annotated[str, typer.Option(help="single, or under torchrun ddp or fsdp")] = "single",
    cores: Annotated[int, typer.Option("--threads", min=1, help="of torch, on the CPU")] = 1,
    out: Annotated[
        Path | None, typer.Option(parser=named_path, metavar="PATH", help="folder for log.json and checkpoint.pt")
    ] = None,
    resume: Annotated[bool, typer.Option(help="go on from the checkpoint in --out, if there is one")] = False,
    label: Annotated[str | None, typer.Option(help="name of the run in plots")] = None,
    listed: Annotated[bool, typer.Option("--list", help="show what can be trained, with estimates of cost")] = False,
) -> None:
    """Train, measure, write a log and checkpoints; --list shows what can be trained."""
    if listed or task is None:
        console.print(configurations_table())
        return
    check_device(device)
    writable(out, "--out", folder=True)
    try:
        given: dict[str, Any] = {"feedback": feedback, "eviction": eviction, "settled": settled}
        chosen = configuration(task, size)
        chosen = chosen if batch is None else replace(chosen, batch=batch)
        run = Run(chosen, passes, checkpoint=checkpoint, seed=seed, steps=steps, **given)
        with threads(cores):
            training = Training(run, current_placement(device, distributed))
            training.sleep_module.session()
            if resume and out is not None and (out / CHECKPOINT).is_file():
                training.load(out / CHECKPOINT)
            train(training, out, label or default_label(passes, feedback, eviction, settled), seconds)
    except ValueError as error:
        raise usage(error) from error
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def train(training: Training, out: Path | None, label: str, seconds: float | None = None) -> None:
    """Train with a progress bar, to the end or for so many seconds.

    A log and a checkpoint are written after each measurement and at the end.
    """
    with _bar(training, label) as bar:

        def save(now: Training) -> None:
            if out is None:
                return
            now.save(out / CHECKPOINT)
            if now.placement.is_main:
                write_json(out / LOG, log_content(now, label), quiet=True)

        training.train(on_eval=save, on_step=bar, seconds=seconds)
        if training.done < training.run.length:
            save(training)
        elif out is not None and training.placement.is_main:  # a finished run may have lost its log
            write_json(out / LOG, log_content(training, label), quiet=True)
    if training.placement.is_main:
        console.print(accuracy_line(training))
        _print_expected(training)
        if training.done < training.run.length:
            console.print(
                f"{training.done} of {training.run.length} steps are done; the same command with --resume goes on"
            )


def _print_expected(training: Training) -> None:
    """A table of losses beside those of the small run on a CPU, where there is one."""
    expected = expected_losses(training.run)
    rows = [] if expected is None else compare(training.losses, expected)
    if expected is None or not rows:
        return
    table = Table(title=f"losses beside a CPU run of {expected['batch']} problems a step")
    for heading in ("step", "loss", "CPU run", ""):
        table.add_column(heading, justify="right")
    for step, loss, small, far in rows:
        table.add_row(str(step), f"{loss:.3f}", f"{small:.3f}", "[red]far above[/]" if far else "")
    console.print(table)


def accuracy_line(training: Training) -> str:
    """One line with the last measurement."""
    if not training.history:
        return "not measured yet"
    last = training.history[-1]
    shares = "  ".join(f"{level}: {share:.3f}" for level, share in last["accuracy"].items())
    return f"step {last['step']}, loss {last['loss']:.3f}, {training.task.level_name} {shares}"


@contextmanager
def _bar(training: Training, label: str) -> Iterator[Any]:
    with bars(TimeRemainingColumn(), hidden=not training.placement.is_main) as bar:
        row = bar.add_task(label, total=training.run.length, completed=training.done)

        def move(now: Training) -> None:
            bar.update(row, completed=now.done, description=f"{label}  {accuracy_line(now)}")

        yield move


def configurations_table() -> Table:
    """A table of every configuration with its estimated cost."""
    table = Table(title="what can be trained; tokens and flop are estimates by arithmetic, for N = 4")
    for heading in ("task", "size", "model", "parameters", "batch", "steps", "tokens", "PFLOP"):
        table.add_column(heading, justify="left" if heading in ("task", "size", "model") else "right")
    for task, sizes in CONFIGURATIONS.items():
        for size, row in sizes.items():
            found = estimate(row, 4)
            table.add_row(
                task, size, f"{row.blocks} blocks {row.pattern}, d = {row.width}, L = {row.task.window}",
                f"{found.parameters / 1e6:.2f} M", str(row.batch), str(row.steps), f"{found.tokens / 1e6:.3g} M",
                f"{found.flop / 1e15:.3g}",
            )  # fmt: skip
    return table
