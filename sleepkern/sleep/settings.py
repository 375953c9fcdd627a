"""The settings of a session, and their checks, which run before anything is computed."""

from __future__ import annotations

import warnings
from typing import Any, Literal

Eviction = Literal["hard", "sliding"]
Feedback = Literal["raw", "reinject", "replay"]
ConvState = Literal["rewind", "carry"]
CHOICES = {
    "eviction": ("hard", "sliding"),
    "feedback": ("raw", "reinject", "replay"),
    "conv_state": ("rewind", "carry"),
    "backend": (None, "cuda", "cpu", "modules"),
}


def check_settings(
    counts: dict[str, Any], choices: dict[str, Any], switches: dict[str, Any], tol: Any, feedback: Any
) -> None:
    """Check the settings of a session.

    Args:
        counts: values that have to be whole numbers of at least 1, by name.
        choices: values that have to be among CHOICES, by name.
        switches: values that have to be True or False, by name.
        tol, feedback: the arguments of the session.

    Raises:
        TypeError, ValueError: the first value of another type or out of range.
    """
    for name, chosen in choices.items():
        if chosen not in CHOICES[name]:
            raise ValueError(f"{name}: got {chosen!r}; expected one of {', '.join(map(str, CHOICES[name]))}")
    for name, count in counts.items():
        if isinstance(count, bool) or not isinstance(count, int):
            raise TypeError(f"{name}: got {count!r}; expected a whole number of at least 1")
        if count < 1:
            raise ValueError(f"{name}: got {count}; expected at least 1")
    for name, switch in switches.items():
        if not isinstance(switch, bool):
            raise TypeError(f"{name}: got {switch!r}; expected True or False")
    if tol is None:
        return
    if isinstance(tol, bool) or not isinstance(tol, (int, float)):
        raise TypeError(f"tol: got {tol!r}; expected a number of at least 0, or None")
    if not tol >= 0 or feedback == "replay":
        raise ValueError(f"tol: got {tol} with feedback {feedback!r}; expected >= 0 and raw or reinject")


def resolve_tol(tol: Any, settled: Any) -> Any:
    """The value of `tol`, which may come under its former name `settled`.

    Raises:
        ValueError: both were given.
    """
    if settled is None:
        return tol
    if tol is not None:
        raise ValueError(f"tol: got {tol} and settled={settled}, its former name; expected one of them")
    warnings.warn("settled is tol of SleepSession", DeprecationWarning, stacklevel=3)
    return settled


def looped_blocks(blocks: Any, count: int) -> range:
    """The indices that a slice names out of `count` blocks; all for None.

    Raises:
        TypeError, ValueError: `blocks` is no slice, or names no neighbours, or names blocks beyond `count`.
    """
    if blocks is None:
        return range(count)
    if not isinstance(blocks, slice):
        raise TypeError(f"blocks: got {blocks!r}; expected a slice, as slice(1, 3), or None for all")
    looped, ends = range(count)[blocks], [end for end in (blocks.start, blocks.stop) if end is not None]
    if looped.step != 1 or len(looped) == 0 or any(not -count <= end <= count for end in ends):
        raise ValueError(f"blocks: got {blocks}; expected neighbours out of {count} blocks")
    return looped
