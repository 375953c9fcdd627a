"""What a session refuses, in one sentence and before anything is taken: settings, text, questions."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers.hf_models import build, tokens
from torch import nn
from transformers import BatchEncoding

from sleepkern.sleep import SleepSession

L = 24


@pytest.fixture(scope="module")
def model() -> nn.Module:
    return build("qwen3_next")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"window": 0}, "window: got 0; expected at least 1"),
        ({"passes": 0}, "passes: got 0; expected at least 1"),
        ({"eviction": "soft"}, "eviction: got 'soft'; expected one of hard, sliding"),
        ({"blocks": slice(0, 4, 2)}, "blocks: got .*; expected neighbours out of 4 blocks"),
        ({"feedback": "replay"}, "feedback: got 'replay' for a Qwen3NextForCausalLM; expected a SleepLM"),
        ({"blocks": slice(4, 9)}, "blocks: got .*; expected neighbours"),
        ({"blocks": slice(2, 99)}, r"blocks: got slice\(2, 99, None\); expected neighbours out of 4 blocks"),
        ({"blocks": [1, 2]}, r"blocks: got \[1, 2\]; expected a slice, as slice\(1, 3\), or None"),
        ({"window": 32.5}, "window: got 32.5; expected a whole number of at least 1"),
        ({"passes": 1.5}, "passes: got 1.5; expected a whole number of at least 1"),
        ({"passes": True}, "passes: got True; expected a whole number of at least 1"),
        ({"passes": "2"}, "passes: got '2'; expected a whole number of at least 1"),
        ({"feedback": "again"}, "feedback: got 'again'; expected one of raw, reinject, replay"),
        ({"conv_state": None}, "conv_state: got None; expected one of rewind, carry"),
        ({"tol": float("nan")}, "tol: got nan with feedback 'raw'; expected >= 0"),
        ({"tol": "0.1"}, "tol: got '0.1'; expected a number of at least 0, or None"),
        ({"checkpoint": "yes"}, "checkpoint: got 'yes'; expected True or False"),
    ],
)
def test_bad_options(model: nn.Module, options: dict[str, Any], message: str) -> None:
    with pytest.raises((ValueError, TypeError), match=message):
        SleepSession(model, **{"window": L, **options})


def test_bad_input(model: nn.Module) -> None:
    session = SleepSession(model, L)
    with pytest.raises(ValueError, match=r"ids: got torch.float32 \[2, 3\]; expected integers \[B,T\]"):
        session.ingest(torch.zeros(2, 3))
    with pytest.raises(ValueError, match="attention_mask: got padding behind text; expected it on the left"):
        session.ingest(tokens(1, 3), attention_mask=torch.tensor([[1, 1, 0]]))
    session.ingest(tokens(2, 3))
    with pytest.raises(ValueError, match="ids: got 1 rows; expected 2, as before"):
        session.ingest(tokens(1, 3))
    with pytest.raises(ValueError, match="model: got a Linear without layers, norm, lm_head"):
        SleepSession(nn.Linear(2, 2), L)


@pytest.mark.parametrize(
    ("ids", "mask", "message"),
    [
        ([[1, 2]], None, r"ids: got a list; expected a tensor of integers \[B,T\]"),
        ("text", None, "ids: got a str; expected a tensor of integers"),
        (tokens(1, 3)[0], None, r"ids: got torch.int64 \[3\]; expected integers \[B,T\]"),
        (tokens(1, 3)[None], None, r"ids: got torch.int64 \[1, 1, 3\]; expected integers"),
        (tokens(1, 3) > 3, None, r"ids: got torch.bool \[1, 3\]; expected integers"),
        (tokens(1, 3) + 64, None, r"ids: got \d\d+; expected tokens from 0 to 63"),
        (tokens(1, 3) - 64, None, r"ids: got -\d+; expected tokens from 0 to 63"),
        ({"ids": tokens(1, 3)}, None, "ids: got a mapping with ids; expected input_ids"),
        ({"input_ids": [[1]]}, None, "ids: got a list; expected a tensor"),
        (tokens(1, 3), [[1, 1, 1]], "attention_mask: got a list; expected a tensor"),
        (tokens(1, 3), torch.ones(1, 4), r"attention_mask: got \[1, 4\]; expected \[1, 3\], as ids"),
        (tokens(1, 3), torch.full((1, 3), 2), "attention_mask: got other values than 0 and 1"),
        ({"input_ids": tokens(1, 2), "attention_mask": torch.tensor([[1, 0]])}, None, "got padding behind text"),
    ],
)
def test_bad_text(model: nn.Module, ids: Any, mask: Any, message: str) -> None:
    """Refused alike wherever text comes in, and nothing of it is taken."""
    session = SleepSession(model, 2)
    for take in (session.ingest, session.read, session.generate):
        with pytest.raises((ValueError, TypeError), match=message):
            take(ids, mask)
    assert session.position == 0 and session.pending is None


def test_nothing_to_answer(model: nn.Module) -> None:
    session = SleepSession(model, L).ingest(tokens(2, 5))
    with pytest.raises(ValueError, match="ids: got no tokens; expected at least one, after which to go on"):
        session.generate(tokens(2, 0))
    for ask in (session.read, session.generate):
        with pytest.raises(ValueError, match="attention_mask: got a row of padding only; expected a token in each"):
            ask(tokens(2, 3), torch.tensor([[0, 0, 0], [0, 1, 1]]))
        with pytest.raises(ValueError, match="ids: got 3 rows; expected 2, as before"):
            ask(tokens(3, 3))


def test_what_a_tokenizer_gives(model: nn.Module) -> None:
    ids, mask = tokens(2, 2 * L + 5), torch.ones(2, 2 * L + 5, dtype=torch.bool)
    mask[0, :3] = False
    expected = SleepSession(model, L).ingest(ids, mask)
    session = SleepSession(model, L).ingest(BatchEncoding({"input_ids": ids, "attention_mask": mask}))
    found, right = session.state_dict(), expected.state_dict()
    assert found.keys() == right.keys() and all(torch.equal(found[name], t) for name, t in right.items())
