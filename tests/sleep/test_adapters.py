"""Guides as they stand: adapters for remote code, run against small copies, and the recipe for training."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers.hf_models import CLOSE, build, tokens
from helpers.remote_models import (
    VOCABULARY,
    JetNemotronCache,
)
from helpers.sleep_models import BLOCKS as DOCUMENTED
from helpers.sleep_models import jet, names_of, ouro
from torch import Tensor, nn

from sleepkern.sleep import ModelAdapter, SleepSession
from sleepkern.testing import relative_error
from sleepkern.testing.tolerances import MATTERS

L = 16


@torch.no_grad()
@pytest.mark.parametrize("made", [jet, ouro])
def test_read_in_pieces_and_sleep(made: Any) -> None:
    """Reading ingests what waits; a session reads, generates, forks, pads and saves as with any model."""
    model, adapter = made()
    assert isinstance(adapter, ModelAdapter)
    ids, question = tokens(2, 3 * L + 5), tokens(2, 5, seed=4)
    session = SleepSession(adapter, L, passes=2, eviction="sliding").ingest(ids)
    assert session.position == 3 * L and len(session.memory.slow()) == len(session.memory.attention)
    answer, manual = session.generate(question, max_new_tokens=5), question
    for _ in range(5):
        manual = torch.cat([manual, session.read(manual)[:, -1:].argmax(-1)], dim=1)
    assert torch.equal(answer, manual)
    other = SleepSession(made()[1], L, passes=2, eviction="sliding")
    other.load_state_dict(session.state_dict())
    assert torch.equal(other.read(question), session.read(question))
    fork, before = session.fork(), session.state_dict()
    fork.ingest(tokens(2, 2 * L, seed=9))
    assert all(torch.equal(t, before[name]) for name, t in session.state_dict().items())
    assert relative_error(fork.read(question), session.read(question)) > MATTERS
    hard = SleepSession(adapter, L, passes=2).ingest(ids)
    assert hard.memory.slow() == {} and relative_error(hard.read(question), session.read(question)) > MATTERS


@torch.no_grad()
def test_jet_in_one_pass_is_the_model_with_its_cache() -> None:
    """Sliding over two windows that it sees all of; evicted, its own cache emptied by hand, counters and all."""
    model, adapter = jet()
    ids = tokens(2, 2 * L)
    session = SleepSession(adapter, L, eviction="sliding").ingest(ids[:, :L])
    assert relative_error(session.read(ids[:, L:]), model(ids)[:, L:]) < CLOSE
    cache = JetNemotronCache()
    model(ids[:, :L], past_key_values=cache)
    for i, state in enumerate(cache.states):
        cache._seen_tokens[i] = 0
        if state["attn_state"] is not None:
            state["attn_state"] = tuple(t[..., :0, :] for t in state["attn_state"])
    h, _ = model.model(ids[:, L:], position_ids=torch.arange(L, 2 * L)[None], past_key_values=cache)
    evicted = SleepSession(adapter, L).ingest(ids[:, :L])
    expected = model.lm_head(h)
    assert relative_error(evicted.read(ids[:, L:]), expected) < CLOSE
    assert relative_error(model(ids)[:, L:], expected) > MATTERS


@torch.no_grad()
def test_jet_in_three_passes_is_a_loop() -> None:
    model, adapter = jet()
    ids, low, high = tokens(2, L), 1, 4
    session = SleepSession(adapter, L, passes=3, blocks=slice(low, high)).ingest(ids)
    h, fast = model.model.embed_tokens(ids), {}
    places = torch.arange(L)[None]
    bias = torch.full((L, L), torch.finfo(h.dtype).min).triu(1)[None, None]

    class Once(dict[int, Any]):
        """A cache of one layer's state, without a convolution's history: it rewinds to nothing."""

        def update(self, recurrent_state: Any = None, attn_state: Any = None, layer_idx: int = 0, **unused: Any) -> Any:
            if attn_state is None:
                fast[layer_idx] = recurrent_state
            return {"attn_state": attn_state}

        def __len__(self) -> int:
            return 5

        def __missing__(self, i: int) -> dict[str, Any]:
            return {"recurrent_state": fast.get(i), "conv_state": None}

    order = [*range(low), *range(low, high), *range(low, high), *range(low, high), *range(high, 5)]
    for i in order:
        options = {"attention_mask": bias, "position_embeddings": 0.3 * places, "use_cache": True}
        (h,) = model.model.layers[i](h, past_key_value=Once(), **options)
    found = session.memory.fast()
    assert found.keys() == fast.keys() and max(relative_error(found[i].state, fast[i]) for i in fast) < CLOSE


def test_jet_trains_through_passes() -> None:
    model, adapter = jet()
    model.train()
    session = SleepSession(adapter, L, passes=2, checkpoint=True).ingest(tokens(2, 2 * L))
    session.read(tokens(2, 5)).square().mean().backward()
    assert all(float(layer.self_attn.qkv.weight.grad.abs().max()) > 0 for layer in model.model.layers[:3])


@torch.no_grad()
def test_ouro_without_mixers_is_the_model() -> None:
    """One window read after another that is kept; and mixers that are the identity change nothing."""
    model, adapter = ouro()
    for mixer in adapter.inserted.values():
        nn.init.zeros_(mixer.mixer.out.weight)
    ids = tokens(2, 2 * L)
    session = SleepSession(adapter, L, eviction="sliding").ingest(ids[:, :L])
    assert relative_error(session.read(ids[:, L:]), model(ids)[:, L:]) < CLOSE
    with pytest.raises(ValueError, match="model: got a OuroAdapter; expected one with layers that have a recurrence"):
        SleepSession(ouro(layers=())[1], L)


@torch.no_grad()
@pytest.mark.parametrize(("loops", "passes"), [(2, 1), (2, 2), (1, 2)])
def test_ouro_asleep_is_a_loop(loops: int, passes: int) -> None:
    """Written out: a fast weight for each (loop, layer), the norm after each loop."""
    model, adapter = ouro(loops)
    ids, fast = tokens(2, L), {}
    session = SleepSession(adapter, L, passes=passes).ingest(ids)
    h, angle = model.model.embed_tokens(ids), 0.3 * torch.arange(L)[None]
    bias = torch.full((L, L), torch.finfo(h.dtype).min).triu(1)[None, None]
    for _ in range(passes):
        fast = {i: x._replace(conv=torch.zeros_like(x.conv)) for i, x in fast.items()}
        for loop in range(loops):
            for i, layer in enumerate(model.model.layers):
                if i in adapter.inserted:
                    h, fast[loop * 3 + i] = adapter.inserted[i](h, fast.get(loop * 3 + i))
                h = layer(h, attention_mask=bias, position_embeddings=angle)
            h = model.model.norm(h)
    found = session.memory.fast()
    assert found.keys() == fast.keys() and len(fast) == 2 * loops
    assert max(relative_error(found[i].state, fast[i].state) for i in fast) < CLOSE


@torch.no_grad()
@pytest.mark.parametrize("made", [ouro])
def test_padding_writes_nothing(made: Any) -> None:
    _, adapter = made()
    ids, question = tokens(1, L), tokens(1, 5, seed=4)
    batch = torch.cat([torch.cat([torch.zeros(1, L, dtype=torch.long), ids], dim=1), tokens(1, 2 * L, seed=5)])
    mask = torch.ones_like(batch)
    mask[0, :L] = 0
    session = SleepSession(adapter, L, passes=2).ingest(batch, attention_mask=mask)
    alone = SleepSession(adapter, L, passes=2).ingest(ids)
    fast, expected = session.memory.fast(), alone.memory.fast()
    assert max(relative_error(fast[i].state[:1], expected[i].state) for i in fast) < CLOSE
    assert session.read(question.expand(2, -1)).shape == (2, 5, VOCABULARY)


def test_the_recipe_in_two_stages() -> None:
    """On a random model and one text, which it learns; gradients reach every inserted weight."""
    ids = tokens(2, 40)
    names = names_of(DOCUMENTED[1], model=build("qwen3"), ids=ids)
    model = names["model"]
    assert names["session"].position == 32
    untouched = {name: p.clone() for name, p in model.named_parameters() if ".inserted." not in name}
    train = names_of(DOCUMENTED[2], SleepSession=SleepSession)
    inserted = [p for name, p in model.named_parameters() if ".inserted." in name]
    texts: list[Tensor] = [tokens(2, 3 * L, seed=7)] * 12
    first = train["train"](model, texts, inserted, L, passes=1, lr=1e-2)
    assert all(torch.equal(model.get_parameter(name), p) for name, p in untouched.items())
    assert all(p.grad is not None and float(p.grad.abs().max()) > 0 for p in inserted)
    second = train["train"](model, texts, model.parameters(), L, passes=2, lr=1e-2)
    assert first[-1] < 0.99 * first[0] and second[-1] < 0.9 * second[0]
    both = train["two_stages"](model, texts[:1], L, passes=2)
    assert [len(losses) for losses in both] == [1, 1]


@pytest.mark.parametrize("family", ["qwen3_next", "mamba2", "bamba", "zamba2", "nemotron_h"])
def test_gradient_checkpointing_of_the_model_is_refused(family: str) -> None:
    """For then its layers do not get the cache."""
    model, ids = build(family), tokens(1, L)
    session = SleepSession(model, L, checkpoint=True)
    model.gradient_checkpointing_enable()
    session.fork().ingest(ids)  # not in training, so it does nothing
    model.train()
    for ask in (session.ingest, session.read, session.generate):
        with pytest.raises(ValueError, match=r"model: got .* gradient checkpointing.*; expected .*checkpoint=True"):
            ask(ids)
    assert session.position == 0 and session.pending is None
    model.gradient_checkpointing_disable()
    assert len(session.ingest(ids).memory.fast()) == len(session.memory.recurrent)
