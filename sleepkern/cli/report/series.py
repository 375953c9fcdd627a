"""Rows of a bench that differ in one size alone: what a line of a plot is."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from ...measure.bench import BenchRow

ONE_CALL = ("forward", "train", "decode", "ingest")
"""Operations that are one call of the package; models and stacks of blocks are others."""


class Point(NamedTuple):
    """A row on a line."""

    x: float
    y: float


@dataclass(frozen=True)
class Series:
    """A line: rows of one call that differ in x; peers: the same of those that were timed on these rows."""

    label: str
    points: tuple[Point, ...]
    peers: dict[str, tuple[Point, ...]]


def by_length(rows: Sequence[BenchRow]) -> list[Series]:
    """Tokens per second over T, of calls that differ in T alone."""
    some = [row for row in rows if row.op in ("forward", "train")]
    return _series(some, ("T",), lambda row: row.shape.T, lambda row, ms: row.tokens / ms * 1e3)


def by_batch(rows: Sequence[BenchRow]) -> list[Series]:
    """Milliseconds of decode over B x T, of calls that differ in these."""
    some = [row for row in rows if row.op == "decode"]
    return _series(some, ("B", "T"), lambda row: row.shape.B * row.shape.T, lambda row, ms: ms)


def by_passes(rows: Sequence[BenchRow]) -> list[Series]:
    """Milliseconds over N, of windows that differ in it alone."""
    some = [row for row in rows if row.op == "ingest"]
    return _series(some, ("N",), lambda row: row.passes, lambda row, ms: ms)


def _series(
    rows: Sequence[BenchRow],
    along: tuple[str, ...],
    x: Callable[[BenchRow], float],
    y: Callable[[BenchRow, float], float],
) -> list[Series]:
    """Groups of at least two rows that agree in everything but the sizes `along`, with y for ours and each peer."""
    groups: dict[tuple[Any, ...], dict[float, BenchRow]] = {}
    for row in rows:
        if row.milliseconds is not None:
            key = tuple((name, value) for name, value in _facts(row).items() if name not in along)
            groups.setdefault(key, {}).setdefault(x(row), row)
    kept = {key: [group[place] for place in sorted(group)] for key, group in groups.items() if len(group) > 1}
    found = []
    for key, group in kept.items():
        label = " ".join(filter(None, (_named(*fact) for fact in key if _differs(fact[0], kept))))
        points = tuple(Point(x(row), y(row, row.milliseconds or 0.0)) for row in group)
        found.append(Series("sleepkern" if len(kept) == 1 else label, points, _peers(group, x, y)))
    return found


def _peers(
    group: list[BenchRow], x: Callable[[BenchRow], float], y: Callable[[BenchRow, float], float]
) -> dict[str, tuple[Point, ...]]:
    peers: dict[str, list[Point]] = {}
    for row in group:
        for peer in row.peers:
            if peer.milliseconds is not None and peer.note is None:
                peers.setdefault(peer.name, []).append(Point(x(row), y(row, peer.milliseconds)))
    return {name: tuple(points) for name, points in peers.items()}


def _facts(row: BenchRow) -> dict[str, Any]:
    """Everything that sets the call of a row apart."""
    s = row.shape
    value_heads = s.HV if s.HV != s.H else None
    return {
        "op": row.op, "rule": row.rule, "dtype": row.dtype, "B": s.B, "T": s.T, "H": s.H, "HV": value_heads, "K": s.K,
        "V": s.V, "lengths": s.lengths, "N": row.passes, "method": row.method, "cached": row.cached,
        "threads": row.threads,
    }  # fmt: skip


def _differs(name: str, groups: dict[tuple[Any, ...], Any]) -> bool:
    return len({dict(key)[name] for key in groups}) > 1


def _named(name: str, value: Any) -> str:
    if name == "cached":
        return "cached" if value else ""
    if value is None:
        return ""
    return str(value) if name in ("op", "rule", "dtype", "method") else f"{name}={value}"
