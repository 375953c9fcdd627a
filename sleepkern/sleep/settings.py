"""How a session may sleep: its settings, checked before anything is computed."""

from __future__ import annotations

from typing import Any, Literal

Eviction = Literal["hard", "sliding"]
Feedback = Literal["raw", "reinject", "replay"]
ConvState = Literal["rewind", "carry"]
CHOICES = {
    "eviction": ("hard", "sliding"),
    "feedback": ("raw", "reinject", "replay"),
    "conv_state": ("rewind", "carry"),
}


def check_settings(
    counts: dict[str, Any], choices: dict[str, Any], switches: dict[str, Any], settled: Any, feedback: Any
) -> None:
    """
    Args:
        counts: whole numbers of at least 1, by name.
        choices: what was chosen among CHOICES, by name.
        switches: True or False, by name.
        settled, feedback: of a session.

    Raises:
        TypeError, ValueError: the first of them that is not what it has to be.
    """
    for name, chosen in choices.items():
        if chosen not in CHOICES[name]:
            raise ValueError(f"{name}: got {chosen!r}; expected one of {', '.join(CHOICES[name])}")
    for name, count in counts.items():
        if isinstance(count, bool) or not isinstance(count, int):
            raise TypeError(f"{name}: got {count!r}; expected a whole number of at least 1")
        if count < 1:
            raise ValueError(f"{name}: got {count}; expected at least 1")
    for name, switch in switches.items():
        if not isinstance(switch, bool):
            raise TypeError(f"{name}: got {switch!r}; expected True or False")
    if settled is None:
        return
    if isinstance(settled, bool) or not isinstance(settled, (int, float)):
        raise TypeError(f"settled: got {settled!r}; expected a number of at least 0, or None")
    if not settled >= 0 or feedback == "replay":
        raise ValueError(f"settled: got {settled} with feedback {feedback!r}; expected >= 0 and raw or reinject")


def looped_of(blocks: Any, count: int) -> range:
    """The numbers that a slice names out of `count` blocks.

    Raises:
        TypeError, ValueError: not a slice, one that names no neighbours, or blocks that are not there.
    """
    if blocks is None:
        return range(count)
    if not isinstance(blocks, slice):
        raise TypeError(f"blocks: got {blocks!r}; expected a slice, as slice(1, 3), or None for all")
    looped, ends = range(count)[blocks], [end for end in (blocks.start, blocks.stop) if end is not None]
    if looped.step != 1 or len(looped) == 0 or any(not -count <= end <= count for end in ends):
        raise ValueError(f"blocks: got {blocks}; expected neighbours out of {count} blocks")
    return looped
