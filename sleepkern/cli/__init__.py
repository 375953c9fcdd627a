"""The command line, `python -m sleepkern` or `sleepkern`: one file per command."""

from __future__ import annotations

import typer

from . import bench, curves, demo, explain, info, study, train, tune, verify

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Kernels for fast weights and sleep: check them, time them, ask them.",
)
for _module in (verify, bench, explain, info, tune, train, curves, demo):
    app.command(_module.__name__.rpartition(".")[2])(_module.command)
app.add_typer(study.app, name="study")


def main() -> None:
    """Entry point. Exit status 0: all green; 1: a check is red; 2: called wrongly."""
    app()
