"""Replacing attributes of foreign modules in a way that can be undone, nested and repeated, by many threads.

A slot is one attribute of one holder (a Python module, a class or an nn.Module). The first claim replaces its value,
the last release puts the original object back, so with-blocks may nest and repeat in any order.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from types import TracebackType
from typing import Any

logger: logging.Logger = logging.getLogger(__name__)

Make = Callable[[Callable[..., Any]], Callable[..., Any]]
"""Maps the original callable to its replacement, which falls back to the original."""


@dataclass(frozen=True)
class Target:
    """An attribute to replace: `holder.name` becomes `make(holder.name)`."""

    holder: Any
    name: str
    make: Make

    @property
    def key(self) -> tuple[int, str]:
        return id(self.holder), self.name


@dataclass(eq=False)
class _Slot:
    holder: Any
    name: str
    original: Any
    replacement: Any
    claims: int = 0

    def __str__(self) -> str:
        """The import path of the attribute."""
        named = self.holder if hasattr(self.holder, "__name__") else type(self.holder)
        within = "" if named is self.holder and not isinstance(named, type) else f"{named.__module__}."
        return f"{within}{getattr(named, '__qualname__', named.__name__)}.{self.name}"

    @property
    def in_place(self) -> bool:
        return getattr(self.holder, self.name) is self.replacement


class Patch:
    """The slots that a patch claims. The end of a with-block, or `undo`, releases them, once."""

    def __init__(self, registry: Registry, slots: list[_Slot]) -> None:
        self._registry = registry
        self._slots = slots

    def undo(self) -> None:
        """Release the claims of this patch; an original returns when no other patch claims its slot."""
        self._registry.release(self._slots)

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
        return f"Patch({', '.join(map(str, self._slots))})"


class Registry:
    """The slots that an integration holds. One lock guards the slots and the attributes themselves."""

    def __init__(self) -> None:
        self._slots: dict[tuple[int, str], _Slot] = {}
        self._lock = threading.RLock()

    def claim(self, targets: Iterable[Target]) -> Patch:
        """Replace every target that is not replaced yet; on an error, replace none."""
        slots: list[_Slot] = []
        with self._lock:
            try:
                for target in targets:
                    slots.append(self._claim(target))
            except BaseException:
                self.release(slots)
                raise
        return Patch(self, slots)

    def release(self, slots: list[_Slot]) -> None:
        """Take back one claim of each slot, the last slot first, and empty the list; slots without claims stay."""
        with self._lock:
            while slots:
                slot = slots.pop()
                if slot.claims > 0:  # or release_all came before
                    slot.claims -= 1
                    if slot.claims == 0:
                        self._restore(slot)

    def release_all(self) -> None:
        """Put every original back, whichever patches claim it."""
        with self._lock:
            for slot in reversed(list(self._slots.values())):
                slot.claims = 0
                self._restore(slot)

    def names(self, targets: Iterable[Target] | None = None) -> tuple[str, ...]:
        """The import paths of the replaced attributes, among these targets or among all."""
        with self._lock:
            slots = self._slots.values() if targets is None else map(self._slots.get, {x.key for x in targets})
            return tuple(sorted(str(slot) for slot in slots if slot is not None and slot.in_place))

    def _claim(self, target: Target) -> _Slot:
        slot = self._slots.get(target.key)  # stable: the slot keeps the holder alive
        if slot is None:
            original = getattr(target.holder, target.name)
            slot = _Slot(target.holder, target.name, original, target.make(original))
            setattr(target.holder, target.name, slot.replacement)
            self._slots[target.key] = slot
        slot.claims += 1
        return slot

    def _restore(self, slot: _Slot) -> None:
        del self._slots[id(slot.holder), slot.name]
        if slot.in_place:
            setattr(slot.holder, slot.name, slot.original)
        else:  # another package has replaced the attribute since, and has to undo that
            logger.warning("%s of %r was replaced by others; left as it is", slot.name, slot.holder)
