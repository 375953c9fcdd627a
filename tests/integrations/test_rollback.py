"""A cache that takes tokens back: the model goes on as if it had not read them, and drafts give the same tokens."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from helpers.hf_models import CLOSE, build, cached, tokens
from torch import Tensor, nn
from transformers import DynamicCache

from sleepkern.integrations.transformers import RollbackCache, patch, unpatch
from sleepkern.integrations.transformers.history import Snapshot
from sleepkern.integrations.transformers.recording import Inputs
from sleepkern.integrations.transformers.rollback_layers import RollbackLayer
from sleepkern.testing import relative_error

pytestmark = pytest.mark.since("5.20")
FAMILIES = ("qwen3_next", "kimi_linear", "bamba")
KEEP = 8
Pieces = tuple[int, ...]
AFTER_PREFILL: Pieces = (20, 5, 3)
AFTER_STEPS: Pieces = (3, *[1] * 18)


@pytest.fixture(autouse=True)
def _start_and_end_unpatched() -> Iterator[None]:
    unpatch()
    yield
    unpatch()


@torch.no_grad()
def read(model: nn.Module, ids: Tensor, cache: Any, first: int, end: int) -> Tensor:
    """Logits of tokens first to end, which follow what the cache has."""
    takes_positions = "position_ids" in inspect.signature(model.forward).parameters
    at = {"position_ids": torch.arange(first, end)[None]} if takes_positions else {}
    logits: Tensor = model(ids[:, first:end], **cached(model, cache), **at, use_cache=True).logits
    return logits


def error_after_going_back(model: nn.Module, pieces: Pieces, back: int) -> float:
    """How far logits are from those of a text read at once, after a draft and `back` tokens were taken back."""
    ids, read_so_far = tokens(1, 40), sum(pieces)
    with torch.no_grad():
        expected = model(ids, use_cache=False).logits
    cache, first = RollbackCache(model, keep=KEEP), 0
    for n in pieces:
        read(model, ids, cache, first, first + n)
        first += n
    read(model, tokens(1, 44, seed=9), cache, first, first + 4)  # a draft, none of which is right
    cache.crop(-4 - back)
    first = read_so_far - back
    assert cache.get_seq_length() == first
    steps = [(first, first + 1), (first + 1, first + 2), (first + 2, 40)]
    return relative_error(torch.cat([read(model, ids, cache, *at) for at in steps], dim=1), expected[:, first:])


@pytest.mark.parametrize("family", [*FAMILIES, "mamba2", "falcon_h1", "zamba2", "qwen3_5", "nemotron_h"])
def test_the_last_tokens_are_taken_back(family: str) -> None:
    model = build(family)
    with patch(model):
        for pieces in (AFTER_PREFILL, AFTER_STEPS, (2,)):
            for back in (0, min(KEEP - 4, sum(pieces))):
                assert error_after_going_back(model, pieces, back) < CLOSE, (pieces, back)


def test_twice_and_down_to_nothing() -> None:
    model, ids = build("qwen3_next"), tokens(1, 40)
    with patch(model):
        cache = RollbackCache(model, keep=KEEP)
        first = read(model, ids, cache, 0, 6)
        cache.crop(-2)
        cache.crop(-4)
        assert cache.get_seq_length() == 0
        assert relative_error(read(model, ids, cache, 0, 6), first) < CLOSE
        cache.crop(0)
        expected = RollbackCache(model)
        read(model, ids, expected, 0, 6)
        assert relative_error(read(model, ids, cache, 6, 7), read(model, ids, expected, 6, 7)) < CLOSE
        cache.reset()
        assert relative_error(read(model, ids, cache, 0, 6), first) < CLOSE


def test_inputs_of_old_tokens_are_freed() -> None:
    model, ids = build("qwen3_next"), tokens(1, 300)
    with patch(model):
        cache = RollbackCache(model, keep=KEEP)
        read(model, ids, cache, 0, 200)
        for i in range(200, 240):
            read(model, ids, cache, i, i + 1)
    for layer in cache.layers:
        if isinstance(layer, RollbackLayer):
            history = layer.history
            assert KEEP <= history.end - history.first <= 2 * KEEP
            pieces = history._pieces
            assert sum(p.inputs.tokens for p in pieces) == history.end - history.first
            assert all(p.conv.untyped_storage().nbytes() <= 2 * p.conv.nbytes * KEEP for p in pieces)


# ---------------------------------------------------------------- planted faults


def forget_the_state(monkeypatch: pytest.MonkeyPatch) -> None:
    """Crop attention and the convolution, and not the recurrent state."""
    carry = RollbackLayer._carry

    def carry_without_state(self: Any, at: Snapshot) -> None:
        carry(self, at._replace(state=self.recurrent_states[0]) if at.position else at)

    monkeypatch.setattr(RollbackLayer, "_carry", carry_without_state)


def forget_the_convolution(monkeypatch: pytest.MonkeyPatch) -> None:
    carry = RollbackLayer._carry

    def carry_without_convolution(self: Any, at: Snapshot) -> None:
        carry(self, at._replace(conv=self.conv_states[0]) if at.position else at)

    monkeypatch.setattr(RollbackLayer, "_carry", carry_without_convolution)


def go_back_one_token_too_far(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make the state again without the last token that stays."""
    after = Inputs.state_after
    monkeypatch.setattr(Inputs, "state_after", lambda self, held: after(self.part(0, self.tokens - 1), held))


def write_to_a_shared_state(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(RollbackLayer, "own", lambda self: None)


@pytest.mark.parametrize("fault", [forget_the_state, forget_the_convolution, go_back_one_token_too_far])
def test_a_planted_fault_is_found(fault: Callable[[pytest.MonkeyPatch], None], monkeypatch: pytest.MonkeyPatch) -> None:
    model = build("qwen3_next")
    fault(monkeypatch)
    with patch(model):
        assert error_after_going_back(model, AFTER_PREFILL, 3) > 100 * CLOSE


# ---------------------------------------------------------------- copies


def copies_disturb_each_other(model: nn.Module) -> float:
    ids, other = tokens(1, 40), tokens(1, 40, seed=5)
    cache = RollbackCache(model)
    read(model, ids, cache, 0, 20)
    copy = cache.copy()
    for i in range(20, 24):
        read(model, other, copy, i, i + 1)
    read(model, other, copy, 24, 30)
    copy.crop(-8)
    with torch.no_grad():
        expected = model(ids, use_cache=False).logits[:, 20:]
    return relative_error(torch.cat([read(model, ids, cache, 20, 21), read(model, ids, cache, 21, 40)], 1), expected)


@pytest.mark.parametrize("family", FAMILIES)
def test_copies_share_memory_and_go_on_by_themselves(family: str) -> None:
    model = build(family)
    with patch(model):
        assert copies_disturb_each_other(model) < CLOSE
        cache = RollbackCache(model)
        read(model, tokens(1, 20), cache, 0, 20)
        copy = cache.copy()
        shared = [(a, b) for a, b in zip(cache.layers, copy.layers, strict=True) if isinstance(a, RollbackLayer)]
        assert shared and all(a.recurrent_states[0].data_ptr() == b.recurrent_states[0].data_ptr() for a, b in shared)


def test_a_write_to_a_shared_state_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    model = build("qwen3_next")
    write_to_a_shared_state(monkeypatch)
    with patch(model):
        assert copies_disturb_each_other(model) > 100 * CLOSE


def test_beams_reorder_all_that_a_layer_carries() -> None:
    model, ids = build("qwen3_next"), tokens(1, 12)
    options = {"max_new_tokens": 8, "num_beams": 3, "do_sample": False}
    expected = model.generate(ids, **options)
    with patch(model):
        assert torch.equal(model.generate(ids, **options, past_key_values=RollbackCache(model)), expected)


# ---------------------------------------------------------------- drafts


def draft_of(family: str) -> nn.Module:
    """A model that often says what `build(family)` says."""
    model, generator = build(family), torch.Generator().manual_seed(2)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if p.ndim == 2 and "proj" in name:
                p.add_(torch.randn(p.shape, generator=generator), alpha=0.002)
    return model


def counted(model: nn.Module, ids: Tensor, **options: Any) -> tuple[Tensor, int]:
    """The tokens that a model generates, and the number of its forward calls."""
    calls: list[int] = []
    hook = model.register_forward_hook(lambda *_: calls.append(1))
    try:
        return model.generate(ids, max_new_tokens=32, do_sample=False, **options), len(calls)
    finally:
        hook.remove()


@pytest.mark.parametrize("family", FAMILIES)
def test_drafts_give_the_same_tokens_in_fewer_calls(family: str) -> None:
    model, draft, ids = build(family), draft_of(family), tokens(1, 12).repeat(1, 3)
    with patch(model):
        expected, calls = counted(model, ids)
        assert calls == 32
        for options in (
            {"assistant_model": draft},
            {"assistant_model": draft, "past_key_values": RollbackCache(model)},
        ):
            found, fewer = counted(model, ids, **options)
            assert torch.equal(found, expected) and fewer < 24, fewer
        repeated = expected[:, :-8]  # what comes next was generated before, so the lookup finds some of it
        found, fewer = counted(model, torch.cat([expected, repeated], dim=1), prompt_lookup_num_tokens=4)
        assert torch.equal(found, counted(model, torch.cat([expected, repeated], dim=1))[0]) and fewer < 32


def test_sampled_drafts_run() -> None:
    model = build("qwen3_next")
    with patch(model):
        out = model.generate(tokens(1, 12), max_new_tokens=12, do_sample=True, assistant_model=draft_of("qwen3_next"))
    assert out.shape == (1, 24)


def test_without_the_patch_transformers_refuses_drafts() -> None:
    model, ids = build("qwen3_next"), tokens(1, 12)
    with patch(model):
        model.generate(ids, max_new_tokens=4, prompt_lookup_num_tokens=2)
    with pytest.raises(ValueError, match="stateful"):
        model.generate(ids, max_new_tokens=4, prompt_lookup_num_tokens=2)


# ---------------------------------------------------------------- bad input


def test_bad_input_is_named() -> None:
    model, ids = build("qwen3_next"), tokens(1, 100)
    with pytest.raises(ValueError, match=r"^model: got a Qwen3NextForCausalLM that is not patched; expected"):
        RollbackCache(model)
    with patch(model):
        for options in ({"keep": 0}, {"every": 0}):
            with pytest.raises(ValueError, match=r"got 0; expected at least 1"):
                RollbackCache(model, **options)
        with pytest.raises(TypeError, match=r"^keep: got 2.5; expected a whole number"):
            RollbackCache(model, keep=2.5)  # type: ignore[arg-type]
        with pytest.raises(TypeError, match=r"^model: got a str"):
            RollbackCache("qwen3_next")  # type: ignore[arg-type]
        cache = RollbackCache(model, keep=KEEP)
        read(model, ids, cache, 0, 60)
        with pytest.raises(ValueError, match=r"^tokens_to_remove: got -9; expected at least -8, for inputs of earlier"):
            cache.crop(-9)
        assert cache.get_seq_length() == 60  # in no layer
        with pytest.raises(ValueError, match=r"^tokens_to_remove: got 3; expected 0 or less"):
            cache.crop(3)
        with pytest.raises(TypeError, match=r"^tokens_to_remove: got 1.0; expected a whole number"):
            cache.crop(1.0)  # type: ignore[arg-type]
        cache.crop(-8)
        assert cache.get_seq_length() == 52


@pytest.mark.parametrize("family", ["qwen3_next", "bamba"])
def test_calls_that_are_not_recorded_raise(family: str) -> None:
    model, ids = build(family), tokens(1, 20)
    with patch(model):
        cache = RollbackCache(model)
        read(model, ids, cache, 0, 10)
    with pytest.raises(ValueError, match="was computed by transformers' own code"):
        read(model, ids, cache, 10, 13)
    with patch(model):
        assert read(model, ids, cache, 10, 13).isfinite().all()  # it stopped before the cache changed
    if family == "bamba":  # whose step of one token tells the cache nothing
        read(model, ids, cache, 13, 14)
        with patch(model), pytest.raises(ValueError, match="expected a cache that the same patched model filled"):
            read(model, ids, cache, 14, 16)
    other = build("bamba").double()
    with patch(other), pytest.raises(ValueError, match="was computed by transformers' own code"):
        read(other, ids, RollbackCache(other), 0, 10)


def test_other_caches_stay_as_they_are() -> None:
    model = build("qwen3_next")
    with patch(model):
        cache = DynamicCache(config=model.config)
        read(model, tokens(1, 20), cache, 0, 20)
        assert not any(isinstance(x, RollbackLayer) for x in cache.layers)
        cache.activate_past_recording()
        read(model, tokens(1, 20), cache, 20 - 3, 20)
        cache.crop(-3)
        assert cache.get_seq_length() == 20
