"""Sleep: running a model's blocks N times over a window before its attention cache is dropped (arXiv 2605.26099)."""

from .blocks import Slept, sleep_blocks
from .session import SleepReport, SleepSession

__all__ = ["SleepReport", "SleepSession", "Slept", "sleep_blocks"]
