"""The command line, `python -m sleepkern` or `sleepkern`: one file per command."""

from __future__ import annotations

import io
import os
import sys
from typing import Annotated

import typer

from ..backends.cpu import recurrence as cpu
from ..dispatch import requested
from ..version import __version__
from . import bench, curves, demo, explain, heartbeat, info, study, train, tune, verify
from .output import console, usage

app: typer.Typer = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Kernels for fast weights and sleep: check them, time them, ask them.",
)
for _module in (verify, bench, explain, info, tune, train, curves, demo):
    app.command(_module.__name__.rpartition(".")[2])(_module.command)
app.add_typer(study.app, name="study")


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(__version__)
        raise typer.Exit


@app.callback()
def _options(
    context: typer.Context,
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="print the version and exit")
    ] = False,
) -> None:
    """Kernels for fast weights and sleep: check them, time them, ask them."""
    try:
        requested(cpu.NAME)
    except ValueError as error:
        raise usage(error) from error
    context.with_resource(heartbeat.heartbeat(console, f"{context.invoked_subcommand} is at work"))


def main() -> None:
    """Entry point. Exit status 0: all green; 1: a check is red, or a file cannot be written; 2: called wrongly."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # what an encoding lacks is shown as ?, not as a traceback
            stream.reconfigure(errors="replace")
    try:
        try:
            app()
        finally:
            sys.stdout.flush()
    except OSError as error:
        sys.stderr.write(f"sleepkern: {error}\n")
        _discard_output()
        sys.exit(1)


def _discard_output() -> None:
    """Send what stdout still holds to nowhere: the flush at exit would fail on it once more."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, sys.stdout.fileno())
    os.close(nowhere)
