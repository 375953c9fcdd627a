"""The page of `verify`: how near each rule and type comes to its limit, and every comparison."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ...testing.verify import Row
from .page import MISSING, Cell, Table, facts, render


def verify_page(rows: Sequence[Row], where: dict[str, Any], passed: bool) -> str:
    """The page, one text of HTML that loads nothing."""
    failed = [row for row in rows if not row.passed]
    backends = list(dict.fromkeys(row.backend for row in rows if row.refused is None))
    return render(
        "verify.html",
        title="sleepkern verify",
        passed=passed,
        summary=summary(rows),
        where=f"{where['device']}, {where['date'][:16].replace('T', ' ')}",
        limits=", ".join(f"{limit:.0e} for {dtype}" for dtype, limit in _limits(rows).items()) or "none",
        heat=heat_table(rows),
        failed=_checks("Comparisons with an error above the limit", failed) if failed else None,
        refused=refused(rows),
        checks=[_backend(name, [row for row in rows if row.backend == name and not row.refused]) for name in backends],
        facts=facts(where),
    )


def summary(rows: Sequence[Row]) -> str:
    """How many comparisons there are, how many are wrong, and how near to its limit the worst came."""
    ran = [row for row in rows if row.refused is None]
    if not ran:
        return "Nothing was compared."
    wrong = sum(not row.passed for row in ran)
    worst = max(ran, key=_over)
    return (
        f"{len(ran)} comparisons with the float64 reference, {wrong} above the limit. The largest error is "
        f"{_over(worst):.2g} of its limit: {worst.backend}, {worst.rule}, {worst.dtype}, {worst.op}, {worst.shape}, "
        f"{worst.variant}."
    )


def heat_table(rows: Sequence[Row]) -> Table:
    """Backends and rules by types: the largest error over its limit."""
    types = list(_limits(rows))
    groups: dict[tuple[str, str], dict[str, list[Row]]] = {}
    for row in rows:
        if row.refused is None:
            groups.setdefault((row.backend, row.rule), {}).setdefault(row.dtype, []).append(row)
    lines = []
    order = list(dict.fromkeys(backend for backend, _ in groups))
    for (backend, rule), by_type in sorted(groups.items(), key=lambda group: order.index(group[0][0])):
        cells = [_heat(by_type.get(dtype, [])) for dtype in types]
        count = sum(map(len, by_type.values()))
        lines.append([Cell(backend), Cell(rule), *cells, Cell(str(count))])
    return Table("Largest error over its limit", ["backend", "rule", *types, "comparisons"], lines, labels=2)


def _heat(rows: list[Row]) -> Cell:
    if not rows:
        return Cell(MISSING, "none")
    worst = max(map(_over, rows))
    if all(row.passed for row in rows):
        return Cell(f"{worst:.3f}", "", worst)
    return Cell(f"{worst:.2g} FAIL", "bad", 1.0)


def refused(rows: Sequence[Row]) -> list[str]:
    """Why backends did not compute a comparison, with the number of each reason."""
    found: dict[tuple[str, str], int] = {}
    for row in rows:
        if row.refused is not None:
            found[row.backend, row.refused] = found.get((row.backend, row.refused), 0) + 1
    return [f"{backend}: {reason} ({count})" for (backend, reason), count in found.items()]


def _backend(name: str, rows: Sequence[Row]) -> Table:
    wrong = sum(not row.passed for row in rows)
    return _checks(f"{name}: {len(rows)} comparisons, {wrong} failed", rows)


def _checks(caption: str, rows: Sequence[Row]) -> Table:
    results = list(dict.fromkeys(name for row in rows for name in row.errors))
    headings = ["rule", "backend", "type", "call", "shape", "variant", "", "worst / limit", "limit", *results]
    return Table(caption, headings, [_check(row, results) for row in rows], labels=7)


def _check(row: Row, results: Sequence[str]) -> list[Cell]:
    def error(name: str) -> Cell:
        value = row.errors.get(name)
        if value is None:
            return Cell(MISSING, "none")
        return Cell(f"{value:.1e}", "" if value <= row.tolerance else "bad")

    labels = (row.rule, row.backend, row.dtype, row.op, row.shape, row.variant)
    mark = Cell("pass", "good") if row.passed else Cell("FAIL", "bad")
    return [*map(Cell, labels), mark, Cell(f"{_over(row):.2g}"), Cell(f"{row.tolerance:.0e}"), *map(error, results)]


def _over(row: Row) -> float:
    """The largest error over the limit; NaN counts as infinite."""
    worst = row.worst / row.tolerance
    return float("inf") if any(error != error for error in row.errors.values()) else worst


def _limits(rows: Sequence[Row]) -> dict[str, float]:
    return {row.dtype: row.tolerance for row in rows}
