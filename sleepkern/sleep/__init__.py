"""Sleep: running a model's blocks N times over a window before its attention cache is dropped (arXiv 2605.26099)."""

import warnings
from typing import Any

from .. import state
from ..state import KVState, RecurrentState
from .adapters.causal_lm import CausalLMAdapter
from .blocks import Slept, explain_blocks, forget_packed, sleep_blocks
from .load_retrofitted import load_retrofitted
from .prefix_cache import PrefixCache, PrefixHit
from .protocols import FusedModelAdapter, LayerCache, ModelAdapter
from .retrofit import InsertedMixer, retrofit
from .session import SleepReport, SleepSession

__all__ = [
    "CausalLMAdapter", "FusedModelAdapter", "InsertedMixer", "KVState", "LayerCache", "ModelAdapter", "PrefixCache",
    "PrefixHit", "RecurrentState", "SleepReport", "SleepSession", "Slept", "explain_blocks", "forget_packed",
    "load_retrofitted", "retrofit", "sleep_blocks",
]  # fmt: skip

_RENAMED: dict[str, Any] = {"Memory": LayerCache, "RecordedStack": CausalLMAdapter, "Stack": ModelAdapter}


def __getattr__(name: str) -> Any:
    """Former names: of the adapters, and `Fast` and `Slow` of RecurrentState and KVState."""
    found = _RENAMED.get(name)
    if found is None:
        return state.renamed(__name__, name)
    warnings.warn(f"{__name__}.{name} is {__name__}.{found.__name__}", DeprecationWarning, stacklevel=2)
    return found
