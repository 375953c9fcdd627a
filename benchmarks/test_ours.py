"""Every case of `sleepkern bench`, ours alone: pytest benchmarks/ --benchmark-only"""

import itertools

import pytest

from sleepkern.measure.cases import Case, run, select

CASES = [case for case in select("all", quick=False) if isinstance(case, Case) and case.threads is None]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_ours(benchmark, case):
    sets = itertools.cycle(case.rotation())
    benchmark.extra_info.update(gflop=case.flops * 1e-9, megabytes=case.bytes * 1e-6)
    benchmark.pedantic(lambda: run(case, next(sets)), rounds=5, warmup_rounds=1)
