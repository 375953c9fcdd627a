"""The cache of transformers among the arguments of a call, under the name of any version.

Versions call the argument past_key_value, past_key_values, cache_params or cache. Under a name that a forward does not
read, a cache ends in **kwargs without a word, and the model forgets. So a cache is found by its type, and the signature
of a forward says under which name the forward takes one.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Iterable
from typing import Any

NAMES = ("past_key_values", "cache", "cache_params", "past_key_value")
"""Names of the argument, for a forward whose annotations do not say which argument is a Cache."""


def is_cache(x: Any) -> bool:
    """Tells whether x is a cache of transformers, or has layers and is updated like one."""
    known = getattr(sys.modules.get("transformers.cache_utils"), "Cache", ())
    alike = isinstance(getattr(x, "layers", None), list) and callable(getattr(x, "update", None))
    return alike or isinstance(x, known)


def records_past() -> bool:
    """Tells whether caches of this version of transformers can be told to keep what taking tokens back needs."""
    return hasattr(getattr(sys.modules.get("transformers.cache_utils"), "Cache", None), "activate_past_recording")


def cache_among(values: Iterable[Any]) -> Any:
    """The first cache among arguments; None without one."""
    return next((x for x in values if is_cache(x)), None)


def cache_in(out: Any) -> Any:
    """The cache in the output of a model.

    Raises:
        ValueError: the output has none.
    """
    found = cache_among(out.values())
    if found is None:
        raise ValueError(f"model: got {', '.join(out)} from it; expected a cache of transformers, by use_cache=True")
    return found


def cache_name(module: Any) -> str:
    """The keyword under which a module takes its cache; the first of NAMES where the signature hides the keyword."""
    for forward in (module.forward, type(module).forward):
        taken = inspect.signature(forward).parameters
        declared = [name for name, x in taken.items() if "Cache" in str(x.annotation)]
        for name in (*declared, *NAMES):
            if name in taken:
                return name
    return NAMES[0]


def too_old_error() -> ImportError:
    """The error for a version of transformers whose caches have no layers for fast weights."""
    version = sys.modules["transformers"].__version__
    return ImportError(f"transformers: got {version}, whose caches hold no fast weights; expected 5.20 or newer")


def cache_of_block(arguments: tuple[Any, ...], options: dict[str, Any]) -> Any:
    """The cache with which a block is called; None for a call without a cache.

    Raises:
        ValueError: the argument is no cache with layers, or use_cache is true and there is no cache.
    """
    found = cache_among((*arguments, *options.values()))
    named = {name: x for name in NAMES if found is None and (x := options.get(name)) is not None}
    for name, x in (named or {"cache": found}).items():
        if x is not None and not isinstance(getattr(x, "layers", None), list):
            raise ValueError(f"{name}: got a {type(x).__name__}; expected a cache of transformers with layers")
    if found is None and options.get("use_cache"):
        raise ValueError(
            f"cache: got none among {', '.join(sorted(options))}, and use_cache=True; expected a cache of "
            "transformers, which holds the fast weights"
        )
    return found
