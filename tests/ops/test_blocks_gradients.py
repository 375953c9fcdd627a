"""The backward of passes of a stack in one call: every gradient against plain autograd, and what it keeps."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from helpers.block_stacks import OPTIONS, all_of, as_type, before, by_hand, model
from torch import Tensor

from sleepkern.nn import SleepLM
from sleepkern.sleep import sleep_blocks
from sleepkern.sleep.blocks import Slept, one_by_one
from sleepkern.testing import relative_error
from sleepkern.testing.tolerances import BLOCK_GRADIENTS, BLOCKS


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("continued", [False, True], ids=["from nothing", "continued"])
def test_gradients_are_autograd_s(continued: bool, options: tuple[str, str, int]) -> None:
    lm = model(24, 2, {"value_heads": 4})
    exact = copy.deepcopy(lm).double()
    h = torch.randn(3, 11, 24, requires_grad=True)
    states = before(lm.blocks(), h) if continued else [None] * 3

    def gradients(run: Callable[..., Slept], lm: SleepLM, dtype: torch.dtype) -> list[Tensor]:
        x, began = h.detach().to(dtype).requires_grad_(), as_type(states, dtype)
        leaves = [t.requires_grad_() for s in began if s is not None for t in s]
        slept = run(x, lm.blocks(), began, options[2], options[0], options[1])
        loss = sum((t * torch.linspace(-1, 1, t.numel(), dtype=dtype).view(t.shape)).sum() for t in all_of(slept))
        parameters = [p for block in lm.blocks() for p in block.parameters()]
        return list(torch.autograd.grad(loss, [x, *leaves, *parameters]))  # type: ignore[arg-type]

    lm.blocks()[1].mlp_norm.weight.requires_grad_(True)
    ours, true = gradients(sleep_blocks, lm, torch.float32), gradients(by_hand, exact, torch.float64)
    for i, (a, b) in enumerate(zip(ours, true, strict=True)):
        assert relative_error(a, b) < BLOCK_GRADIENTS, i


def test_frozen_parameters_get_no_gradient() -> None:
    lm = model(24, 2, {})
    lm.blocks()[0].requires_grad_(False)
    slept = sleep_blocks(torch.randn(2, 9, 24), lm.blocks(), passes=2)
    slept.h.sum().backward()
    assert all(p.grad is None for p in lm.blocks()[0].parameters())
    assert all(p.grad is not None for p in lm.blocks()[1].parameters())


def test_memory_of_a_backward_is_what_lies_between_passes() -> None:
    """Tensors that the graph keeps: h and the fast weights of each pass, nothing that blocks make inside."""
    B, L, d, N = 4, 64, 48, 8
    lm = model(d, 2, {}, "G", 4)
    h = torch.randn(B, L, d, requires_grad=True)
    slept = sleep_blocks(h, lm.blocks(), passes=N)
    assert slept.h.grad_fn is not None
    weights = {p.data_ptr() for p in lm.parameters()}
    kept = {t.data_ptr(): t for t in slept.h.grad_fn.saved_tensors if t.data_ptr() not in weights}  # type: ignore[union-attr]
    of_a_pass = h.numel() + sum(t.numel() for state in slept.states for t in state)
    assert N * h.numel() < sum(t.numel() for t in kept.values()) <= N * of_a_pass


def test_shared_weights_count_once() -> None:
    lm, h = model(24, 2, {}, "GG"), torch.randn(2, 9, 24)
    blocks = [lm.blocks()[0], lm.blocks()[1], lm.blocks()[0]]
    blocks[1].mlp = blocks[0].mlp
    wanted = list(dict.fromkeys(p for block in blocks for p in block.parameters()))
    ours, true = (
        torch.autograd.grad(run(h, blocks, passes=2).h.square().sum(), wanted) for run in (sleep_blocks, one_by_one)
    )
    for a, b in zip(ours, true, strict=True):
        assert relative_error(a, b.double()) < BLOCKS


def test_weights_written_to_before_the_backward_are_seen() -> None:
    lm, h = model(24, 2, {}), torch.randn(2, 9, 24, requires_grad=True)
    loss = sleep_blocks(h, lm.blocks(), passes=2).h.sum()
    with torch.no_grad():
        lm.blocks()[0].mlp.up.weight.add_(0.1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_the_backward_is_not_cast() -> None:
    lm, h = model(24, 2, {}), torch.randn(2, 9, 24, requires_grad=True)
    first, second = (sleep_blocks(h, lm.blocks(), passes=2).h.sum() for _ in range(2))
    (true,) = torch.autograd.grad(first, h)
    with torch.autocast("cpu", torch.bfloat16):
        (ours,) = torch.autograd.grad(second, h)
    assert torch.equal(ours, true)


def test_gradients_of_gradients_are_refused() -> None:
    lm, h = model(24, 2, {}), torch.randn(2, 9, 24, requires_grad=True)
    (grad,) = torch.autograd.grad(sleep_blocks(h, lm.blocks()).h.square().sum(), h, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()
