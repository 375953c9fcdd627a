"""The main shape, every peer that is installed: pytest benchmarks/ --benchmark-only -k peers"""

import itertools

import pytest

from sleepkern import rules
from sleepkern.measure.cases import Case
from sleepkern.measure.peers import PEERS
from sleepkern.testing import Shape

CASE = Case("forward", rules.GATED_DELTA_RULE, Shape(T=2048, H=16, HV=16, K=128, V=128))


@pytest.mark.parametrize("peer", PEERS, ids=lambda peer: peer.name)
def test_peers(benchmark, rounds, peer):
    reason = peer.why_not(CASE, "cpu")
    if reason is not None:
        pytest.skip(reason)
    calls = itertools.cycle([peer.prepare(CASE, x, 1) for x in CASE.rotation()])

    def call():
        return next(calls)()

    benchmark.pedantic(call, rounds=rounds(call), warmup_rounds=1)
