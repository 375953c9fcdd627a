"""Docstrings have small tables of a name and what it is, with two or more spaces between them. In HTML these lines
would run together; here they become tables, without a head (style.css hides it). Names of pages become links."""

from __future__ import annotations

import re
from typing import Any

from griffe import Extension

GAP = re.compile(r" {2,}")
PAGE = re.compile(r"\bdocs/([\w/]+\.md)")
FORMULA = re.compile(r"^(S_t = |h\(0\) = )")


def with_tables(text: str) -> str:
    """The docstring with each paragraph that is such a table as a table, and each lone formula as a block."""
    text = PAGE.sub(r"[docs/\1](../\1)", text)
    return "\n\n".join(_paragraph(p) for p in re.split(r"\n{2,}", text))


def _paragraph(text: str) -> str:
    lines = text.split("\n")
    margin = min((len(line) - len(line.lstrip()) for line in lines if line.strip()), default=0)
    if margin not in (0, 4):
        return text
    if FORMULA.match(text) and len(lines) == 1:
        return f"    {text}"
    rows = _rows([line[margin:] for line in lines])
    if rows is None:
        return text
    width = max(map(len, rows))
    lines = ["| " * width + "|", "|---" * width + "|"]
    lines += [
        "| " + " | ".join(cell.replace("|", "\\|") for cell in row + [""] * (width - len(row))) + " |" for row in rows
    ]
    return "\n".join(lines)


def _rows(lines: list[str]) -> list[list[str]] | None:
    """The cells of each row; lines that begin with spaces go on with the last cell. None where it is no table."""
    rows: list[list[str]] = []
    for line in lines:
        if line.startswith("  ") and rows:
            rows[-1][-1] += " " + line.strip()
            continue
        cells = GAP.split(line.strip(), maxsplit=2)
        name = cells[0]
        if len(cells) < 2 or len(name) > 26 or name.endswith((".", ":", ";")) or "=" in name or "(" in name:
            return None
        rows.append([f"`{name}`", *cells[1:]])
    return rows or None


class TablesInDocstrings(Extension):
    """mkdocstrings loads it by the option `extensions`."""

    def on_object(self, *, obj: Any, **_: Any) -> None:
        """griffe calls it with each object that it has read."""
        if obj.docstring is not None:
            obj.docstring.value = with_tables(obj.docstring.value)
