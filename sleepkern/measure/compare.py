"""Two reports of `bench` side by side: is a case faster or slower, or is the difference noise?"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from ..files import read_json

Verdict = Literal["better", "worse", "within noise", "unsteady", "wrong", "not timed"]

NOISE = 0.05
"""A smaller change of a median gets no verdict. The figure is a choice, not a measurement of noise."""
STEADY = 0.10
"""Best and median of a steady row differ by at most this share of the best."""


@dataclass(frozen=True)
class Comparison:
    """A case of two reports.

    before, after  median milliseconds, None where the case was not timed
    ratio          after / before, so above 1 is slower; None where one of them was not timed
    """

    case: str
    threads: int
    before: float | None
    after: float | None
    ratio: float | None
    verdict: Verdict


@dataclass(frozen=True)
class Compared:
    """All cases of two reports; those that only one of them has are listed by name."""

    rows: tuple[Comparison, ...]
    only_before: tuple[str, ...]
    only_after: tuple[str, ...]

    @property
    def passed(self) -> bool:
        """Tells whether no case became slower or wrong."""
        return all(row.verdict not in ("worse", "wrong") for row in self.rows)


def compare(before: Iterable[dict[str, Any]], after: Iterable[dict[str, Any]]) -> Compared:
    """Compare the rows of two reports (files.read_rows), case by case and at the same number of threads.

    A case is worse when its median grew by more than NOISE, better when the old median is as much longer. The verdict
    is withheld ("unsteady") where best and median of a row differ by more than STEADY in either report. A case that was
    timed before and has a red check after is "wrong".
    """
    first, second = ({(row["case"], row["threads"]): row for row in rows} for rows in (before, after))
    return Compared(
        tuple(_compared(row, second[key]) for key, row in first.items() if key in second),
        tuple(_named(key) for key in first if key not in second),
        tuple(_named(key) for key in second if key not in first),
    )


def read_report(path: Path) -> dict[str, Any]:
    """A report that `sleepkern bench` has written.

    Raises:
        ValueError: it is not such a report; the message names the file.
        OSError: it cannot be read.
    """
    report = read_json(path)
    try:
        compare(report["rows"], report["rows"])
        sound = {"device", "threads", "date"} <= set(report["environment"])
    except (KeyError, TypeError, AttributeError, ZeroDivisionError):
        sound = False
    if not sound:
        raise ValueError(f"{path}: got another file; expected a report that `bench --json` has written")
    result: dict[str, Any] = report
    return result


def verdict_of(ratio: float, noise: float = NOISE) -> Verdict:
    """What a ratio of times, new / old, says: within `noise` of 1 it says nothing."""
    return "worse" if ratio > 1 + noise else "better" if ratio < 1 / (1 + noise) else "within noise"


def is_steady(row: dict[str, Any]) -> bool:
    """Tells whether best and median of a timed row differ by at most STEADY."""
    steady: bool = row["milliseconds"] <= (1 + STEADY) * row["best_milliseconds"]
    return steady


def _compared(first: dict[str, Any], second: dict[str, Any]) -> Comparison:
    before, after = first["milliseconds"], second["milliseconds"]
    if before is None or after is None:
        verdict: Verdict = "wrong" if before is not None else "not timed"
        return Comparison(first["case"], first["threads"], before, after, None, verdict)
    ratio = after / before
    verdict = verdict_of(ratio) if is_steady(first) and is_steady(second) else "unsteady"
    return Comparison(first["case"], first["threads"], before, after, ratio, verdict)


def _named(key: tuple[str, int]) -> str:
    return f"{key[0]}, {key[1]} thread(s)"
