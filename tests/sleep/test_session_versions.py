"""Models of transformers that a session must not run alone: memory would be lost, or h changed where nobody looks."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers.hf_models import CLOSE, build, tokens
from torch import Tensor, nn

from sleepkern.integrations.caches import cache_among
from sleepkern.sleep import SleepSession
from sleepkern.testing import relative_error
from sleepkern.testing.tolerances import MATTERS

L = 24


def replaced(model: nn.Module, forward: Any) -> nn.Module:
    """With forward(original, self, **options) in the place of its base model's."""
    base = model.base_model
    original = type(base).forward
    new = {"forward": lambda self, **options: forward(original, self, **options)}
    base.__class__ = type(type(base).__name__, (type(base),), new)
    return model


def forgets(original: Any, base: Any, **options: Any) -> Any:
    """Takes the cache under a name that it does not read."""
    return original(base, **{name: x for name, x in options.items() if x is not cache_among([x])})


def scales_behind(original: Any, base: Any, **options: Any) -> Any:
    out = original(base, **options)
    out.last_hidden_state = 2 * out.last_hidden_state
    return out


@torch.no_grad()
@pytest.mark.parametrize(
    ("forward", "message"),
    [
        (forgets, r"takes a cache as \w+ and does not hand it to layers \[0, 1, 2, 3\]"),
        (scales_behind, "changes h between layers or after the last"),
    ],
)
def test_a_forward_that_cannot_be_taken_apart_is_refused(forward: Any, message: str) -> None:
    session = SleepSession(replaced(build("qwen3_next"), forward), L)
    with pytest.raises(ValueError, match=f"model: got a Qwen3NextForCausalLM that {message}"):
        session.ingest(tokens(1, L))
    assert session.position == 0 and not session.memory.fast()


@torch.no_grad()
def test_a_model_that_expects_tuples_and_is_not_known_to() -> None:
    """It would take the first row of a batch for h."""
    session = SleepSession(build("falcon_h1", num_hidden_layers=2), L)
    session.adapter.tuples = False
    with pytest.raises(ValueError, match="changes h between layers .* in tuples if the adapter says so"):
        session.ingest(tokens(2, L))


@torch.no_grad()
def test_a_generate_that_starts_anew_is_refused() -> None:
    model = build("qwen3_next")
    session = SleepSession(model, L).ingest(tokens(1, L))
    model.generate = lambda ids, **options: type(model).generate(model, ids, max_new_tokens=2)
    with pytest.raises(ValueError, match="whose generate takes .* and does not go on in it"):
        session.generate(tokens(1, 3), max_new_tokens=2)


def masked(model: nn.Module, ids: Tensor, seen: int) -> Tensor:
    """Logits of one forward; tokens attend to their window and `seen` windows before, some layers to the last 8."""
    t = torch.arange(ids.shape[1])
    ahead = t[:, None] // L - t // L
    allowed = (ahead >= 0) & (ahead <= seen) & (t[:, None] >= t)
    lowest = torch.finfo(torch.float32).min
    masks = {
        "full_attention": torch.zeros(1, 1, len(t), len(t)).masked_fill(~allowed, lowest),
        "sliding_attention": torch.zeros(1, 1, len(t), len(t)).masked_fill(~(allowed & (t[:, None] - t < 8)), lowest),
        "linear_attention": None,
    }
    return model(ids, attention_mask=masks, use_cache=False).logits


@torch.no_grad()
@pytest.mark.since("5.24")
@pytest.mark.parametrize("eviction", ["hard", "sliding"])
def test_layers_with_a_sliding_window_of_their_own(eviction: str) -> None:
    model, ids = build("lara_mini"), tokens(2, 3 * L)
    session, logits = SleepSession(model, L, eviction=eviction), []
    for window in ids.split(L, dim=1):
        logits.append(session.read(window))
        session.ingest(window)
    expected = masked(model, ids, seen=int(eviction == "sliding"))
    assert relative_error(torch.cat(logits, dim=1), expected) < CLOSE
    assert relative_error(masked(model, ids, seen=2), expected) > MATTERS
    answer, manual = session.generate(ids[:, :3], max_new_tokens=4, do_sample=False), ids[:, :3]
    for _ in range(4):
        manual = torch.cat([manual, session.read(manual)[:, -1:].argmax(-1)], dim=1)
    assert torch.equal(answer, manual)
