"""What a layer carries from one window to the next."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any, NamedTuple

from torch import Tensor


class RecurrentState(NamedTuple):
    """What a layer with a recurrence carries.

    conv   [B,W-1,channels] the last inputs of its short convolution
    state  [B,HV,K,V] the fast weight
    """

    conv: Tensor
    state: Tensor


class KVState(NamedTuple):
    """Keys and values [B,heads,tokens,width] of an attention layer."""

    keys: Tensor
    values: Tensor


State = RecurrentState | KVState | None
"""None before the first window."""


def tensors_of(states: Sequence[State]) -> list[Tensor]:
    """All of them, in order."""
    return [t for state in states if state is not None for t in state]


def filled(states: Sequence[State], tensors: Sequence[Tensor]) -> list[State]:
    """The same states with other tensors in them."""
    fresh = iter(tensors)
    return [None if s is None else type(s)(next(fresh), next(fresh)) for s in states]


_RENAMED: dict[str, Any] = {"Fast": RecurrentState, "Slow": KVState}


def renamed(module: str, name: str) -> Any:
    """The class that `name` stands for in a module that offered it.

    Raises:
        AttributeError: another name.
    """
    found = _RENAMED.get(name)
    if found is None:
        raise AttributeError(f"module {module!r} has no attribute {name!r}")
    warnings.warn(f"{module}.{name} is {found.__name__} of sleepkern.state", DeprecationWarning, stacklevel=3)
    return found
