"""Verification and measurement: what `python -m sleepkern verify` and `bench` run."""

from ..testing.verify import verify
from .against import AgainstReport, bench_against
from .bench import Report, bench, bench_cases
from .environment import environment

__all__ = ["AgainstReport", "Report", "bench", "bench_against", "bench_cases", "environment", "verify"]
