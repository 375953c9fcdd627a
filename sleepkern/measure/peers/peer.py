"""What a peer is, and a call of its function in the shape that a case wants."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from ..cases import Case, Result, gradients

OURS = "ours, "
"""Begins the name of a peer that is sleepkern itself under other settings."""
Prepared = Callable[[], Result]
Forward = Callable[[dict[str, Any]], Result]


@dataclass(frozen=True)
class Peer:
    """An adapter; peers/__init__.py says what its words mean. `threads` overrides the threads it is timed with."""

    name: str
    why_not: Callable[[Case, str], str | None]
    prepare: Callable[[Case, dict[str, Any], int], Prepared]
    threads: int | None = None


def in_passes(case: Case, inputs: dict[str, Any], forward: Forward) -> Prepared:
    """A call of `forward` in the shape the case wants: gradients, or several passes with the state
    carried."""
    if case.op == "train":
        return lambda: gradients(inputs, lambda x: forward(x)[0])

    def repeated() -> Result:
        x = inputs
        for _ in range(case.passes):
            o, state = forward(x)
            x = {**x, "initial_state": state}
        return o, state

    return repeated
