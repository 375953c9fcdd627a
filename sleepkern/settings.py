"""The two environment switches, read once on import; neither changes what a result means.

SLEEPKERN_BACKEND=name  the backend that every call takes which names none itself. A family of calls that has none of
                        that name takes its torch form; a name that no family knows is refused by the first call
SLEEPKERN_DEBUG=1       look for NaN and infinities and check values on a GPU too, at the price of a synchronisation
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

BACKEND: str | None = os.environ.get("SLEEPKERN_BACKEND") or None
DEBUG: bool = os.environ.get("SLEEPKERN_DEBUG", "0") not in ("", "0")


@contextmanager
def backend(name: str | None) -> Iterator[None]:
    """Behave as if SLEEPKERN_BACKEND said `name`, in all threads."""
    global BACKEND
    before, BACKEND = BACKEND, name
    try:
        yield
    finally:
        BACKEND = before
