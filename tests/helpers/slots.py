"""The slots of the chunks of packed sequences, by the rule of sleepkern/rules.py, and lengths that try it."""

from __future__ import annotations

from itertools import accumulate

from hypothesis import strategies as st

LENGTHS = st.lists(st.one_of(st.just(0), st.integers(0, 200)), min_size=1, max_size=80)
"""Lengths of packed sequences, many of them empty."""


def offsets_of(lengths: list[int]) -> list[int]:
    return [0, *accumulate(lengths)]


def slots(lengths: list[int], C: int) -> dict[int, tuple[int, int, int]]:
    """For each slot, the sequence, the first row of its chunk, and the rows of the sequence from there on.

    Fails where two chunks have one slot, or a chunk has a slot past T // C + n.
    """
    owned: dict[int, tuple[int, int, int]] = {}
    offsets = offsets_of(lengths)
    for s, (begin, end) in enumerate(zip(offsets, offsets[1:], strict=False)):
        for chunk in range(-(-(end - begin) // C)):
            slot = begin // C + s + chunk
            assert slot not in owned and slot < offsets[-1] // C + len(lengths), (lengths, C)
            owned[slot] = (s, begin + chunk * C, end - begin - chunk * C)
    return owned
