"""The stored results are compact files; tests/repo/test_number_tables.py compares the tables that quote them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from sleepkern.files import report_text

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "benchmarks/results"


@pytest.mark.parametrize("file", sorted(RESULTS.glob("*.json")), ids=lambda f: f.stem)
def test_a_stored_report_has_a_line_a_row(file: Path) -> None:
    text = file.read_text()
    assert report_text(json.loads(text)) == text
