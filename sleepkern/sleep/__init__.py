"""Sleep: running a model's blocks N times over a window before its attention cache is dropped (arXiv 2605.26099)."""

from .blocks import Slept, forget_packed, sleep_blocks
from .inserted import InsertedMixer, retrofit
from .memory import Fast, Memory, Slow, Stack
from .recorded import RecordedStack
from .retrofitted import load_retrofitted
from .session import SleepReport, SleepSession

__all__ = [
    "Fast", "InsertedMixer", "Memory", "RecordedStack", "SleepReport", "SleepSession", "Slept", "Slow", "Stack",
    "forget_packed", "load_retrofitted", "retrofit", "sleep_blocks",
]  # fmt: skip
