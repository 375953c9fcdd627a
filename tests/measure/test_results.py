"""The tables of README and docs quote the stored results, which are compact files."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from sleepkern.files import read_rows, report_text

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "benchmarks/results"
TABLES = [
    ("README.md", "| work | K, V | ms |", 2, "2026-11-26-amd-epyc-avx512.json"),
    ("docs/gpu.md", "| call | ms | against |", 1, "2026-11-26-nvidia-h200.json"),
]
"""A page, the head of a table in it, the column of milliseconds, and the file that has them."""


@pytest.mark.parametrize(("page", "head", "column", "file"), TABLES, ids=[t[0] for t in TABLES])
def test_milliseconds_of_a_table_are_stored(page: str, head: str, column: int, file: str) -> None:
    stored = [row["milliseconds"] for row in read_rows(RESULTS / file)]
    table = (ROOT / page).read_text().split(head)[1].split("\n\n")[0].splitlines()[2:]
    quoted = [re.split(r" *\| *", line.strip("| "))[column].split()[0] for line in table]
    assert len(quoted) >= 15
    assert [ms for ms in quoted if not any(f"{x:.{len(ms.partition('.')[2])}f}" == ms for x in stored)] == []


@pytest.mark.parametrize("file", sorted(RESULTS.glob("*.json")), ids=lambda f: f.stem)
def test_a_stored_report_has_a_line_a_row(file: Path) -> None:
    text = file.read_text()
    assert report_text(json.loads(text)) == text
