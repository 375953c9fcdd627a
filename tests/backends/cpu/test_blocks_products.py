"""The forms in which a sleep's products take their operands, on every instruction set, and when they are chosen."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers.block_stacks import SIZES, all_of, by_hand, model

from sleepkern.backends.cpu import blocks as cpu_blocks
from sleepkern.backends.native.module import _C
from sleepkern.nn import HybridBlock, SleepLM
from sleepkern.sleep import sleep_blocks
from sleepkern.testing import relative_error
from sleepkern.testing.tolerances import BLOCKS


@pytest.fixture(params=["plain", "winograd"])
def form(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Any:
    """What is asked for, whatever the machine would choose."""
    chosen = getattr(_C.Form, request.param)
    monkeypatch.setattr(cpu_blocks, "form_for", lambda dtype: chosen)
    return chosen


def used(lm: SleepLM) -> Any:
    return cpu_blocks._packed[lm.blocks()[0]].form


def error(lm: SleepLM, h: torch.Tensor) -> float:
    """The largest of all results of three passes."""
    exact = copy.deepcopy(lm).double()
    with torch.no_grad():
        ours = sleep_blocks(h, lm.blocks(), passes=3)
        true = by_hand(h.double(), exact.blocks(), [None] * 3, 3, "raw", "rewind")
    return max(relative_error(a, b) for a, b in zip(all_of(ours), all_of(true), strict=True) if b.numel())


@pytest.mark.parametrize("size", list(SIZES))
def test_forms_equal_the_modules(size: str, form: Any, isa: str) -> None:
    L, d, heads, B, mixer = SIZES[size]
    lm = model(d, heads, mixer)
    assert error(lm, torch.randn(B, L, d)) < BLOCKS
    assert used(lm) == form


@pytest.mark.parametrize("rows", [1, 3, 4, 5, 6, 8, 9, 31, 32, 33, 63, 97, 198])
def test_whole_and_broken_tiles(rows: int, form: Any) -> None:
    """And depths that are no multiple of a triple."""
    lm = model(170, 5, {}, blocks=2)
    exact, h = copy.deepcopy(lm).double(), torch.randn(rows, 1, 170)
    with torch.no_grad():
        ours = sleep_blocks(h, lm.blocks(), passes=2)
        true = by_hand(h.double(), exact.blocks(), [None] * 2, 2, "raw", "rewind")
    for a, b in zip(all_of(ours), all_of(true), strict=True):
        assert relative_error(a, b) < BLOCKS or b.numel() == 0


def louder(block: HybridBlock) -> None:
    block.mlp.up.weight.mul_(30)
    block.mixer.out.weight.mul_(300)


def quieter(block: HybridBlock) -> None:
    block.mlp.up.weight.mul_(0.01)
    block.mlp.out.weight.mul_(0.01)


def loud_within(block: HybridBlock) -> None:
    """What `out` and `down` are multiplied with is large, which their weights make good."""
    mixer: Any = block.mixer
    if block.recurrent:
        mixer.norm.weight.mul_(1000)
    else:
        mixer.qkv.weight.mul_(1000)
    mixer.out.weight.div_(1000)
    block.mlp.up.weight.mul_(1000)
    block.mlp.out.weight.div_(1e6)


def uneven(block: HybridBlock) -> None:
    block.mlp.up.weight[3].mul_(12)
    block.mlp.out.weight[:, 5].mul_(12)
    block.mixer_norm.weight[7] = 10


@pytest.mark.parametrize("change", [louder, quieter, loud_within, uneven])
def test_operands_are_balanced(change: Callable[[HybridBlock], None], form: Any) -> None:
    lm = model(256, 4, {})
    with torch.no_grad():
        for block in lm.blocks():
            change(block)
    assert error(lm, torch.randn(3, 24, 256)) < BLOCKS
    assert used(lm) == form


@pytest.mark.usefixtures("form")
def test_what_is_zero_stays_so() -> None:
    """Weights, where a block then leaves h as it was, and rows of h: noise there would be blown up by a norm."""
    lm, h = model(256, 4, {}), torch.randn(3, 24, 256)
    h[1, 3], h[2] = 0, 0
    assert error(lm, h) < BLOCKS
    with torch.no_grad():
        assert not sleep_blocks(h, lm.blocks(), passes=2).h[2].any()
        for block in lm.blocks():
            block.mixer.out.weight.zero_()
            block.mlp.out.weight.zero_()
        assert torch.equal(sleep_blocks(h, lm.blocks(), passes=2).h, h)


def one_output(block: HybridBlock) -> None:
    block.mlp.up.weight[3].mul_(300)


def one_input(block: HybridBlock) -> None:
    block.mixer_norm.weight[3] = 300


@pytest.mark.parametrize("change", [one_output, one_input])
def test_stacks_that_are_uneven_are_taken_plainly(
    change: Callable[[HybridBlock], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cpu_blocks, "form_for", lambda dtype: _C.Form.winograd)
    lm = model(256, 4, {})
    with torch.no_grad():
        change(lm.blocks()[1])
    assert error(lm, torch.randn(3, 24, 256)) < 2 * BLOCKS
    assert used(lm) == _C.Form.plain


def test_what_is_not_finite_keeps_to_its_window(form: Any) -> None:
    lm, h = model(64, 4, {}), torch.randn(5, 9, 64)
    with torch.no_grad():
        expected = sleep_blocks(h, lm.blocks(), passes=2).h
        h[2, 4, 3] = float("nan")
        found = sleep_blocks(h, lm.blocks(), passes=2).h
        others = [0, 1, 3, 4]
        assert torch.equal(found[others], expected[others]) and found[2, 4:].isnan().all()
        lm.blocks()[1].mlp.up.weight[0, 0] = float("inf")
        assert sleep_blocks(h, lm.blocks(), passes=2).h.isnan().any()
        assert used(lm) == _C.Form.plain


def test_the_machine_chooses(isa: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """bfloat16 by its instruction where h allows it, else Winograd's product where additions are free."""
    pairs, adders = isa == "avx512bf16", _C.adds_beside_products()
    assert not adders or isa.startswith("avx512")
    floats = _C.Form.winograd if adders else _C.Form.plain
    assert cpu_blocks.form_for(torch.float32) == floats
    assert cpu_blocks.form_for(torch.bfloat16) == (_C.Form.bfloat16 if pairs else floats)
    for free in (True, False):
        monkeypatch.setattr(_C, "adds_beside_products", lambda free=free: free)
        assert cpu_blocks.form_for(torch.float32) == (_C.Form.winograd if free else _C.Form.plain)
