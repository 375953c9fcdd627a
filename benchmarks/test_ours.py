"""Every case of `sleepkern bench`, ours alone: pytest benchmarks/ --benchmark-only"""

import itertools

import pytest

from sleepkern.measure.cases import Case, run
from sleepkern.measure.suites import select

CASES = [case for case in select("all", quick=False) if isinstance(case, Case) and case.threads is None]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_ours(benchmark, rounds, case):
    sets = itertools.cycle(case.rotation())
    benchmark.extra_info.update(gflop=case.flops * 1e-9, megabytes=case.bytes * 1e-6)

    def call():
        return run(case, next(sets))

    benchmark.pedantic(call, rounds=rounds(call), warmup_rounds=1)
