"""Sleep: running a model's blocks N times over a window before its attention cache is dropped (arXiv 2605.26099)."""

from typing import Any

from .. import state
from ..state import KVState, RecurrentState
from .adapters.causal_lm import RecordedStack
from .blocks import Slept, explain_blocks, forget_packed, sleep_blocks
from .load_retrofitted import load_retrofitted
from .protocols import Memory, Stack
from .retrofit import InsertedMixer, retrofit
from .session import SleepReport, SleepSession

__all__ = [
    "InsertedMixer", "KVState", "Memory", "RecordedStack", "RecurrentState", "SleepReport", "SleepSession", "Slept",
    "Stack", "explain_blocks", "forget_packed", "load_retrofitted", "retrofit", "sleep_blocks",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    """`Fast` and `Slow`, what RecurrentState and KVState were called."""
    return state.renamed(__name__, name)
