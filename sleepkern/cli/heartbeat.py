"""The heartbeat: a line of a log that says what a command is doing, each time that the command was silent for long."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from rich.console import Console

SILENCE = 8.0
"""Seconds without output after which a log gets a line; 10 pass at most, also on a machine that is busy."""


class LogConsole(Console):
    """A console that knows what is being done, and when it wrote last."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.wrote: float = 0.0
        self.under_way: list[Callable[[], str]] = []

    def print(self, *objects: Any, **options: Any) -> None:
        """Print as any console does, and note the time."""
        super().print(*objects, **options)
        self.wrote = time.monotonic()

    def on_broken_pipe(self) -> None:
        """Raise the BrokenPipeError that rich is about to handle.

        rich makes the console quiet and ends the thread that prints. If that thread is the heartbeat, the command goes
        on without output, and its exit status is 0.
        """
        raise

    @contextmanager
    def doing(self, what: Callable[[], str]) -> Iterator[None]:
        """Name what is being done while the block lasts; a block inside of it adds its own text.

        Args:
            what: called from another thread for the text, each time that a line is due.
        """
        self.under_way.append(what)
        try:
            yield
        finally:
            self.under_way.remove(what)


@contextmanager
def heartbeat(console: LogConsole, command: str) -> Iterator[None]:
    """Print a line to `console` after each SILENCE seconds without output, unless it is a terminal, which has bars.

    Args:
        console: prints each object in one piece, so that no line comes into a table.
        command: what the lines say when nothing else is being done.
    """
    if console.is_terminal:
        yield
        return
    done = threading.Event()
    console.wrote = time.monotonic()
    thread = threading.Thread(target=_beat, args=(console, command, done), name="heartbeat", daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()


def _beat(console: LogConsole, command: str, done: threading.Event) -> None:
    began = time.monotonic()
    while not done.wait(max(0.0, console.wrote + SILENCE - time.monotonic())):
        now = time.monotonic()
        if now < console.wrote + SILENCE:
            continue
        text = ", ".join(filter(None, (what() for what in tuple(console.under_way)))) or command
        try:
            console.print(f"[{clock(now - began)}] {text}", soft_wrap=True, markup=False, highlight=False)
        except (OSError, ValueError):  # the command itself meets the same fault when it prints, and reports it
            return


def clock(seconds: float) -> str:
    """Minutes and seconds, such as 2:05."""
    return f"{int(seconds) // 60}:{int(seconds) % 60:02}"
