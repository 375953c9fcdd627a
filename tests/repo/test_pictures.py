"""The pictures of the docs are those that docs/pictures/draw.py draws of the table of floors."""

from __future__ import annotations

import runpy
from pathlib import Path

import pytest

PICTURES = Path(__file__).resolve().parents[2] / "docs" / "pictures"
DRAWN = runpy.run_path(str(PICTURES / "draw.py"))


@pytest.mark.parametrize("name", DRAWN["PICTURES"])
def test_a_picture_is_current(name: str) -> None:
    assert (PICTURES / name).read_text() == DRAWN["PICTURES"][name](), "run: python docs/pictures/draw.py"


def test_every_floor_has_a_box() -> None:
    left_out = set(DRAWN["FLOORS"]) - set(DRAWN["SAYS"])
    assert left_out == {"_C", "version", "tasks", "training", "__main__"}
