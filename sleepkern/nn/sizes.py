"""Sizes that modules are made of, and of what they are given, checked."""

from __future__ import annotations

from torch import Tensor, nn


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


def residual(x: Tensor, reader: nn.Module) -> None:
    """Nothing, if x is [B,T,d] with the d of the projection that reads it, where that is an ordinary one.

    Raises:
        TypeError: no tensor.
        ValueError: another shape.
    """
    if not isinstance(x, Tensor):
        raise TypeError(f"x: got a {type(x).__name__}; expected a tensor [B,T,d]")
    if x.ndim != 3 or (type(reader) is nn.Linear and x.shape[2] != reader.weight.shape[-1]):
        d = reader.weight.shape[-1] if type(reader) is nn.Linear else "d"
        raise ValueError(f"x: got {list(x.shape)}; expected [B,T,{d}]")
