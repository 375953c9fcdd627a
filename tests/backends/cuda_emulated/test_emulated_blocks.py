"""The CUDA kernel of sleep_blocks, run on the CPU by clusters of blocks, against the modules one by one in float64."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple
from unittest import mock
from weakref import ref

import pytest
import torch
from conftest import A100, H100
from helpers.block_stacks import all_of, before
from torch import Tensor
from torch.utils._pytree import tree_leaves

from sleepkern.backends.cuda import blocks as cuda_blocks
from sleepkern.backends.cuda import blocks_plan as planning
from sleepkern.backends.cuda import recurrence as cuda
from sleepkern.backends.cuda.device import Device
from sleepkern.nn import SleepLM
from sleepkern.problems.blocks import describe
from sleepkern.sleep import SleepSession
from sleepkern.sleep.blocks import one_by_one, sleep_blocks
from sleepkern.sleep.cuda_graph import GraphCache
from sleepkern.testing import relative_error

TOLERANCE = 1e-2
"""Of products in bfloat16."""
DEVICE = H100._replace(multiprocessors=132)


class Case(NamedTuple):
    """Sizes, how the call is cut, and what it is asked for; kept: tokens before the window."""

    L: int
    d: int
    heads: int
    cluster: int
    B: int = 1
    blocks: int = 2
    pattern: str = "AG"
    factor: int = 3
    mixer: dict[str, Any] = {}
    passes: int = 2
    feedback: str = "raw"
    conv_state: str = "rewind"
    kept: int = 0
    exchange: int | None = None
    spread: float = 1.0  # of the tokens of a window: keys are alike where it is small
    dtype: torch.dtype = torch.bfloat16


CASES = {
    "one block": Case(5, 32, 2, 1, passes=1),
    "one token": Case(1, 32, 1, 1, B=2, conv_state="carry", passes=3),
    "one token, continued": Case(1, 32, 1, 1, B=2, kept=3, conv_state="carry", feedback="reinject"),
    "two blocks, odd": Case(17, 40, 2, 2, B=3),
    "four blocks": Case(24, 64, 4, 4, B=2, conv_state="carry"),
    "reinject": Case(24, 64, 4, 4, B=2, feedback="reinject", kept=7),
    "exchanges by pieces": Case(33, 64, 4, 2, B=3, blocks=3, pattern="GA", feedback="reinject", kept=20, exchange=1),
    "three exchanges": Case(20, 96, 2, 2, exchange=1),
    "four exchanges": Case(20, 128, 2, 2, exchange=1, factor=1, passes=1),
    "a smaller last exchange": Case(9, 192, 2, 2, exchange=5, factor=1, passes=1),
    "long window": Case(120, 64, 2, 2, exchange=1, factor=1, passes=1),
    "keys alike": Case(50, 64, 1, 1, spread=0.03, mixer={"negative": True}),
    "odd heads": Case(
        5, 24, 2, 2, blocks=3, kept=2, mixer={"key_width": 7, "value_heads": 4, "value_width": 5, "convolution": 3}
    ),
    "odd keys": Case(5, 24, 2, 2, kept=2, mixer={"key_width": 9, "value_width": 20}),
    "wide heads": Case(20, 112, 1, 1, mixer={"key_width": 100, "value_width": 120, "negative": True}),
    "many windows": Case(24, 48, 2, 1, B=7, conv_state="carry", mixer={"convolution": 1}),
    "float32": Case(24, 32, 2, 2, B=2, dtype=torch.float32, kept=5),
    "float16": Case(9, 32, 2, 2, dtype=torch.float16, kept=9, conv_state="carry"),
}
LARGE = {
    "rule 110": Case(24, 256, 4, 4, factor=4),
    "eight blocks": Case(75, 128, 8, 8, factor=4, blocks=1, pattern="G", exchange=1),
}
ORDERS: tuple[dict[str, Any], ...] = (
    {"order": "forward", "early_copies": True}, {"order": "backward"}, {"order": "random", "seed": 7},
)  # fmt: skip


def model(case: Case) -> SleepLM:
    """With norms that are not 1."""
    torch.manual_seed(case.L + case.d)
    made = SleepLM(8, case.d, case.heads, case.blocks, 200, case.pattern, case.factor, case.mixer)
    for parameter in made.parameters():
        if parameter.ndim == 1:
            torch.nn.init.uniform_(parameter, 0.5, 1.5)
    return made.to(case.dtype)


@contextmanager
def memory_as_planned(device: Device) -> Iterator[None]:
    """A launch asks for no more shared memory than the device has."""
    launch = planning._C.cuda_blocks

    def held(call: Any, layers: list[Any], *carried: Any, **addresses: int) -> None:
        assert planning._C.cuda_blocks_memory(call, layers) <= device.shared_memory
        launch(call, layers, *carried, **addresses)

    with mock.patch.object(cuda._C, "cuda_blocks", held):
        yield


def check(case: Case, on: Any, **order: Any) -> None:
    lm = model(case)
    blocks, exact = lm.blocks(), copy.deepcopy(lm).double().blocks()
    tokens = torch.randn(case.B, case.L, case.d)
    h = (tokens if case.spread == 1.0 else torch.randn(case.B, 1, case.d) + case.spread * tokens).to(case.dtype)
    device, precision = order.pop("device", DEVICE), torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("medium")
        with (
            torch.no_grad(),
            on(device=device, **order),
            mock.patch.object(planning, "CLUSTERS", (case.cluster,)),
        ):
            states = before(blocks, h, case.kept) if case.kept else [None] * case.blocks
            reinject, carry = case.feedback == "reinject", case.conv_state == "carry"
            problem = describe(h, blocks, states, case.passes, reinject, carry)
            shapes = cuda_blocks.shapes_of(problem.layers)
            plan = planning._plan.__wrapped__(case.B, case.L, case.d, shapes, device)
            assert plan is not None
            plan = plan._replace(exchange=case.exchange or plan.exchange)
            with mock.patch.object(cuda_blocks, "plan", return_value=plan), memory_as_planned(device):
                assert cuda_blocks.why_not(problem) is None
                ours = cuda_blocks.run(problem, h, blocks, states)
            wide = [s if s is None else type(s)(*(t.double() for t in s)) for s in states]
            true = one_by_one(h.double(), exact, case.passes, wide, case.feedback, case.conv_state)  # type: ignore[arg-type]
    finally:
        torch.set_float32_matmul_precision(precision)
    for got, expected in zip(all_of(ours), all_of(true), strict=True):
        assert got.shape == expected.shape
        assert relative_error(got, expected) <= TOLERANCE or expected.numel() == 0
    assert torch.allclose(ours.changes.double(), true.changes, rtol=TOLERANCE)


@pytest.mark.parametrize("order", ORDERS, ids=lambda o: o["order"])
@pytest.mark.parametrize("name", CASES)
def test_equals_the_modules(on, name: str, order: dict[str, Any]) -> None:
    check(CASES[name], on, **order)


@pytest.mark.parametrize("name", LARGE)
def test_sizes_of_use(on, name: str) -> None:
    check(LARGE[name], on, order="random")


def test_before_clusters(on) -> None:
    """Compute capability 8.0 has one block for a group of windows, and copies by all lanes."""
    check(Case(24, 64, 2, 1, B=3, kept=5), on, device=A100, order="backward")


def test_gradients(on) -> None:
    """The kernel forward, the modules backward from what lay between its passes."""
    case = Case(11, 24, 2, 2, B=2, dtype=torch.float32)
    lm, exact, precision = model(case), model(case).double(), torch.get_float32_matmul_precision()
    h = torch.randn(case.B, case.L, case.d)

    def gradients(run: Any, lm: SleepLM, h: Tensor) -> list[Tensor]:
        slept = run(h.requires_grad_(), lm.blocks(), passes=3, feedback="reinject")
        loss = sum(t.square().sum() for t in all_of(slept))
        return list(torch.autograd.grad(loss, [h, *(p for block in lm.blocks() for p in block.parameters())]))

    try:
        torch.set_float32_matmul_precision("medium")
        with on(device=DEVICE):
            ours = gradients(partial(sleep_blocks, backend="cuda"), lm, h.clone())
    finally:
        torch.set_float32_matmul_precision(precision)
    true = gradients(one_by_one, exact, h.double())
    assert max(relative_error(a, b) for a, b in zip(ours, true, strict=True)) <= 2 * TOLERANCE


@torch.no_grad()
@pytest.mark.parametrize("L", [5, 24])
def test_windows_of_a_group_keep_to_themselves(on, L: int) -> None:
    """Also what is not a number."""
    case = Case(L, 32, 1, 1, B=2)
    lm, h = model(case), torch.randn(2, L, 32).bfloat16()
    found = planning.BlocksPlan(cluster=1, group=2, tiles=5, columns=32, exchange=2, ring=2)
    with on(device=DEVICE), mock.patch.object(cuda_blocks, "plan", return_value=found):
        clean = sleep_blocks(h, lm.blocks(), passes=2, backend="cuda")
        h[1, 0] = torch.nan
        poisoned = sleep_blocks(h, lm.blocks(), passes=2, backend="cuda")
    for a, b in zip(all_of(clean), all_of(poisoned), strict=True):
        assert torch.equal(a[0], b[0]) and b[1].isnan().any()


class Recorder:
    """Records nothing: a replay is another run. Counts."""

    device, count = "cpu", 0

    def record(self, run: Any) -> Any:
        self.count += 1
        made = run()

        def again() -> None:
            for old, new in zip(tree_leaves(made), tree_leaves(run()), strict=True):
                old.copy_(new)

        return again, made


@torch.no_grad()
def test_recordings_keep_packed_weights_and_go_with_them(on) -> None:
    case = Case(8, 32, 2, 1, B=1)
    lm, recorder = model(case), Recorder()
    ids = torch.randint(8, (1, 8))
    session = SleepSession(lm, 8, 2, capture=True)
    session.graph_cache = GraphCache(recorder)
    with on(device=DEVICE):
        for times in (1, 1):
            session.fork().ingest(ids)
            assert recorder.count == times
        (graph,) = session.graph_cache.graphs.values()
        kept = [ref(packed) for packed in graph.packed]
        assert kept
        lm.blocks()[0].mlp.up.weight *= 2
        sleep_blocks(torch.randn(1, 8, 32).bfloat16(), lm.blocks(), backend="cuda")  # packs them anew
        assert all(packed() is not None for packed in kept) and not graph.current(session)
        session.fork().ingest(ids)
        assert recorder.count == 2


@pytest.mark.parametrize("device", [DEVICE, A100, Device((12, 0), 101376, 170)])
def test_plans_fit(on, device: Device) -> None:
    with on(device=device):
        for L, d, heads in ((1, 32, 1), (24, 256, 4), (75, 512, 8), (128, 512, 8), (128, 512, 4), (128, 96, 3)):
            blocks = model(Case(L, d, heads, 1, blocks=2)).blocks()
            shapes = cuda_blocks.shapes_of(describe(torch.empty(1).bfloat16(), blocks).layers)
            for B in (1, 16, 128, 1024):
                plan = planning.plan(B, L, d, shapes, device)
                why = str(cuda_blocks.why_not(describe(torch.empty(B, L, d, dtype=torch.bfloat16), blocks)))
                if plan is None:
                    assert "shared memory" in why and (device != DEVICE or L == 128)
                    continue
                assert "rounds" in why if planning.slower(plan, B, device, captured=False) else why == "None"
                layers = [planning.share(s, plan.cluster) for s in shapes]
                assert planning._C.cuda_blocks_memory(planning.call_of(plan, L), layers) <= device.shared_memory
                assert plan.cluster == 1 or device.capability >= (9, 0)
                assert heads % plan.cluster == 0 and plan.group * L <= 16 * plan.tiles


def test_where_ordinary_operators_win(on) -> None:
    """As an H200 was seen to: many windows, and graphs of windows of many rows."""
    with on(device=DEVICE):
        for L, d, heads, B, captured, wins in (
            (24, 256, 4, 16, True, False), (24, 256, 4, 1024, False, False), (24, 256, 4, 1024, True, True),
            (75, 512, 8, 16, False, False), (75, 512, 8, 1, True, True), (75, 512, 8, 128, False, True),
        ):  # fmt: skip
            blocks = model(Case(L, d, heads, 1)).blocks()
            shapes = cuda_blocks.shapes_of(describe(torch.empty(1).bfloat16(), blocks).layers)
            plan = planning.plan(B, L, d, shapes, DEVICE)
            assert plan is not None
            assert (planning.slower(plan, B, DEVICE, captured) is not None) == wins, (L, B, captured)


def test_refusals(on) -> None:
    def why(case: Case, dtype: torch.dtype = torch.bfloat16, L: int | None = None) -> str:
        blocks = model(case._replace(dtype=dtype)).blocks()
        return str(cuda_blocks.why_not(describe(torch.empty(1, L or case.L, case.d, dtype=dtype), blocks)))

    small = Case(5, 32, 2, 1)
    with on(device=DEVICE):
        assert why(small) == "None"
        assert "medium" in why(small, torch.float32)
        assert "at most 128 tokens" in why(small, L=129)
        assert "widths of at most 512" in why(small._replace(d=640, heads=5))
        assert "heads of at most 128" in why(small._replace(mixer={"key_width": 160}))
        assert "convolutions" in why(small._replace(mixer={"convolution": 5}))
        assert "at most 24 blocks" in why(small._replace(blocks=25))
        assert "h is torch.float32" in str(cuda_blocks.why_not(describe(torch.empty(1, 5, 32), model(small).blocks())))
