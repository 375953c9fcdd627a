"""README: its examples run one after another as they stand, and it stays a page to read at one go."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import sleepkern

README = Path(__file__).resolve().parents[2] / "README.md"


def test_examples_run() -> None:
    blocks = re.findall(r"```python\n(.*?)```", README.read_text(), re.S)
    assert len(blocks) == 3
    names: dict[str, Any] = {}
    try:
        for block in blocks:
            exec(block, names)
        assert sleepkern.patched(names["model"])
    finally:
        sleepkern.unpatch()
    assert names["session"].position == 1024 and names["r"].final_state.shape == names["S"].shape


def test_it_is_short() -> None:
    lines = README.read_text().splitlines()
    assert len(lines) <= 130
    first_screen = "\n".join(lines[:20])
    assert all(command in first_screen for command in ("make demo", "make test", "docs/pictures/window.svg"))
