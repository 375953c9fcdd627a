"""The programs of examples/ run as they are, and each is a page that can be read at one go."""

from __future__ import annotations

import runpy
from pathlib import Path

import pytest
import torch

EXAMPLES = sorted((Path(__file__).resolve().parents[2] / "examples").glob("*.py"))


def test_there_are_six_of_a_page_each() -> None:
    assert len(EXAMPLES) == 6
    for path in EXAMPLES:
        text = path.read_text()
        assert len(text.splitlines()) <= 160 and f"python examples/{path.name}" in text.split('"""')[1]


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_an_example_runs(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    threads = torch.get_num_threads()
    try:
        with torch.random.fork_rng():
            names = runpy.run_path(str(path), run_name="__main__")
    finally:
        torch.set_num_threads(threads)
    printed = capsys.readouterr().out
    assert printed.strip() and "nan" not in printed
    if path.stem == "train_a_sleeper":
        assert names["share"] > 0.5  # by chance 0.25
