"""`bench --report` and `verify --report`: a page of HTML that needs no other file and no network."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from ...files import write_text
from ...measure import Report, environment
from ...testing.verify import Row
from ..output import named_path, print_written, writable

BENCH, VERIFY = "bench.html", "verify.html"
"""The pages in the folder."""
NEEDED = {BENCH: ("jinja2", "matplotlib"), VERIFY: ("jinja2",)}

Folder = Annotated[
    Path | None,
    typer.Option(
        "--report", parser=named_path, metavar="DIR", help="write a page of HTML with tables and plots into this folder"
    ),
]


def check(folder: Path | None, page: str) -> None:
    """A usage error of --report unless the page can be written there; missing packages are named too."""
    if folder is None:
        return
    writable(folder, "--report", folder=True)
    writable(folder / page, "--report")
    for package in NEEDED[page]:
        importlib.import_module(package)


def write_bench(report: Report, folder: Path | None) -> None:
    """Write the page of what `bench` measured, if a folder is given."""
    if folder is not None:
        from .bench_page import bench_page

        _write(folder / BENCH, bench_page(report))


def write_verify(rows: Sequence[Row], device: str, passed: bool, folder: Path | None) -> None:
    """Write the page of what `verify` compared on `device`, if a folder is given."""
    if folder is not None:
        from .verify_page import verify_page

        _write(folder / VERIFY, verify_page(rows, environment(device), passed))


def _write(path: Path, page: str) -> None:
    write_text(path, page)
    print_written(path)
