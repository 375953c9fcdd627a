"""Verification and measurement: what `python -m sleepkern verify` and `bench` run."""

from .bench import Report, bench, bench_cases
from .environment import environment
from .verify import verify

__all__ = ["Report", "bench", "bench_cases", "environment", "verify"]
