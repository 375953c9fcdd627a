"""The two environment switches, read once on import; neither changes a result.

SLEEPKERN_BACKEND=name  the backend every call takes that names none itself
SLEEPKERN_DEBUG=1       look for NaN and check values on a GPU too, at the price of a synchronisation
"""

from __future__ import annotations

import os

BACKEND: str | None = os.environ.get("SLEEPKERN_BACKEND") or None
DEBUG: bool = os.environ.get("SLEEPKERN_DEBUG", "0") not in ("", "0")
