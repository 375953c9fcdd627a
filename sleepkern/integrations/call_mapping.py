"""How a replacement reads a call that was written for the original function.

A replacement that swallowed an argument could change a result without a word. So the fields of a NamedTuple list the
arguments that the replacement reads, under the names and in the order of the original. A call with any other argument
goes to the original, except for the few names in HARMLESS.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any, TypeVar

from .fallback import use_original

HARMLESS = frozenset(
    {
        "chunk_size",  # how the original cuts its work; the result does not depend on it
        # These change what the whole model returns, and its loss.
        "use_cache", "return_dict", "output_attentions", "output_hidden_states", "output_router_logits",
        "num_items_in_batch", "labels", "logits_to_keep",
        # Only attention reads these; a recurrence takes tokens in the order in which they come.
        "position_ids", "position_embeddings", "cache_position",
        # cu_seq_lens_q says the same where a text attends to itself.
        "cu_seq_lens_k", "max_length_q", "max_length_k",
    }
)  # fmt: skip
"""Arguments that change no result of a function that is replaced. Models hand them to all of their layers."""

Call = TypeVar("Call", bound=tuple[Any, ...])
ToOriginal = Callable[[tuple[Any, ...], dict[str, Any]], dict[str, Any]]


def replacement(
    original: Callable[..., Any],
    takes: type[Call],
    why_not: Callable[[Call], str | None],
    run: Callable[[Call], Any],
    to_original: ToOriginal | None = None,
) -> Callable[..., Any]:
    """A function that replaces the original, and calls it where sleepkern cannot compute a call.

    Args:
        original: the function to replace.
        takes: a NamedTuple with the parameters that the replacement reads.
        why_not: returns None, or a sentence why a call goes to the original.
        run: computes a call.
        to_original: maps the positional and keyword arguments of a call to the keywords for the original; default
            those of the call.
    """
    names = frozenset(takes._fields)  # type: ignore[attr-defined]
    required = takes._fields[: len(takes._fields) - len(takes._field_defaults)]  # type: ignore[attr-defined]
    by_position = _shared_positions(original, takes)

    @functools.wraps(original)
    def function(*args: Any, **kwargs: Any) -> Any:
        unknown = [x for x in kwargs if x not in names and x not in HARMLESS and kwargs[x] is not None]
        reason: str | None
        if unknown:
            reason = f"the argument {unknown[0]} is not known here"
        elif len(args) > by_position:
            reason = f"{len(args)} arguments by position, of which {by_position} mean the same here"
        elif any(x not in kwargs for x in required[len(args) :]):
            reason = "an argument is missing"
        else:
            call = takes(*args, **{x: kwargs[x] for x in kwargs if x in names})
            reason = why_not(call)
        if use_original(reason):
            return original(*args, **(kwargs if to_original is None else to_original(args, kwargs)))
        return run(call)

    return function


_SYNONYMS = {"q": "query", "k": "key", "v": "value", "x": "hidden_states"}
"""Names of the first arguments in the packages whose functions older modeling files import."""


@functools.lru_cache(maxsize=256)  # a server may patch for each request
def _shared_positions(original: Callable[..., Any], takes: type[Any]) -> int:
    """How many positional arguments have the same meaning in both."""
    fields = takes._fields
    same = 0
    for x, name in zip(inspect.signature(original).parameters.values(), fields, strict=False):
        if x.kind is inspect.Parameter.VAR_POSITIONAL:  # a wrapper, whose function cannot be seen
            return len(fields)
        if _SYNONYMS.get(x.name, x.name) != name:
            break
        same += 1
    return same
