"""Replacing attributes of foreign modules in a way that can be undone, nested and repeated.

A slot is one attribute of one holder (a Python module or an nn.Module). The first claim replaces
its value, the last release puts the original object back, so with-blocks may nest and repeat in
any order.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from types import TracebackType
from typing import Any

logger = logging.getLogger(__name__)

Make = Callable[[Callable[..., Any]], Callable[..., Any]]
"""Makes the replacement of a callable from the original, to which it falls back."""


@dataclass(frozen=True)
class Target:
    """An attribute to replace: `holder.name` becomes `make(holder.name)`."""

    holder: Any
    name: str
    make: Make


@dataclass(eq=False)
class _Slot:
    holder: Any
    name: str
    original: Any
    replacement: Any
    claims: int = 0


class Patch:
    """What a patch replaced. The end of a with-block, or `undo`, releases it, and does so once."""

    def __init__(self, registry: Registry, slots: list[_Slot]) -> None:
        self._registry = registry
        self._slots = slots

    def undo(self) -> None:
        """Release what this patch claimed; an original returns when no other patch claims it."""
        slots, self._slots = self._slots, []
        for slot in slots:
            self._registry.release(slot)

    def __enter__(self) -> Patch:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.undo()

    def __repr__(self) -> str:
        names = (f"{getattr(s.holder, '__name__', type(s.holder).__name__)}.{s.name}" for s in self._slots)
        return f"Patch({', '.join(names)})"


class Registry:
    """The slots that an integration holds at the moment."""

    def __init__(self) -> None:
        self._slots: dict[tuple[int, str], _Slot] = {}

    def claim(self, targets: Iterable[Target]) -> Patch:
        """Replace every target that is not replaced yet."""
        return Patch(self, [self._claim(target) for target in targets])

    def release(self, slot: _Slot) -> None:
        """Take back one claim; nothing to do for a slot that `release_all` has emptied before."""
        if slot.claims == 0:
            return
        slot.claims -= 1
        if slot.claims == 0:
            self._restore(slot)

    def release_all(self) -> None:
        """Put every original back, whoever claims it."""
        for slot in list(self._slots.values()):
            slot.claims = 0
            self._restore(slot)

    def _claim(self, target: Target) -> _Slot:
        key = (id(target.holder), target.name)  # stable: the slot keeps the holder alive
        slot = self._slots.get(key)
        if slot is None:
            original = getattr(target.holder, target.name)
            slot = _Slot(target.holder, target.name, original, target.make(original))
            setattr(target.holder, target.name, slot.replacement)
            self._slots[key] = slot
        slot.claims += 1
        return slot

    def _restore(self, slot: _Slot) -> None:
        del self._slots[id(slot.holder), slot.name]
        if getattr(slot.holder, slot.name) is slot.replacement:
            setattr(slot.holder, slot.name, slot.original)
        else:  # a later patch by somebody else: theirs to undo
            logger.warning("%s of %r was replaced by others; left as it is", slot.name, slot.holder)
