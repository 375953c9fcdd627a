"""Two pages are files of the repository's root: CONTRIBUTING.md and CHANGELOG.md, with their links made relative."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
INCLUDE = re.compile(r"<!-- include: ([\w.]+) -->")


def moved(text: str) -> str:
    """The text of a page of the root, with its links as they are one folder below docs."""
    text = re.sub(r"\]\(docs/", "](../", text)
    return re.sub(r"\[([^\]]+)\]\(CHANGELOG\.md\)", r"[\1](changes.md)", text)


def on_page_markdown(markdown: str, **_: Any) -> str:
    """mkdocs calls it with each page's text."""
    return INCLUDE.sub(lambda found: moved((ROOT / found.group(1)).read_text(encoding="utf-8")), markdown)
