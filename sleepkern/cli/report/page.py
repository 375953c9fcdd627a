"""What the pages share: the templates, the facts about the machine, and how a number is written."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jinja2

MISSING = "–"
"""What a table shows where there is no number."""


class Cell(NamedTuple):
    """A cell of a table. kind: a class of style.css, "" for none; shade: 0 to 1, how strong its background is."""

    text: str
    kind: str = ""
    shade: float | None = None


class Table(NamedTuple):
    """A table with a caption; the first `labels` cells of a row are its heading, the others are numbers."""

    caption: str
    headings: Sequence[str]
    rows: Sequence[Sequence[Cell]]
    labels: int = 1


class Plot(NamedTuple):
    """A picture: inline SVG, what it shows in words, and how to read it."""

    svg: str
    alt: str
    caption: str


def render(template: str, **content: Any) -> str:
    """The page of this folder's template; every text of `content` is escaped, except the SVG of a Plot."""
    loader = jinja2.FileSystemLoader(Path(__file__).parent)
    pages = jinja2.Environment(
        loader=loader, autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    return pages.get_template(template).render(**content)


def facts(where: dict[str, Any]) -> list[tuple[str, str]]:
    """The environment of a report, as lines of a name and a value."""
    names = {"date": "date (UTC)", "isa": "instruction set", "cpus": "cores", "cpu": "processor"}
    lines = []
    for name, value in where.items():
        if name == "versions":
            lines += [(f"version of {package}", version) for package, version in value.items()]
        elif value is not None:
            lines.append((names.get(name, name.replace("_", " ")), str(value)))
    return lines


def number(value: float | None, digits: int = 4) -> Cell:
    """A number with so many digits, without an exponent where it is neither tiny nor huge."""
    if value is None:
        return Cell(MISSING, "none")
    if value != 0 and value == value and not 1e-4 <= abs(value) < 1e12:
        return Cell(f"{value:.{digits - 1}e}")
    if abs(value) >= 10_000:
        return Cell(f"{value:,.0f}")
    return Cell(f"{value:.{digits}g}" if abs(value) < 1000 else f"{value:.0f}")


def percent(value: float | None) -> Cell:
    """A share as a percentage."""
    return Cell(MISSING, "none") if value is None else Cell(f"{value:.0%}")
