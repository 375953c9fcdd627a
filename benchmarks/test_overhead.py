"""What a call costs beyond its kernel: the whole way from the public function down, on next to no
work."""

import torch

from sleepkern import rules
from sleepkern.measure.cases import Case, run
from sleepkern.testing import Shape

CASE = Case("forward", rules.GATED_DELTA_RULE, Shape(T=1, H=1, HV=1, K=8, V=8))


@torch.no_grad()
def test_overhead(benchmark):
    inputs = CASE.inputs()
    benchmark(lambda: run(CASE, inputs))
