"""`sleepkern study`: trainings that show the use of N passes, and their cost."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from ..experiments.training import configuration
from ..experiments.training.costs import step_costs, sweep_tol, throughput
from ..experiments.training.logs import Log, read_logs
from ..experiments.training.study import N1, N4, Study, gaps, markdown, seeds_of, summary
from ..files import write_text
from ..measure.environment import environment
from ..measure.timing import threads
from .curves import draw_curves
from .output import bars, console, finish, named_path, progress_bar, usage, writable, write_json

TRAINER = (sys.executable, "-m", "sleepkern", "train")

app: typer.Typer = typer.Typer(no_args_is_help=True, help="What N passes are good for, and what they cost.")


@app.command("mini-depo")
def mini_depo(
    out: Annotated[
        Path,
        typer.Option(
            parser=named_path, metavar="PATH", help="folder for all runs and the results; runs finished there stay"
        ),
    ],
    seeds: Annotated[str, typer.Option(help="numbers with commas between them")] = "0,1,2",
    steps: Annotated[int | None, typer.Option(min=1, help="of all rows but the longer one")] = None,
    processes: Annotated[int, typer.Option(min=1, help="trainings side by side, one thread each")] = 2,
) -> None:
    """N = 1, 2 and 4, replay only, and N = 1 with the compute of N = 4. Exit status 1 unless N = 4 is clearly ahead."""
    try:
        study = Study(out, seeds=seeds_of(seeds), steps=steps)
    except ValueError as error:
        raise usage(error) from error
    writable(out, "--out", folder=True)
    finish(run_study(study, processes)["passed"])


@app.command("costs")
def costs(
    out: Annotated[Path, typer.Option(parser=named_path, metavar="PATH", help="folder for costs.json and costs.md")],
    trained: Annotated[
        Path | None,
        typer.Option(
            parser=named_path,
            metavar="PATH",
            help="folder of a trained mini-Depo, to try values of tol on",
        ),
    ] = None,
) -> None:
    """Seconds and memory of a training step by passes, checkpoints and eviction; tokens a second by backend."""
    writable(out, "--out", folder=True)
    with progress_bar() as progress, threads(1):
        steps = step_costs(progress)
        rates = [throughput(configuration("depo", "mini"), passes) for passes in (1, 4)]
        try:
            settled = sweep_tol(trained) if trained is not None else []
        except ValueError as error:
            raise usage(error) from error
        where = environment()
    found = {"command": "costs", "environment": where, "steps": steps, "throughput": rates, "adaptive": settled}
    text = costs_markdown(found)
    console.print(text)
    write_json(out / "costs.json", found)
    write_text(out / "costs.md", text)


def costs_markdown(found: dict[str, Any]) -> str:
    """The tables of `costs`."""
    names = ("passes", "feedback", "eviction", "checkpoint", "settled")
    first = {"feedback": "reinject", "eviction": "hard", "checkpoint": False, "settled": None}
    lines = ["| N | feedback | eviction | checkpoint | tol | ms a step | peak MB |", "|" + "---|" * 7]
    for row in found["steps"]:
        cells = [str({**first, **row}[name]) for name in names]
        lines.append("| " + " | ".join([*cells, f"{row['seconds'] * 1e3:.0f}", f"{row['bytes'] / 1e6:.0f}"]) + " |")
    lines += ["", "| N | tokens/s, best backend | tokens/s, chunked | faster |", "|" + "---|" * 4]
    for row in found["throughput"]:
        rates = row["tokens_per_second"]
        lines.append(f"| {row['passes']} | {rates['ours']:.0f} | {rates['chunked']:.0f} | {row['faster']:.2f} |")
    if found["adaptive"]:
        lines += ["", "| tol | passes made | accuracy by level |", "|" + "---|" * 3]
        for row in found["adaptive"]:
            shares = ", ".join(f"{level}: {share:.3f}" for level, share in row["accuracy"].items())
            lines.append(f"| {row['settled']} | {row['passes_made']:.2f} | {shares} |")
    return "\n".join(lines) + "\n"


def run_study(study: Study, processes: int = 2) -> dict[str, Any]:
    """Train the unfinished runs with progress bars; show the results, and write study.json, study.md and study.png."""
    with watching(study) as watch:
        study.run(TRAINER, processes, watch)
    found = {**summary(study), "environment": environment()}
    console.print(table(study))
    write_json(study.folder / "study.json", found)
    write_text(study.folder / "study.md", markdown(study))
    draw_curves(read_logs([study.folder_of(*job) for job in study.jobs()]), study.folder / "study.png")
    return found


@contextmanager
def watching(study: Study) -> Iterator[Any]:
    """A context with a progress bar for each run; its value is the function that updates the bars."""
    with bars() as bar:
        tasks = [bar.add_task(f"{row.name}, seed {seed}", total=study.steps_of(row)) for row, seed in study.jobs()]

        def watch(logs: list[Log | None]) -> None:
            for task, (row, seed), log in zip(tasks, study.jobs(), logs, strict=True):
                if log is not None:
                    shares = " ".join(f"{level}: {share:.2f}" for level, share in log.accuracy.items())
                    bar.update(task, completed=log.steps, description=f"{row.name}, seed {seed}  {shares}")

        yield watch


def table(study: Study) -> Table:
    """A table of the accuracy by level of every run, with chance."""
    lines = [line.strip("| ").split(" | ") for line in markdown(study).splitlines()]
    shown = Table(title=f"{study.task} {study.size}: share of answers right in test problems")
    for heading in lines[0]:
        shown.add_column(heading, justify="left" if heading == "row" else "right")
    for line in lines[2:]:
        shown.add_row(*(cell.replace("**", "") for cell in line))
    found = ", ".join(f"{gap:+.3f} (seed {seed})" for seed, gap in gaps(study).items())
    shown.caption = f"{N4.name} minus {N1.name} over all but the easiest, equal steps: {found}"
    return shown
