"""What a call of the CUDA backend does on the host in the steady state: launches, allocations, synchronisations.

Kernels are left out: the launches of the module are counted and do nothing.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

import sleepkern
from sleepkern.backends.cuda import recurrence as cuda
from sleepkern.nn import SleepLM
from sleepkern.problems import recurrence as problems
from sleepkern.rules import GATED_DELTA_RULE, KDA, Rule
from sleepkern.sleep.blocks import sleep_blocks
from sleepkern.testing import Shape, make_inputs

LAUNCHES = ("cuda_decode", "cuda_replay", "cuda_blocks", "cuda_powers", "cuda_powers_backward")
WAITS = (
    "aten::item",
    "aten::_local_scalar_dense",
    "aten::is_nonzero",
    "aten::nonzero",
    "aten::_to_copy",
    "aten::copy_",
)
"""Operators that would wait for a GPU or copy a tensor."""


@contextmanager
def counted() -> Iterator[Counter[str]]:
    """Count the launches, which do nothing."""
    seen: Counter[str] = Counter()

    def launch(name: str) -> Callable[..., None]:
        return lambda *_, **__: seen.update([name])

    with mock.patch.multiple(cuda._C, **{name: launch(name) for name in LAUNCHES}):
        yield seen


def steady(call: Callable[[], Any]) -> tuple[dict[str, int], Counter[str]]:
    """The launches of a call that was made before, and torch's operators in it."""
    with counted() as seen, torch.no_grad():
        for _ in range(3):  # what a call finds out is remembered, and so is that it is still true
            call()
        seen.clear()
        with profile(activities=[ProfilerActivity.CPU]) as operators:
            call()
    return dict(seen), Counter(event.name for event in operators.events() if event.name.startswith("aten::"))


@pytest.fixture(autouse=True)
def as_on_a_gpu(on: Callable[..., Any]) -> Iterator[None]:
    """Tensors of the CPU pass for those of a GPU."""
    describe = problems.describe
    with on(), mock.patch.object(problems, "describe", lambda *a, **b: describe(*a, **b)._replace(device="cuda")):
        yield


@pytest.mark.parametrize("rule", [GATED_DELTA_RULE, KDA], ids=lambda rule: rule.name)
def test_decode_is_one_launch_and_one_allocation(rule: Rule) -> None:
    x = make_inputs(rule, Shape(B=3, T=1, K=32, V=32), torch.bfloat16)
    state = torch.zeros(3, 2, 32, 32)
    given = {name: x[name] for name in ("q", "k", "v", "g", "beta")}
    launches, operators = steady(lambda: sleepkern.recurrent_step(**given, state=state, rule=rule, backend="cuda"))
    assert launches == {"cuda_decode": 1}
    assert operators["aten::empty"] + operators["aten::empty_like"] <= 2  # one, which calls the other
    assert not [name for name in WAITS if operators[name]]


@pytest.mark.parametrize("rule", [GATED_DELTA_RULE, KDA], ids=lambda rule: rule.name)
def test_a_replay_is_one_launch(rule: Rule) -> None:
    x = make_inputs(rule, Shape(T=30, K=32, V=32), torch.bfloat16)
    given = {name: x[name] for name in ("k", "v", "g", "beta")}
    launches, operators = steady(lambda: sleepkern.sleep_ingest(**given, passes=4, rule=rule, backend="cuda"))
    assert launches == {"cuda_replay": 1}
    assert not [name for name in WAITS if operators[name]]


def test_a_sleep_is_one_launch() -> None:
    """Its operators do not grow with the passes."""
    torch.manual_seed(0)
    model = SleepLM(8, 32, 2, 2, 64, "AG", 3).bfloat16()
    h, found = torch.randn(1, 9, 32).bfloat16(), []
    for passes in (1, 5):
        launches, operators = steady(lambda n=passes: sleep_blocks(h, list(model.layers), passes=n, backend="cuda"))
        assert launches == {"cuda_blocks": 1}
        assert not [name for name in ("aten::item", "aten::_local_scalar_dense", "aten::nonzero") if operators[name]]
        found.append(operators)
    assert found[0] == found[1]
