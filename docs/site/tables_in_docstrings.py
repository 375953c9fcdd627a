"""Docstrings have small tables of two columns, a name and what it is, with two or more spaces between them. In HTML
these lines would run together; here they become blocks of code."""

from __future__ import annotations

import re
from typing import Any

from griffe import Extension

ROW = re.compile(r"^\S.{0,40}?\S? {2,}\S")
FORMULA = re.compile(r"^[\w(), ]{1,24} = .*[;,].* = |^S_t = |^h\(0\) = ")


def with_tables(text: str) -> str:
    """The docstring with each paragraph that is such a table, or a formula, indented by four spaces."""
    paragraphs = re.split(r"\n{2,}", text)
    return "\n\n".join(_indented(p) if _is_table(p) else p for p in paragraphs)


def _is_table(paragraph: str) -> bool:
    lines = paragraph.split("\n")
    first, rows = lines[0], [line for line in lines if ROW.match(line)]
    return bool(ROW.match(first)) and len(rows) * 2 >= len(lines) or bool(FORMULA.match(first)) and len(lines) == 1


def _indented(paragraph: str) -> str:
    return "\n".join(f"    {line}" for line in paragraph.split("\n"))


class TablesInDocstrings(Extension):
    """mkdocstrings loads it by the option `extensions`."""

    def on_object(self, *, obj: Any, **_: Any) -> None:
        """griffe calls it with each object that it has read."""
        if obj.docstring is not None:
            obj.docstring.value = with_tables(obj.docstring.value)
