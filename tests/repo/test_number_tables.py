"""The tables of README and docs are those that `make tables` writes."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.tables import MARKED, ROOT, TABLES, figure, pages, ratio, written
from sleepkern.backends.native.module import _C

WITH_TABLES = [page for page in pages() if MARKED.search(page.read_text())]


@pytest.mark.parametrize("page", WITH_TABLES, ids=lambda page: str(page.relative_to(ROOT)))
def test_tables_are_current(page: Path) -> None:
    text = page.read_text()
    if "<!-- table: support -->" in text and not (_C and _C.has_cuda):
        pytest.skip("the support matrix is declared by a module that was built with CUDA")
    assert written(text) == text, "run: make tables"


def test_every_table_is_on_a_page_and_markers_are_pairs() -> None:
    found = [name for page in WITH_TABLES for _, name, _ in MARKED.findall(page.read_text())]
    assert sorted(found) == sorted(TABLES)
    assert sum(page.read_text().count("<!-- end table -->") for page in WITH_TABLES) == len(found)


def test_a_changed_figure_is_found() -> None:
    page = written("<!-- table: gpu -->\n<!-- end table -->\n")
    assert "0.231" in page and written(page.replace("0.231", "0.200")) == page


def test_figures_have_three_digits() -> None:
    assert [figure(x) for x in (8522.6, 154.1, 40.11, 6.99, 0.1229)] == ["8523", "154", "40.1", "6.99", "0.123"]
    assert ratio(0.893) == "0.89" and ratio(2.5) == "2.50"
