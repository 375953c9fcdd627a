"""Step 1 of a call, PUBLIC: one file for each family of calls."""

from .recurrence import (
    SleepResult,
    commit,
    delta_rule,
    explain,
    gated_delta_rule,
    gla,
    kda,
    recurrent_step,
    run,
    simple_gla,
    sleep_ingest,
    ssd,
    state_offsets,
)

__all__ = [
    "SleepResult",
    "commit",
    "delta_rule",
    "explain",
    "gated_delta_rule",
    "gla",
    "kda",
    "recurrent_step",
    "run",
    "simple_gla",
    "sleep_ingest",
    "ssd",
    "state_offsets",
]
