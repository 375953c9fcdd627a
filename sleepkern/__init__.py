"""Fast, correct, pleasant kernels for fast weights and sleep. Start with ops.py."""

from typing import TYPE_CHECKING, Any

from . import rules
from .backends.triton.plan import use_plans
from .dispatch import Explanation
from .integrations.transformers import patch, patched, unpatch
from .ops import (
    SleepResult,
    delta_rule,
    explain,
    gated_delta_rule,
    gla,
    kda,
    recurrent_step,
    simple_gla,
    sleep_ingest,
    ssd,
)

if TYPE_CHECKING:
    from .measure import bench, verify

__version__ = "0.1.0"

__all__ = [
    "Explanation",
    "SleepResult",
    "bench",
    "delta_rule",
    "explain",
    "gated_delta_rule",
    "gla",
    "kda",
    "patch",
    "patched",
    "recurrent_step",
    "rules",
    "simple_gla",
    "sleep_ingest",
    "ssd",
    "unpatch",
    "use_plans",
    "verify",
]


def __getattr__(name: str) -> Any:
    """`bench` and `verify` on first use: they import peers, models and suites, which no call needs."""
    if name in ("bench", "verify"):
        from . import measure

        return getattr(measure, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
