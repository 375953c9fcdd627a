"""Passes of a stack of blocks in one call against the modules one by one, and what does not take it."""

from __future__ import annotations

import copy
import gc
import importlib
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from helpers.block_stacks import OPTIONS, SIZES, State, all_of, as_type, before, by_hand, model
from torch import Tensor

from sleepkern.backends.cpu import blocks as cpu_blocks
from sleepkern.backends.native.module import _C
from sleepkern.nn import HybridBlock
from sleepkern.sleep import SleepSession, forget_packed, sleep_blocks
from sleepkern.sleep.blocks import why_not
from sleepkern.state import KVState, RecurrentState
from sleepkern.testing import relative_error
from sleepkern.testing.tolerances import BLOCK_GRADIENTS, BLOCKS, BLOCKS_BF16, IN_PIECES, MATTERS, SAME_SUMS


@pytest.mark.parametrize("continued", [False, True], ids=["from nothing", "continued"])
@pytest.mark.parametrize("pattern", ["AG", "GGA"])
@pytest.mark.parametrize("size", list(SIZES))
def test_equals_the_modules(size: str, pattern: str, continued: bool) -> None:
    L, d, heads, B, mixer = SIZES[size]
    lm = model(d, heads, mixer, pattern)
    exact, h = copy.deepcopy(lm).double(), torch.randn(B, L, d)
    states: list[State] = before(lm.blocks(), h) if continued else [None] * 3
    assert why_not(h, lm.blocks()) is None
    for options in OPTIONS:
        with torch.no_grad():
            ours = sleep_blocks(h, lm.blocks(), states, options[2], options[0], options[1])  # type: ignore[arg-type]
            true = by_hand(h.double(), exact.blocks(), as_type(states, torch.float64), options[2], *options[:2])
        for a, b in zip(all_of(ours), all_of(true), strict=True):
            assert relative_error(a, b) < BLOCKS or b.numel() == 0
        assert torch.allclose(ours.changes.double(), true.changes, rtol=BLOCKS)


@pytest.mark.usefixtures("restore_isa")
def test_instruction_sets_threads_and_groups_agree() -> None:
    """From fewer sequences than threads to more than a group takes."""
    lm = model(24, 2, {})
    for B in (1, 2, 23):
        h, results = torch.randn(B, 30, 24), []
        for isa in _C.isas():
            for threads in (1, 2):
                _C.set_isa(isa)
                torch.set_num_threads(threads)
                with torch.no_grad():
                    results.append(sleep_blocks(h, lm.blocks(), passes=3))
        for other in results[1:]:
            for a, b in zip(all_of(other), all_of(results[0]), strict=True):
                assert relative_error(a, b.double()) < IN_PIECES
            assert torch.allclose(other.changes, results[0].changes, rtol=BLOCKS)


def test_changed_weights_are_packed_anew() -> None:
    lm, h = model(24, 2, {}), torch.randn(2, 9, 24)
    with torch.no_grad():
        first = sleep_blocks(h, lm.blocks()).h
        for parameter in lm.parameters():
            parameter.mul_(1.1)
        second = sleep_blocks(h, lm.blocks()).h
        assert relative_error(second, by_hand(h, lm.blocks(), [None] * 3, 1, "raw", "rewind").h.double()) < BLOCKS
        assert relative_error(first, second.double()) > BLOCKS_BF16
        lm.blocks()[1].mixer.decay_bias = -3.0  # type: ignore[assignment]
        third = sleep_blocks(h, lm.blocks()).h
        assert relative_error(third, by_hand(h, lm.blocks(), [None] * 3, 1, "raw", "rewind").h.double()) < BLOCKS
        for parameter in lm.parameters():
            parameter.data.mul_(1.1)
        assert torch.equal(sleep_blocks(h, lm.blocks()).h, third)  # torch does not count that
        forget_packed(lm.blocks())
        fourth = sleep_blocks(h, lm.blocks()).h
        assert relative_error(fourth, by_hand(h, lm.blocks(), [None] * 3, 1, "raw", "rewind").h.double()) < BLOCKS


@pytest.mark.parametrize("grad", [False, True], ids=["no grad", "checkpointed"])
@pytest.mark.parametrize("options", [{}, {"eviction": "sliding"}, {"blocks": slice(1, 3), "feedback": "reinject"}])
def test_a_session_is_one_call_where_it_may(
    options: dict[str, Any], grad: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And then the same as block by block, in memory, reports and gradients."""
    lm, ids = model(24, 2, {}, "AGG"), torch.randint(8, (2, 40))

    def slept() -> tuple[SleepSession, Tensor, list[Tensor]]:
        with torch.set_grad_enabled(grad):
            session = SleepSession(lm, 12, 3, checkpoint=grad, **options).ingest(ids)
            logits = session.read(ids[:, :5])
            loss = logits.square().sum() + sum(x.state.sum() for x in session.memory.fast().values())
        grads = torch.autograd.grad(loss, list(lm.parameters()), allow_unused=True) if grad else []
        return session, logits, [g for g in grads if g is not None]

    torch.nn.init.normal_(lm.lm_head.weight)
    session, logits, grads = slept()
    with torch.set_grad_enabled(grad):
        assert "in one call" in session.explain()
    monkeypatch.setattr("sleepkern.sleep.adapters.sleep_lm.why_not", lambda *_: "so that the test sees both")
    other, expected, expected_grads = slept()
    with torch.set_grad_enabled(grad):
        assert "so that the test sees both" in other.explain()
    assert relative_error(logits, expected.double()) < BLOCKS
    for a, b in zip(session.reports, other.reports, strict=True):
        assert torch.allclose(a.changes, b.changes, rtol=BLOCK_GRADIENTS)
    found, wanted = session.state_dict(), other.state_dict()
    assert found.keys() == wanted.keys()
    assert all(relative_error(found[name], wanted[name].double()) < BLOCKS for name in wanted if "." in name)
    assert len(grads) == len(expected_grads)
    assert all(relative_error(a, b.double()) < BLOCK_GRADIENTS for a, b in zip(grads, expected_grads, strict=True))


def test_a_session_says_why_it_is_not_one_call() -> None:
    lm = model(24, 2, {})
    with torch.no_grad():
        assert "tol" in SleepSession(lm, 8, 2, tol=0.1).explain()
        assert "replay" in SleepSession(lm, 8, 2, feedback="replay").explain()
    assert "gradients" in SleepSession(lm, 8, 2, differentiable=True).explain()
    assert "in one call" in SleepSession(lm, 8, 2).explain()  # whatever the mode of autograd


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("size", list(SIZES))
def test_half_types(size: str, dtype: torch.dtype) -> None:
    L, d, heads, B, mixer = SIZES[size]
    lm = model(d, heads, mixer).to(dtype)
    exact, h = copy.deepcopy(lm).double(), torch.randn(B, L, d, dtype=dtype)
    for options in OPTIONS:
        with torch.no_grad():
            ours = sleep_blocks(h, lm.blocks(), None, options[2], options[0], options[1])  # type: ignore[arg-type]
            true = by_hand(h.double(), exact.blocks(), [None] * 3, options[2], *options[:2])
        assert ours.h.dtype == dtype
        for a, b in zip(all_of(ours), all_of(true), strict=True):
            assert relative_error(a, b) < BLOCKS_BF16


@pytest.fixture
def restore_precision() -> Iterator[None]:
    precision = torch.get_float32_matmul_precision()
    yield
    torch.set_float32_matmul_precision(precision)


@pytest.mark.usefixtures("restore_isa", "restore_precision")
def test_float32_multiplies_in_bfloat16_where_that_is_allowed() -> None:
    """Only by "medium", and only on a machine that has the instruction; weights are packed anew each time."""
    lm, h = model(40, 5, {}), torch.randn(3, 17, 40)
    with torch.no_grad():
        true = by_hand(h.double(), copy.deepcopy(lm).double().blocks(), [None] * 3, 2, "raw", "rewind")
        for isa in _C.isas():
            _C.set_isa(isa)
            for precision in ("highest", "medium", "high"):
                torch.set_float32_matmul_precision(precision)
                error = relative_error(sleep_blocks(h, lm.blocks(), passes=2).h, true.h)
                allowed = precision == "medium" and isa == "avx512bf16"
                assert MATTERS / 10 < error < BLOCKS_BF16 if allowed else error < BLOCKS, (isa, precision)


def test_what_is_not_ours_runs_by_the_modules() -> None:
    lm = model(24, 2, {"convolution": 6})
    h = torch.randn(2, 9, 24)
    assert "short convolutions" in str(why_not(h, lm.blocks()))
    with torch.no_grad():
        ours = sleep_blocks(h, lm.blocks(), passes=2, feedback="reinject")
        true = by_hand(h, lm.blocks(), [None] * 3, 2, "reinject", "rewind")
    for a, b in zip(all_of(ours), all_of(true), strict=True):
        assert relative_error(a, b.double()) < SAME_SUMS
    narrow = model(24, 2, {})
    assert "float64" in str(why_not(h.double(), narrow.blocks()))
    handle = narrow.blocks()[0].mlp.register_forward_hook(lambda *_: None)
    assert "hooks" in str(why_not(h, narrow.blocks()))
    handle.remove()
    with torch.autocast("cpu", torch.bfloat16):
        assert "autocast" in str(why_not(h, narrow.blocks()))
    with torch.inference_mode():
        frozen = model(24, 2, {})
    assert "inference mode" in str(why_not(h, frozen.blocks()))
    with torch.no_grad():
        assert sleep_blocks(h, frozen.blocks()).h.isfinite().all()
    assert "on meta, h is torch.float32 on cpu" in str(why_not(h, narrow.to("meta").blocks()))


class Adapted(torch.nn.Module):
    """A projection with a part of its own beside it, as adapters make it."""

    def __init__(self, inner: torch.nn.Linear) -> None:
        super().__init__()
        self.inner, self.own = inner, torch.nn.Parameter(torch.randn_like(inner.weight) / 10)

    @property
    def weight(self) -> Tensor:
        return self.inner.weight

    def forward(self, x: Tensor) -> Tensor:
        return torch.nn.functional.linear(x, self.inner.weight + self.own)


def with_bias(block: HybridBlock) -> None:
    block.mlp.up.bias = torch.nn.Parameter(torch.randn(block.mlp.up.weight.shape[0]))


def adapted(block: HybridBlock) -> None:
    block.mixer.out = Adapted(block.mixer.out)  # type: ignore[assignment]


def parametrized(block: HybridBlock) -> None:
    torch.nn.utils.parametrizations.weight_norm(block.mlp.out)


def wrapped(block: HybridBlock) -> None:
    inner = block.mlp.forward
    block.mlp.forward = lambda x: 2 * inner(x)  # type: ignore[method-assign]


@pytest.mark.parametrize("change", [with_bias, adapted, parametrized, wrapped])
def test_changed_blocks_run_by_themselves(change: Callable[[HybridBlock], None]) -> None:
    lm, h = model(24, 2, {}), torch.randn(2, 9, 24)
    change(lm.blocks()[1])
    assert "as sleepkern.nn made it" in str(why_not(h, lm.blocks()))
    with torch.no_grad():
        ours = sleep_blocks(h, lm.blocks(), passes=2)
        true = by_hand(h, lm.blocks(), [None] * 3, 2, "raw", "rewind")
    for a, b in zip(all_of(ours), all_of(true), strict=True):
        assert relative_error(a, b.double()) < SAME_SUMS


def test_packed_weights_go_with_their_blocks() -> None:
    lm, h = model(24, 2, {}), torch.randn(2, 9, 24)
    with torch.no_grad():
        sleep_blocks(h, lm.blocks())
        kept = weakref.ref(cpu_blocks._packed[lm.blocks()[0]])
    assert kept() is not None
    del lm
    gc.collect()
    assert kept() is None


BAD: dict[str, dict[str, Any]] = {
    "h: got": {"h": torch.randn(3, 4)},
    "states: got 1": {"states": [None]},
    "states: got KVState for block 1": {"states": [None, KVState(torch.zeros(1), torch.zeros(1)), None]},
    "passes: got 0; expected at least 1": {"passes": 0},
    "passes: got 4611686018427387904; expected at least 1 and at most": {"passes": 2**62},
    "passes: got True; expected a whole number": {"passes": True},
    "passes: got 1.5; expected a whole number": {"passes": 1.5},
    "h: got a NoneType; expected a tensor": {"h": None},
    "h: got a list; expected a tensor": {"h": [[1.0]]},
    r"h: got torch.float32 \[1, 3, 8\]; expected dense floats": {"h": torch.randn(1, 3, 8).to_sparse()},
    "blocks: got a SleepLM; expected a list": {"blocks": model(8, 2, {})},
    "blocks: got a Linear at 0; expected a HybridBlock": {"blocks": [torch.nn.Linear(8, 8)]},
    "blocks: got a int at 0": {"blocks": [1]},
    "blocks: got none": {"blocks": []},
    "states: got a Tensor; expected a list": {"states": torch.zeros(3)},
    "states: got a int; expected a list": {"states": 3},
    "states: got a tuple for block 0; expected RecurrentState, KVState or None": {"states": [(1, 2), None, None]},
    r"states: got \['NoneType'\] in that of block 1; expected tensors": {
        "states": [None, RecurrentState(torch.zeros(1, 3, 24), None), None]  # type: ignore[arg-type]
    },
    "feedback: got": {"feedback": "loud"},
    "conv_state: got": {"conv_state": "keep"},
    "h: got a width of 9; expected 8": {"h": torch.randn(1, 3, 9)},
    r"states: got conv torch.float32 \[2, 3, 24\].*expected floats \[1, 3, 24\]": {
        "states": [None, RecurrentState(torch.zeros(2, 3, 24), torch.zeros(2, 2, 4, 4)), None]
    },
    r"states: got state torch.int64.*for block 1": {
        "states": [None, RecurrentState(torch.zeros(1, 3, 24), torch.zeros(1, 2, 4, 4).long()), None]
    },
    r"states: got values torch.float32 \[1, 2, 6, 4\].*for block 0": {
        "states": [KVState(torch.zeros(1, 2, 5, 4), torch.zeros(1, 2, 6, 4)), None, None]
    },
    r"states: got keys torch.float32 \[1, 2, 5, 4\] on meta": {
        "states": [KVState(*torch.zeros(2, 1, 2, 5, 4, device="meta")), None, None]
    },
}


@pytest.mark.parametrize("message", list(BAD))
def test_bad_input(message: str) -> None:
    lm = model(8, 2, {})
    with pytest.raises((TypeError, ValueError), match=message):
        sleep_blocks(**({"h": torch.randn(1, 3, 8), "blocks": lm.blocks()} | BAD[message]))


@pytest.mark.parametrize("module", ["sleepkern.sleep", "sleepkern.sleep.protocols"])
def test_states_are_known_by_the_names_they_had(module: str) -> None:
    for name, expected in (("Fast", RecurrentState), ("Slow", KVState)):
        with pytest.warns(DeprecationWarning, match=f"{module}.{name} is {expected.__name__} of sleepkern.state"):
            assert getattr(importlib.import_module(module), name) is expected
    with pytest.raises(AttributeError, match="has no attribute 'Fats'"):
        getattr(importlib.import_module(module), "Fats")  # noqa: B009
