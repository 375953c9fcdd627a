"""How a replacement reads a call that was written for the function it stands for.

A replacement that swallowed an argument could change a result without a word. So each says by the fields of a
NamedTuple what it heeds, under the names and in the order of the original. A call with any other argument goes back to
the original, but for the few names in HARMLESS.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any, TypeVar

from .fallback import left_to_original

HARMLESS = frozenset(
    {
        "chunk_size",  # how the original cuts its work; the result does not depend on it
        # What the whole model returns, and its loss.
        "use_cache", "return_dict", "output_attentions", "output_hidden_states", "output_router_logits",
        "num_items_in_batch", "labels", "logits_to_keep",
        # Attention's alone; a recurrence takes tokens in the order in which they come.
        "position_ids", "position_embeddings", "cache_position",
        # Beside cu_seq_lens_q, which says it all where a text attends to itself.
        "cu_seq_lens_k", "max_length_q", "max_length_k",
    }
)  # fmt: skip
"""Arguments that change no result of a function that is replaced. Models hand them to all of their layers."""

Call = TypeVar("Call", bound=tuple[Any, ...])
HandBack = Callable[[tuple[Any, ...], dict[str, Any]], dict[str, Any]]


def replacement(
    original: Callable[..., Any],
    takes: type[Call],
    why_not: Callable[[Call], str | None],
    run: Callable[[Call], Any],
    hand_back: HandBack | None = None,
) -> Callable[..., Any]:
    """A function in the place of the original, which keeps the calls that are not ours.

    Args:
        takes: a NamedTuple with the parameters that are heeded.
        why_not: None, or the sentence why a call is left to the original.
        run: the result of a call that is ours.
        hand_back: the keyword arguments under which the original gets a call, from the positional ones and the
            keywords that came; default as they came.
    """
    names = frozenset(takes._fields)  # type: ignore[attr-defined]
    required = takes._fields[: len(takes._fields) - len(takes._field_defaults)]  # type: ignore[attr-defined]
    by_position = _same_order(original, takes)

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
        if left_to_original(reason):
            return original(*args, **(kwargs if hand_back is None else hand_back(args, kwargs)))
        return run(call)

    return function


_BY_OTHERS = {"q": "query", "k": "key", "v": "value", "x": "hidden_states"}
"""What packages call the first arguments of the functions that older files take from them."""


@functools.lru_cache(maxsize=256)  # a server may patch for each request
def _same_order(original: Callable[..., Any], takes: type[Any]) -> int:
    """How many arguments by position mean the same to both."""
    ours = takes._fields
    same = 0
    for x, name in zip(inspect.signature(original).parameters.values(), ours, strict=False):
        if x.kind is inspect.Parameter.VAR_POSITIONAL:  # it passes all on, to whom cannot be seen
            return len(ours)
        if _BY_OTHERS.get(x.name, x.name) != name:
            break
        same += 1
    return same
