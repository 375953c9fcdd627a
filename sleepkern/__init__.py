"""Fast, correct, pleasant kernels for fast weights and sleep. Start with ops/recurrence.py."""

import warnings
from importlib import import_module
from typing import TYPE_CHECKING, Any

from . import rules
from .dispatch import Explanation
from .ops.recurrence import (
    SleepResult,
    commit,
    delta_rule,
    explain,
    gated_delta_rule,
    gla,
    kda,
    recurrent_step,
    simple_gla,
    sleep_ingest,
    ssd,
    state_offsets,
)
from .version import __version__

if TYPE_CHECKING:
    from .integrations.transformers import patch, patched, unpatch
    from .measure.bench import bench
    from .testing.verify import verify

__all__ = [
    "Explanation",
    "SleepResult",
    "__version__",
    "bench",
    "commit",
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
    "state_offsets",
    "unpatch",
    "verify",
]


_ON_FIRST_USE = {
    "bench": "measure.bench",
    "patch": "integrations.transformers",
    "patched": "integrations.transformers",
    "unpatch": "integrations.transformers",
    "verify": "testing.verify",
}
"""What no call of a kernel needs, by the module that has it."""
_MOVED = "sleepkern.use_plans is sleepkern.backends.triton.plan.use_plans"


def __getattr__(name: str) -> Any:
    if name == "use_plans":
        warnings.warn(_MOVED, DeprecationWarning, stacklevel=2)
        return import_module(".backends.triton.plan", __name__).use_plans
    if name not in _ON_FIRST_USE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_ON_FIRST_USE[name]}", __name__), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_ON_FIRST_USE})
