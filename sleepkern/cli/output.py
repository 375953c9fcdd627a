"""What the commands share: the console, progress bars, JSON files, the checks of --device and of where to write, and
the exit status."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import typer
from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, TextColumn, TimeElapsedColumn

from ..files import report_text, write_text
from ..testing.verify import Progress as OnProgress
from .heartbeat import LogConsole

console: LogConsole = LogConsole()


@contextmanager
def bars(*more: ProgressColumn, hidden: bool = False) -> Iterator[Progress]:
    """Bars on a terminal, gone when done; in a log the lines of the heartbeat tell what they would show.

    Args:
        more: columns after the usual ones.
        hidden: show nothing, and let the console be quiet too.
    """
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), *more)
    was_quiet, console.quiet = console.quiet, hidden or console.quiet
    try:
        bar = Progress(*columns, console=console, transient=True, disable=hidden)
        with bar, console.doing(lambda: _told(bar)):
            yield bar
    finally:
        console.quiet = was_quiet


def _told(bar: Progress) -> str:
    """What the bars under way show; the first that is left where none is."""
    left = [task for task in bar.tasks if not task.finished]
    shown = [task for task in left if task.completed] or left[:1]
    counts = ("" if task.total is None else f", {task.completed:.0f} of {task.total:.0f}" for task in shown)
    return "; ".join(task.description + count for task, count in zip(shown, counts, strict=True))


@contextmanager
def progress_bar() -> Iterator[OnProgress]:
    """A bar, gone when done, and the function that moves it: (text, done, total)."""
    with bars() as bar:
        task = bar.add_task("starting", total=None)

        def report(text: str, done: int, total: int) -> None:
            bar.update(task, description=text, completed=done, total=total)

        yield report


@contextmanager
def status(text: str) -> Iterator[Callable[[str], None]]:
    """A line of what is being done, gone when done, and the function that changes it."""
    shown = [text]
    with console.status(text) as spinner, console.doing(lambda: shown[0]):

        def change(text: str) -> None:
            shown[0] = text
            spinner.update(text)

        yield change


def write_json(path: Path | None, content: dict[str, Any], quiet: bool = False) -> None:
    """Write the content to `path`, if one is given, whole or not at all.

    Missing folders are made. Infinities and NaN become strings, because JSON has no numbers for them.
    """
    if path is None:
        return
    write_text(path, report_text(_finite(content)))
    if not quiet:
        print_written(path)


def print_written(path: Path) -> None:
    """Name a file that was written."""
    console.print(f"wrote {path}", soft_wrap=True, markup=False)


def three_digits(value: float | None) -> str:
    """A number of a table, rounded to three digits or to a whole number above 100; "-" for None."""
    return "-" if value is None else f"{value:.0f}" if value >= 100 else f"{value:.3g}"


def check_device(device: str) -> str:
    """`device` when it is cpu or a CUDA device that torch sees; a usage error otherwise."""
    kind, _, index = device.partition(":")
    if kind not in ("cpu", "cuda") or not (index == "" or index.isdigit()):
        raise typer.BadParameter(f"got {device!r}; expected cpu or cuda", param_hint="--device")
    if kind == "cuda" and not torch.cuda.is_available():
        raise typer.BadParameter("torch sees no CUDA device here", param_hint="--device")
    if index and int(index) >= torch.cuda.device_count():
        seen = torch.cuda.device_count()
        raise typer.BadParameter(f"got {device}; expected a number below {seen}, the devices", param_hint="--device")
    return device


def writable(path: Path | None, option: str, folder: bool = False) -> None:
    """A usage error of `option` unless a file, or files in a folder, can be written there; leaves nothing behind.

    Commands call it before the work, so that hours of it do not end in a traceback.
    """
    if path is None:
        return
    try:
        if path.exists() and not folder:
            path.open("ab").close()
        else:
            above = path.parents if not folder else (path, *path.parents)
            tempfile.TemporaryFile(dir=next(place for place in above if place.exists())).close()
    except OSError as error:
        message = f"got {path}; expected a {'folder' if folder else 'file'} that can be written to: {error.strerror}"
        raise typer.BadParameter(message, param_hint=option) from error


def drawable(path: Path | None, option: str) -> None:
    """`writable`, and of a format that matplotlib writes, which it takes from the name."""
    if path is None:
        return
    from matplotlib.backend_bases import FigureCanvasBase

    known = sorted(set(FigureCanvasBase.filetypes) - {"pgf"})  # which needs LaTeX
    if path.suffix.lower().removeprefix(".") not in known:
        expected = ", ".join(f".{suffix}" for suffix in known)
        raise typer.BadParameter(f"got {path}; expected a name that ends in one of {expected}", param_hint=option)
    writable(path, option)


def named_path(text: str | Path) -> Path:
    """A path of the command line. An empty one, as from a variable that is not set, is a usage error."""
    if not str(text):
        raise typer.BadParameter("got an empty name; expected a path")
    return Path(text)


def given(context: typer.Context, name: str) -> bool:
    """Tells whether the parameter was given on the command line."""
    source = context.get_parameter_source(name)
    return source is not None and source.name == "COMMANDLINE"


def option_of(context: typer.Context, name: str) -> str:
    """The option of a parameter, as the user writes it."""
    found: str = next(parameter.opts[0] for parameter in context.command.params if parameter.name == name)
    return found


def usage(error: ValueError) -> typer.BadParameter:
    """A ValueError of the library as a usage error of the command line."""
    return typer.BadParameter(str(error))


def finish(passed: bool) -> None:
    """Exit with status 1 unless passed."""
    if not passed:
        raise typer.Exit(1)


def _finite(x: Any) -> Any:
    if isinstance(x, dict):
        return {key: _finite(value) for key, value in x.items()}
    if isinstance(x, (list, tuple)):
        return [_finite(value) for value in x]
    if isinstance(x, float) and not abs(x) < float("inf"):
        return str(x)
    return x
