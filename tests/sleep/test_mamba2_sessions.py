"""Sleep over Mamba-2 models of transformers, whose own functions write into states, and over blocks that hold both."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch
from helpers.hf_models import CLOSE, MAMBA, build, cached, tokens
from torch import Tensor, nn
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from sleepkern.integrations.transformers import patch
from sleepkern.sleep import RecurrentState, SleepSession
from sleepkern.testing import relative_error

L = 16


@pytest.fixture(params=MAMBA, scope="module")
def model(request: pytest.FixtureRequest) -> nn.Module:
    model = build(request.param)
    for name, parameter in model.named_parameters():
        if name.endswith("dt_bias"):
            nn.init.constant_(parameter, 1.0)  # states that matter
    return model


@pytest.fixture(params=[True, False], ids=["patched", "stock"], autouse=True)
def _with_and_without_kernels(request: pytest.FixtureRequest, model: nn.Module) -> Any:
    if request.param:
        with patch(model):
            yield
    else:
        yield


def forward(model: nn.Module, ids: Tensor, first: int, cache: Any) -> Tensor:
    taken = inspect.signature(model.forward).parameters
    options = {"position_ids": torch.arange(first, first + ids.shape[1])[None]} if "position_ids" in taken else {}
    return model(ids, **cached(model, cache), **options).logits


@torch.no_grad()
@pytest.mark.parametrize("eviction", ["hard", "sliding"])
def test_one_pass_is_the_model_with_its_cache(model: nn.Module, eviction: str) -> None:
    """Its keys and values dropped by hand, or the two windows that it sees all of."""
    ids, cache = tokens(2, 2 * L), DynamicCache(config=model.config)
    forward(model, ids[:, :L], 0, cache)
    for layer in cache.layers:
        if eviction == "hard" and isinstance(layer, DynamicLayer):
            DynamicLayer.reset(layer)
    session = SleepSession(model, L, eviction=eviction).ingest(ids[:, :L])
    found = session.read(ids[:, L:])
    assert relative_error(found, forward(model, ids[:, L:], L, cache)) < CLOSE
    assert relative_error(SleepSession(model, L).read(ids[:, L:]), found) > 2e-4  # memory matters


@torch.no_grad()
def test_three_passes_are_a_loop(model: nn.Module) -> None:
    """A new memory for every pass."""
    ids = tokens(2, L)
    session = SleepSession(model, L, passes=3).ingest(ids)
    adapter, fast, h = session.adapter, {}, None
    for _ in range(3):
        memory = adapter.memory()
        memory.set_fast({i: RecurrentState(torch.zeros_like(x.conv), x.state) for i, x in fast.items()})
        start, calls = adapter.open(ids, 0, memory, None)
        h = start if h is None else h
        for call in calls:
            h = call(h)
        fast = memory.fast()
    found = session.memory.fast()
    assert found.keys() == fast.keys() and max(relative_error(found[i].state, fast[i].state) for i in fast) < CLOSE


@torch.no_grad()
@pytest.mark.parametrize("eviction", ["hard", "sliding"])
def test_answering_changes_nothing(model: nn.Module, eviction: str) -> None:
    """Of one token too, whose step writes in place; and generating is reading."""
    session = SleepSession(model, L, passes=2, eviction=eviction).ingest(tokens(2, 2 * L + 3))
    before, question = {name: t.clone() for name, t in session.state_dict().items()}, tokens(2, 1, seed=4)
    answer, manual = session.generate(question, max_new_tokens=5, do_sample=False), question
    for _ in range(5):
        manual = torch.cat([manual, session.read(manual)[:, -1:].argmax(-1)], dim=1)
    assert torch.equal(answer, manual)
    awake = session.fork().sleep()
    awake.read(question)
    after = session.state_dict()
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)


@torch.no_grad()
def test_beams_are_those_of_the_model(model: nn.Module) -> None:
    """Each beam goes on from its own state; the window was nowhere dropped, so the model itself sees the same."""
    options = {"max_new_tokens": 3, "num_beams": 3, "num_return_sequences": 2, "do_sample": False}
    ids, question = tokens(2, L), tokens(2, 4, seed=3)
    session = SleepSession(model, L, eviction="sliding").ingest(ids)
    whole = torch.cat([ids, question], dim=1)
    expected = model.generate(whole, attention_mask=torch.ones_like(whole), **options)
    for _ in range(2):
        assert torch.equal(session.generate(question, **options), expected[:, L:])


@torch.no_grad()
def test_windows_of_one_token_leave_what_was_taken_out(model: nn.Module) -> None:
    session = SleepSession(model, 1, passes=2).ingest(tokens(2, 1))
    taken = session.memory.fast()
    copies = {i: RecurrentState(*(t.clone() for t in x)) for i, x in taken.items()}
    session.ingest(tokens(2, 2, seed=5))
    assert all(torch.equal(a, b) for i in taken for a, b in zip(taken[i], copies[i], strict=True))


@torch.no_grad()
@pytest.mark.parametrize("eviction", ["hard", "sliding"])
def test_left_padded_batch(model: nn.Module, eviction: str) -> None:
    """A row behind a window of padding ends as alone; so does the row beside it."""
    text, other, question = tokens(1, 2 * L), tokens(1, 3 * L, seed=7), tokens(1, 5, seed=4)
    batch = torch.cat([torch.cat([torch.zeros(1, L, dtype=torch.long), text], dim=1), other])
    mask = torch.ones_like(batch)
    mask[0, :L] = 0
    session = SleepSession(model, L, passes=2, eviction=eviction).ingest(batch, attention_mask=mask)
    for row, alone in enumerate((text, other)):
        expected = SleepSession(model, L, passes=2, eviction=eviction).ingest(alone).read(question)
        assert relative_error(session.read(question.expand(2, -1))[row], expected[0]) < CLOSE
