"""Verification and measurement: what `python -m sleepkern verify` and `bench` run."""

from ..testing.verify import verify
from .bench import Report, bench, bench_cases
from .environment import environment

__all__ = ["Report", "bench", "bench_cases", "environment", "verify"]
