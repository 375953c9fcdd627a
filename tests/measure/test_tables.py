"""The tables of a bench on consoles of any width."""

import importlib
import io

import pytest
from helpers.reports import bench_report
from rich.console import Console


@pytest.mark.parametrize("width", [60, 80, 200])
def test_no_figure_of_a_table_is_cut(monkeypatch, width):
    """Peers without room come in tables below; each ratio is there once, the milliseconds whole."""
    command = importlib.import_module("sleepkern.cli.bench")
    console = Console(width=width, record=True, file=io.StringIO())
    monkeypatch.setattr(command, "console", console)
    command.show(bench_report((0.3, 0.3), [f"another peer {i}" for i in range(9)]))
    text = console.export_text()
    assert max(map(len, text.splitlines())) <= width and "\u2026" not in text
    assert text.count("2.00") == 2 and text.count("10.00") == 1
    rules_drawn = [line for line in text.splitlines() if line.strip() and set(line.strip()) == {"\u2500"}]
    assert (len(rules_drawn) == 1) == (width == 200)
