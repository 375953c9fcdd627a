"""Verification and measurement: what `python -m sleepkern verify` and `bench` run."""

from ..testing.verify import verify
from .against import AgainstReport, bench_against
from .bench import Report, bench, bench_cases
from .environment import environment
from .models import LengthRow, ModelReport, Phase, SleepCost, bench_model

__all__ = [
    "AgainstReport", "LengthRow", "ModelReport", "Phase", "Report", "SleepCost", "bench", "bench_against",
    "bench_cases", "bench_model", "environment", "verify",
]  # fmt: skip
