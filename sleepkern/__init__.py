"""Fast, correct, pleasant kernels for fast weights and sleep. Start with ops.py."""

from . import rules
from .backends.triton.plan import use_plans
from .dispatch import Explanation
from .integrations.transformers import patch, patched, unpatch
from .measure import bench, verify
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
