"""Sizes that modules are made of, checked."""

from __future__ import annotations


def whole_numbers(**sizes: int) -> None:
    """Nothing, if all of these are whole numbers from 1 on.

    Raises:
        TypeError: one that is no whole number.
        ValueError: one below 1.
    """
    for name, n in sizes.items():
        if type(n) is not int:
            raise TypeError(f"{name}: got {n!r}; expected a whole number")
        if n < 1:
            raise ValueError(f"{name}: got {n}; expected at least 1")
