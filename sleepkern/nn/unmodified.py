"""Tells whether a module is as its class made it, so that its weights and numbers say all of what it does.

This is asked at every call, so it reads the dictionaries of modules: `__getattr__` of torch's takes most of the time.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

_FORWARD: dict[type, Any] = {kind: kind.forward for kind in (nn.Linear, nn.RMSNorm)}
"""Tools that watch or quantise a model put others in their place."""

Parts = Mapping[type, Mapping[str, tuple[type, ...]]]
"""The classes that a module may have at each of its names; what has no parts has a weight."""


def why_not_as_made(module: nn.Module, kinds: Parts) -> str | None:
    """None, or the sentence what is added to a module or replaced in it. kinds: of its class and its parts'."""
    modules = [module]
    for m in modules:
        own, kind = m.__dict__, type(m)
        parts, inside, given = kinds[kind], own["_modules"], own["_parameters"]
        for name, allowed in parts.items():
            if type(inside.get(name)) not in allowed:
                return _not_as_made(type(inside.get(name)))
        if own["_forward_hooks"] or own["_forward_pre_hooks"] or own["_backward_hooks"] or own["_backward_pre_hooks"]:
            return "a module has hooks, which want to be called"
        for name, p in given.items():
            if (p is None) is (name == "weight"):
                return _not_as_made(kind)
        if len(inside) != len(parts) or own["_buffers"] or "forward" in own or "_recur" in own:
            return _not_as_made(kind)
        if (not parts and "weight" not in given) or _FORWARD.get(kind, kind.forward) is not kind.forward:
            return _not_as_made(kind)
        modules += inside.values()
    return None


def is_tuple_of_ints(found: Any, expected: tuple[int, ...]) -> bool:
    """Tells whether it is this one; 8.0 equals 8, but torch does not take it."""
    return type(found) is tuple and found == expected and all(type(n) is int for n in found)


def _not_as_made(kind: type) -> str:
    return f"a {kind.__name__} in a block is not as sleepkern.nn made it"
