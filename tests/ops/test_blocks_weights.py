"""Weights of blocks that are replaced, lent or edited: results of a call are those of the modules one by one."""

from __future__ import annotations

import gc
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.block_stacks import all_of, model
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.func import functional_call
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn.utils import parameters_to_vector, vector_to_parameters
from torch.testing._internal.two_tensor import TwoTensor
from torch.utils._pytree import tree_map_only

from sleepkern.backends.native.identity import Source
from sleepkern.nn import HybridBlock, SleepLM
from sleepkern.problems.layer_weights import LayerWeights, layers_of
from sleepkern.sleep import sleep_blocks
from sleepkern.sleep.blocks import one_by_one, why_not
from sleepkern.state import KVState, RecurrentState
from sleepkern.testing import relative_error
from sleepkern.testing.tolerances import BLOCKS, BLOCKS_BF16

_MEMORY = np.zeros((24, 24), dtype=np.float32)
"""The storage that weights of several owners take in turn, so that they have one address."""


def weights_of(lm: SleepLM) -> tuple[LayerWeights, ...]:
    found = layers_of(lm.blocks())
    assert not isinstance(found, str)
    return found


def placed(seed: int) -> Tensor:
    """Other numbers at the same address, in a storage of its own."""
    _MEMORY[:] = np.random.default_rng(seed).standard_normal(_MEMORY.shape)
    return torch.from_numpy(_MEMORY)


def parameter_anew(lm: SleepLM) -> None:
    out = lm.blocks()[0].mixer.out
    out.weight = None  # type: ignore[assignment]
    out.weight = nn.Parameter(placed(1))


def data_anew(lm: SleepLM) -> None:
    out = lm.blocks()[0].mixer.out
    out.weight.data = torch.empty(0)
    out.weight.data = placed(1)


def transposed(lm: SleepLM) -> None:
    out = lm.blocks()[0].mixer.out
    out.weight.data = out.weight.data.T


def wrapped_anew(lm: SleepLM) -> None:
    """The count of writes starts at 0 again, on memory that was written to."""
    out = lm.blocks()[0].mixer.out
    with torch.no_grad():
        out.weight.mul_(2)
    alias = out.weight.data
    out.weight = None  # type: ignore[assignment]
    out.weight = nn.Parameter(alias)


def out_of_a_vector(lm: SleepLM) -> None:
    parameters = list(lm.blocks()[0].parameters())
    vector_to_parameters(parameters_to_vector(parameters).detach() * 1.5, parameters)


def loaded(lm: SleepLM) -> None:
    lm.load_state_dict({name: 1.5 * t for name, t in lm.state_dict().items()}, assign=True)


def swapped(lm: SleepLM) -> None:
    weight = lm.blocks()[0].mixer.out.weight
    torch.utils.swap_tensors(weight, nn.Parameter(weight.detach() * 2))


def heads_of_others(lm: SleepLM) -> None:
    """4 heads 6 wide in the place of 2 heads 12 wide."""
    mixer: Any = lm.blocks()[0].mixer
    mixer.heads = 4
    for norm in (mixer.q_norm, mixer.k_norm):
        norm.weight, norm.normalized_shape = nn.Parameter(torch.rand(6)), (6,)


CHANGES = [
    parameter_anew, data_anew, transposed, wrapped_anew, out_of_a_vector, loaded, swapped, heads_of_others,
]  # fmt: skip


@torch.no_grad()
@pytest.mark.parametrize("change", CHANGES)
def test_weights_in_the_place_of_others(change: Callable[[SleepLM], None]) -> None:
    lm, h = model(24, 2, {}), torch.randn(2, 9, 24)
    lm.blocks()[0].mixer.out.weight = nn.Parameter(placed(0))
    first, source = sleep_blocks(h, lm.blocks()).h, Source(lm.blocks(), weights_of(lm))
    assert source.current()
    change(lm)
    assert why_not(h, lm.blocks()) is None and not source.current()
    ours, true = sleep_blocks(h, lm.blocks()).h, one_by_one(h, lm.blocks()).h
    assert relative_error(ours, true.double()) < BLOCKS < BLOCKS_BF16 < relative_error(first, true.double())


@torch.no_grad()
def test_lent_weights_are_used_and_given_back() -> None:
    lm, h = model(24, 2, {}), torch.randn(2, 9, 24)
    ids = torch.randint(8, (2, 9))
    nn.init.normal_(lm.lm_head.weight)
    own = lm(ids)
    for factor in (1.5, 2.0):
        lent = {name: factor * p for name, p in lm.named_parameters()}
        found = functional_call(lm, lent, (ids,))
        true = SleepLM(8, 24, 2, 3, window=100, factor=3)
        true.load_state_dict(lent)
        assert relative_error(found, true(ids).double()) < BLOCKS < relative_error(own, found.double())
    assert torch.equal(lm(ids), own)
    assert why_not(h, lm.blocks()) is None


@torch.no_grad()
def test_weights_that_are_gone_are_not_kept() -> None:
    lm, h = model(24, 2, {}), torch.randn(2, 9, 24)
    sleep_blocks(h, lm.blocks())
    gone = StorageWeakRef(lm.blocks()[0].mlp.up.weight.untyped_storage())
    lm.blocks()[0].mlp.up.weight = None  # type: ignore[assignment]
    gc.collect()
    assert gone.expired()


def lent(lm: SleepLM, weights: dict[str, Tensor], h: Tensor, run: Callable[..., Any]) -> Tensor:
    class Stack(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = lm.layers

        def forward(self, h: Tensor) -> Tensor:
            return run(h, list(self.layers), passes=2).h  # type: ignore[no-any-return]

    return functional_call(Stack(), weights, (h,)).square().sum()


def test_gradients_are_those_at_the_weights_of_the_forward() -> None:
    """Of weights that were lent for it, and of parameters that others have replaced since."""
    lm, h = model(24, 2, {}), torch.randn(2, 9, 24)
    weights = {f"layers.{n}": (1.3 * p.detach()).requires_grad_() for n, p in lm.layers.named_parameters()}
    ours, true = (
        torch.autograd.grad(lent(lm, weights, h, run), list(weights.values())) for run in (sleep_blocks, one_by_one)
    )
    for a, b in zip(ours, true, strict=True):
        assert relative_error(a, b.double()) < BLOCKS
    up = lm.blocks()[0].mlp.up
    old = up.weight
    expected = torch.autograd.grad(one_by_one(h, lm.blocks()).h.square().sum(), old)[0]
    loss = sleep_blocks(h, lm.blocks()).h.square().sum()
    up.weight = nn.Parameter(torch.randn_like(old))
    assert relative_error(torch.autograd.grad(loss, old)[0], expected.double()) < BLOCKS
    loss = sleep_blocks(h, lm.blocks()).h.square().sum()
    lm.blocks()[1].mixer.decay_bias = 1.0  # type: ignore[assignment]
    with pytest.raises(RuntimeError, match="numbers of the blocks, such as heads or eps, were changed"):
        loss.backward()


def test_hooks_of_weights_and_backward_hooks_are_called_as_by_the_modules() -> None:
    def doubled(lm: SleepLM) -> None:
        lm.blocks()[0].mlp.up.weight.register_hook(lambda g: 2 * g)

    def halved(lm: SleepLM) -> None:
        lm.blocks()[1].mlp.register_full_backward_hook(lambda m, dx, dy: (dx[0] / 2,))

    for change in (doubled, halved):
        lm, h = model(24, 2, {}), torch.randn(2, 9, 24)
        change(lm)
        assert "hooks" in str(why_not(h, lm.blocks()))
        parameters = [p for block in lm.blocks() for p in block.parameters()]
        ours, true = (
            torch.autograd.grad(run(h, lm.blocks(), passes=2).h.sum(), parameters) for run in (sleep_blocks, one_by_one)
        )
        for a, b in zip(ours, true, strict=True):
            assert relative_error(a, b.double()) < BLOCKS


def negated(t: Tensor) -> Tensor:
    """The same numbers behind torch's bit for a sign that is still to be changed."""
    found: Tensor = torch._neg_view(-t)
    assert found.is_neg() and torch.equal(found, t)
    return found


def test_a_sign_still_to_be_changed_is_changed() -> None:
    lm, h = model(24, 2, {}), torch.randn(2, 9, 24)
    with torch.no_grad():
        states = sleep_blocks(h, lm.blocks()).states
        true = one_by_one(h, lm.blocks(), 2, states)
        ours = [sleep_blocks(negated(h), lm.blocks(), states, 2)]
        ours.append(sleep_blocks(h, lm.blocks(), [type(s)(*map(negated, s)) for s in states], 2))
        for block in lm.blocks():
            for leaf in block.modules():
                if isinstance(leaf, nn.Linear | nn.RMSNorm):
                    leaf.weight = nn.Parameter(negated(leaf.weight))
        ours.append(sleep_blocks(h, lm.blocks(), states, 2))
    for found in ours:
        for a, b in zip(all_of(found), all_of(true), strict=True):
            assert relative_error(a, b.double()) < BLOCKS


@torch.no_grad()
def test_subclasses_go_to_the_modules() -> None:
    """A wrapper has no memory of its own."""
    lm, h = model(24, 2, {}), torch.randn(2, 9, 24)
    states = sleep_blocks(h, lm.blocks()).states
    assert "a TwoTensor that is not numbers" in str(why_not(TwoTensor(h, h), lm.blocks()))
    wrapped = RecurrentState(states[1][0], TwoTensor(states[1][1], states[1][1]))
    kept = KVState(TwoTensor(states[0][0], states[0][0]), states[0][1])
    ours = sleep_blocks(h, lm.blocks(), [kept, None, None])
    assert type(ours.states[0].keys) is TwoTensor  # type: ignore[union-attr]
    reached: list[Any] = []
    lm.blocks()[1].mixer.forward = lambda *given, **_: reached.append(given) or (h, states[1])  # type: ignore[method-assign, func-returns-value, assignment]
    sleep_blocks(h, lm.blocks(), [None, wrapped, None])
    assert reached[0][1] is wrapped
    h.untyped_storage().resize_(0)
    with pytest.raises(ValueError, match=r"got a tensor \[2, 9, 24\] whose memory was freed"):
        sleep_blocks(h, model(24, 2, {}).blocks())


ODD: tuple[Any, ...] = (0, -1, 1, 3, 4, 5, 64, 2**40, 1.5, 2.0, True, "2", None, torch.tensor(2))
NUMBERS = (None, -1.0, "1", True, float("nan"), 1e39, 10**400, torch.tensor(1.0))
OTHER_NUMBERS = ("decay_bias", "strength", "eps")


class Named(Tensor):
    """A subclass with memory of its own."""


class Bare(Tensor):
    """A wrapper whose own address is 0."""

    inner: Tensor

    @staticmethod
    def __new__(cls, t: Tensor) -> Bare:
        made: Bare = Tensor._make_wrapper_subclass(cls, t.shape, dtype=t.dtype)  # type: ignore[attr-defined]
        made.inner = t
        return made

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.detach.default:
            return cls(args[0].inner)
        return func(*tree_map_only(cls, lambda t: t.inner, args), **tree_map_only(cls, lambda t: t.inner, kwargs or {}))


KINDS: tuple[Callable[[Tensor], Tensor], ...] = (
    lambda t: t.as_subclass(Named),
    lambda t: TwoTensor(t, t),
    Bare,
    FakeTensorMode().from_tensor,
    lambda t: t.to_sparse(),
)
"""Ways to have no numbers at an address, or to see every operator."""


def attributes(block: HybridBlock) -> list[tuple[nn.Module, str, Any]]:
    """Every attribute of every module, with what may be put there."""
    changes: list[tuple[nn.Module, str, Any]] = []
    for m in block.modules():
        for name, value in list(vars(m).items()):
            if name.startswith("_") or name == "training":
                continue
            values: Any = ODD if isinstance(value, int) and name not in OTHER_NUMBERS else NUMBERS
            values = ODD[:2] if name in ("in_features", "out_features") else values  # nobody reads them
            if isinstance(value, tuple):
                values = [None, [*value], value[:-1], tuple(2 * n for n in value), tuple(map(float, value))]
            changes += [(m, name, x) for x in values]
    return changes


def shapes(block: HybridBlock) -> list[tuple[nn.Module, str, Any]]:
    """Every weight in other shapes and kinds, and every module by others in its place."""
    changes: list[tuple[nn.Module, str, Any]] = []
    for m in block.modules():
        for name, p in list(m.named_parameters(recurse=False)):
            sizes = {tuple(n + more if i == j else n for j, n in enumerate(p.shape)) for i in range(p.ndim) for more in
                     (-1, 1, 7, p.shape[i], -p.shape[i], -p.shape[i] // 2)}  # fmt: skip
            sizes |= {(), (1,), (*p.shape, 1), tuple(p.shape[:1])}
            changes += [(m, name, nn.Parameter(torch.randn(size))) for size in sizes]
            changes += [(m, name, nn.Parameter(p.detach().to(kind))) for kind in (torch.float64, torch.bfloat16)]
            changes += [(m, name, nn.Parameter(kind(p.detach()), requires_grad=False)) for kind in KINDS]
            changes += [(m, name, None)]
        for name, part in list(m.named_children()):
            others: list[nn.Module | None] = [
                None,
                nn.Identity(),
                nn.Linear(24, 24, bias=False),
                nn.RMSNorm(24),
                part.float(),
            ]
            changes += [
                (m, name, other) for other in [*others, nn.Linear(24, 24), nn.RMSNorm(24, elementwise_affine=False)]
            ]
    return changes


def attempt(run: Callable[..., Any], *given: Any) -> list[Tensor] | None:
    try:
        return all_of(run(*given))
    except Exception:
        return None


def every_change() -> None:
    """To be run in a process of its own: what goes wrong here may end it."""
    torch.set_num_threads(1)
    lm, h = model(24, 2, {"value_heads": 4, "value_width": 5}, "AG", 2), torch.randn(1, 5, 24)
    blocks, count, answered = lm.blocks(), 0, 0
    with torch.no_grad():
        states = one_by_one(h, blocks).states
        for block in blocks:
            for m, name, value in attributes(block) + shapes(block):
                old = getattr(m, name)
                try:
                    setattr(m, name, value)
                except (TypeError, AttributeError):
                    continue
                print(
                    type(m).__name__,
                    name,
                    (type(value), value.shape) if isinstance(value, Tensor) else value,
                    flush=True,
                )
                kept = states if count % 2 else None
                ours, true = attempt(sleep_blocks, h, blocks, kept, 2), attempt(one_by_one, h, blocks, 2, kept)
                count += 1
                if ours is not None:
                    answered += 1
                    assert true is not None, "an answer where the modules have none"
                    for a, b in zip(ours, true, strict=True):
                        assert type(a) is type(b)
                        assert torch.allclose(a, b, rtol=1e-3, atol=1e-3, equal_nan=True)
                setattr(m, name, old)
        assert why_not(h, blocks) is None
    print("all", count, "answered", answered)


def test_every_change_of_an_attribute_or_a_weight() -> None:
    """The modules' result, or an exception, never the end of the process."""
    here = Path(__file__)
    folders = [str(here.parent), str(here.parents[1])]
    code = f"import sys; sys.path[:0] = {folders!r}; import {here.stem} as t; t.every_change()"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=here.parents[2], check=False
    )
    last = done.stdout.splitlines()[-1:]
    assert done.returncode == 0, (last, done.stderr[-2000:])
    assert last[0].startswith("all")
