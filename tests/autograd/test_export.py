"""Graphs that leave sizes open: one exported program or compiled graph is right for every length and batch."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounter

import sleepkern
from sleepkern.backends.native.module import _C
from sleepkern.rules import GATED_DELTA_RULE, Rule
from sleepkern.testing import Shape, make_inputs

NAMES = ("q", "k", "v", "g", "beta", "initial_state")
OWN = Rule("my own name", "head", True)


class Recurrence(nn.Module):
    """One pass, a replay by the method that fits, and a few tokens more; under a rule equal to a row of RULES, too."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, S: Tensor) -> tuple[Any, ...]:
        o, after = sleepkern.gated_delta_rule(q, k, v, g, beta, initial_state=S, output_final_state=True)
        r = sleepkern.sleep_ingest(k, v, g, beta, passes=3, q=q, initial_state=S, rule=OWN)
        assert after is not None
        return o, r.final_state, r.output, *sleepkern.recurrent_step(q, k, v, g, beta, after, inplace=False)


def arguments(B: int, T: int) -> tuple[Tensor, ...]:
    x = make_inputs(GATED_DELTA_RULE, Shape(B=B, T=T, H=1, HV=2, K=8, V=8), seed=T)
    return tuple(x[n] for n in NAMES)


def test_methods_differ_between_the_lengths() -> None:
    methods = set()
    for T in (2, 20, 65, 300):
        q, k, v, g, beta, S = arguments(2, T)
        methods.add(sleepkern.sleep_ingest(k, v, g, beta, passes=3, q=q, initial_state=S).method)
    assert len(methods) > 1  # or the tests below would not see a choice that is made too early


@pytest.mark.parametrize(("T", "strict"), [(20, False), (100, True)])
def test_an_exported_program_is_right_for_every_length(T: int, strict: bool) -> None:
    batch, tokens = torch.export.Dim("B", min=2, max=64), torch.export.Dim("T", min=2, max=4096)
    open_sizes = (*({0: batch, 1: tokens},) * 5, {0: batch})
    program = torch.export.export(Recurrence(), arguments(2, T), dynamic_shapes=open_sizes, strict=strict).module()
    for B, length in ((2, 2), (3, 7), (2, 64), (5, 65), (2, 300)):
        x = arguments(B, length)
        for made, true in zip(program(*x), Recurrence()(*x), strict=True):
            assert torch.equal(made, true), (B, length)


def test_a_compiled_graph_is_made_once() -> None:
    torch.compiler.reset()
    counter = CompileCounter()
    compiled = torch.compile(Recurrence(), fullgraph=True, backend=counter, dynamic=True)
    for B, T in ((4, 20), (3, _C.rank_limit), (5, _C.rank_limit + 1), (4, 300)):  # no other size is 4
        x = arguments(B, T)
        for made, true in zip(compiled(*x), Recurrence()(*x), strict=True):
            assert torch.equal(made, true), (B, T)
    assert counter.frame_count == 1
