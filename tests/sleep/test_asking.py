"""Questions to a session: one or many, of one length or several, by the options that `generate` of a model has."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers.hf_models import CLOSE, build, retrofitted, tokens
from helpers.sleep_models import jet, sleep_lm
from torch import Tensor, nn
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList, MaxLengthCriteria, StoppingCriteriaList

from sleepkern.integrations.transformers import patch
from sleepkern.sleep import SleepSession
from sleepkern.testing import relative_error

L, WAIT = 16, 5
FAMILIES = (
    "qwen3_next", "qwen3_5", "qwen3_5_moe", "olmo_hybrid", "kimi_linear", "bailing_hybrid", "mamba2", "bamba",
    "falcon_h1", "nemotron_h", "granitemoehybrid", "zamba2",
)  # fmt: skip
OTHERS = {"SleepLM": sleep_lm, "jet": lambda: jet()[1], "retrofit": lambda: retrofitted(decay_bias=1.0)}
QUESTION = tokens(2, 5, seed=4)


def made(name: str, **changes: Any) -> Any:
    return OTHERS[name]() if name in OTHERS else build(name, **changes)


def session_of(model: Any, rows: int = 2, **options: Any) -> SleepSession:
    return SleepSession(model, L, passes=2, **options).ingest(tokens(rows, 2 * L + WAIT))


def greedy(session: SleepSession, question: Tensor, new: int) -> Tensor:
    for _ in range(new):
        question = torch.cat([question, session.read(question)[:, -1:].argmax(-1)], dim=1)
    return question


@pytest.fixture(autouse=True)
def _kernels():
    with patch(*FAMILIES):
        yield


@pytest.fixture(scope="module")
def model() -> nn.Module:
    return build("qwen3_next")


@pytest.mark.parametrize("name", [*FAMILIES, *OTHERS])
def test_questions_of_several_lengths_to_one_text(name: str) -> None:
    """Each as if it were asked alone, of a text of one row and of one for each."""
    model = made(name)
    question, mask = tokens(3, 6, seed=4), torch.tensor([[0, 0, 1, 1, 1, 1], [1] * 6, [0, 0, 1, 1, 1, 1]])
    one, three = session_of(model, 1, eviction="sliding"), session_of(model, 3, eviction="sliding")
    for session, rows in ((one, [one] * 3), (three, [three._for(part) for part in parts_of(three)])):
        read = session.read(question, mask)
        answers = session.generate(question, mask, max_new_tokens=3, do_sample=False, eos_token_id=None)
        assert not read[0, :2].any() and torch.equal(answers[:, :6], question)
        for i, row in enumerate(mask.sum(1).tolist()):
            alone = question[i : i + 1, -row:]
            assert relative_error(read[i, -row:], rows[i].read(alone)[0]) < CLOSE
            assert torch.equal(answers[i : i + 1, -row - 3 :], greedy(rows[i], alone, 3))


def parts_of(session: SleepSession) -> list[Any]:
    from sleepkern.sleep.text import Questions

    return [Questions(torch.tensor([i]), torch.zeros(1, 1, dtype=torch.long)) for i in range(3)]


def test_beams_and_draws_of_several_questions(model: nn.Module) -> None:
    session, question = session_of(model, 1), tokens(2, 4, seed=4)
    mask = torch.tensor([[0, 1, 1, 1], [1, 1, 1, 1]])
    options: dict[str, Any] = {"num_beams": 3, "num_return_sequences": 2, "max_new_tokens": 4}
    answers = session.generate(question, mask, **options)
    assert answers.shape == (4, 8)
    for i, alone in enumerate((question[:1, 1:], question[1:])):
        expected = session.generate(alone, **options)
        assert torch.equal(answers[2 * i : 2 * i + 2, -expected.shape[1] :], expected)
    padded = session.generate(question[:, 1:].repeat(1, 1), return_dict_in_generate=True, **options).sequences
    same = torch.cat([torch.zeros(2, 2, dtype=torch.long), question[:, 1:]], dim=1)
    both = session.generate(same, (same > 0).long(), return_dict_in_generate=True, **options).sequences
    assert torch.equal(both[:, 2:], padded) and both.shape[1] == padded.shape[1] + 2
    for option in ({"return_dict_in_generate": True}, {"streamer": Streamer()}):
        with pytest.raises(ValueError, match="for questions of several lengths; expected one length"):
            session.generate(question, mask, **option)


@pytest.mark.parametrize("how", ["config", "generation_config", "option", "options' config"])
@pytest.mark.parametrize("family", ["qwen3_next", "bailing_hybrid", "nemotron_h", "mamba2"])
def test_memory_is_used_whatever_is_said_of_caches(family: str, how: str) -> None:
    model = build(family, **({"use_cache": False} if how == "config" else {}))
    options: dict[str, Any] = {"max_new_tokens": 4, "do_sample": False}
    if how == "generation_config":
        model.generation_config.use_cache = False
        model.generation_config.cache_implementation = "static"
    if how == "option":
        options["use_cache"] = False
    if how == "options' config":
        options = {"generation_config": GenerationConfig(**options, use_cache=False, pad_token_id=0)}
    session, before = session_of(model), model.generation_config.use_cache
    assert torch.equal(session.generate(QUESTION, **options), greedy(session, QUESTION, 4))
    assert model.generation_config.use_cache is before


class Streamer:
    def __init__(self) -> None:
        self.got: list[int] = []

    def put(self, ids: Tensor) -> None:
        self.got += ids.flatten().tolist()

    def end(self) -> None:
        self.got.append(-1)


class Seen(LogitsProcessor):
    """What a processor is shown, as repetition_penalty and all others are."""

    def __init__(self) -> None:
        self.ids: list[Tensor] = []

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        self.ids.append(input_ids)
        return scores


@pytest.mark.parametrize("eviction", ["hard", "sliding"])
@pytest.mark.parametrize("wait", [0, WAIT])
def test_only_what_was_asked_is_counted_and_seen(model: nn.Module, wait: int, eviction: str) -> None:
    session = SleepSession(model, L, 2, eviction).ingest(tokens(1, L + wait))
    question = QUESTION[:1]
    full = session.generate(question, max_new_tokens=6, do_sample=False)
    assert torch.equal(full, greedy(session, question, 6))
    assert torch.equal(session.generate(question, max_length=11), full)
    assert torch.equal(session.generate(question, max_new_tokens=6, prefill_chunk_size=2), full)
    stop = StoppingCriteriaList([MaxLengthCriteria(7)])
    assert torch.equal(session.generate(question, max_new_tokens=6, stopping_criteria=stop), full[:, :7])
    eos = int(full[0, 5])
    assert session.generate(question, max_new_tokens=6, eos_token_id=eos, pad_token_id=0).shape[1] == 6
    assert session.generate(question, max_new_tokens=6, eos_token_id=eos, min_length=9).shape[1] >= 9
    streamer, seen = Streamer(), Seen()
    session.generate(question, max_new_tokens=6, streamer=streamer, logits_processor=LogitsProcessorList([seen]))
    assert streamer.got == [*full[0].tolist(), -1]
    assert [ids.tolist() for ids in seen.ids] == [full[:, :n].tolist() for n in range(5, 11)]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"prompt_lookup_num_tokens": 3},
            "options: got prompt_lookup_num_tokens; expected none that takes tokens back",
        ),
        ({"assistant_model": nn.Linear(1, 1)}, "options: got assistant_model; expected none that takes tokens back"),
        ({"token_healing": True}, "options: got token_healing"),
        ({"generation_config": GenerationConfig(prompt_lookup_num_tokens=2)}, "options: got prompt_lookup_num_tokens"),
        (
            {"past_key_values": 1, "position_ids": 2},
            "options: got past_key_values, position_ids; expected none of what",
        ),
        ({"cache_implementation": "static"}, "options: got cache_implementation"),
    ],
)
@pytest.mark.parametrize("name", ["qwen3_next", "retrofit"])
def test_refused_before_anything_runs(name: str, options: dict[str, Any], message: str) -> None:
    session = session_of(made(name))
    session.adapter.open = session.adapter.model.generate = None  # type: ignore[method-assign, attr-defined]
    with pytest.raises(ValueError, match=message):
        session.generate(QUESTION, **options)


@pytest.mark.parametrize("name", ["SleepLM", "jet", "mamba2"])
def test_a_row_ends_where_it_should(name: str) -> None:
    """By eos, which pad follows; not before the least, nor after the most; by options and generation_config alike."""
    model = made(name)
    session = session_of(model)
    full = greedy(session, QUESTION, 6)
    plain: dict[str, Any] = {"do_sample": False, "pad_token_id": 7}
    eos = int(full[0, 7])
    first = [int((row[5:] == eos).nonzero()[0]) if (row[5:] == eos).any() else 6 for row in full]
    expected = full.clone()
    for row, place in zip(expected, first, strict=True):
        row[5 + place + 1 :] = 7
    expected = expected[:, : 5 + min(6, max(first) + 1)]
    for ends in (eos, [eos]):
        options = {"max_new_tokens": 6, "eos_token_id": ends, **plain}
        assert torch.equal(session.generate(QUESTION, **options), expected)
        config = GenerationConfig(**options)
        assert torch.equal(session.generate(QUESTION, generation_config=config), expected)
    assert torch.equal(session.generate(QUESTION, max_length=11, **plain), full)
    options["min_new_tokens"] = 6
    assert not (session.generate(QUESTION, **options)[:, 5:] == eos).any()
    holder = session.adapter.model
    before = getattr(holder, "generation_config", None)
    holder.generation_config = GenerationConfig(max_new_tokens=6, eos_token_id=eos, **plain)
    try:
        assert torch.equal(session.generate(QUESTION), expected)
        assert torch.equal(session.generate(QUESTION, max_new_tokens=1), full[:, :6])
    finally:
        holder.generation_config = before


def test_draws_follow_the_options() -> None:
    session, new = session_of(sleep_lm()), {"max_new_tokens": 1, "do_sample": True}
    scores = session.read(QUESTION)[:, -1]
    many = session._for(parts_of(session)[0])  # the first row
    question = QUESTION[:1].expand(400, -1)
    torch.manual_seed(0)
    ways: dict[str, dict[str, Any]] = {
        "top_k": {"top_k": 3, "temperature": 4.0}, "top_p": {"top_p": 0.7}, "cold": {"temperature": 1e-4},
        "free": {"temperature": 4.0},
    }  # fmt: skip
    drawn = {name: many.generate(question, **new, **options)[:, -1] for name, options in ways.items()}
    probabilities, order = scores[0].softmax(-1).sort(descending=True)
    assert set(drawn["top_k"].tolist()) == set(order[:3].tolist())
    nucleus = int(((probabilities.cumsum(0) - probabilities) < 0.7).sum())
    assert set(drawn["top_p"].tolist()) <= set(order[:nucleus].tolist()) and nucleus > 1
    assert set(drawn["cold"].tolist()) == {int(order[0])} and len(set(drawn["free"].tolist())) > nucleus


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_beams": 2}, "options: got num_beams; expected max_new_tokens"),
        ({"generation_config": GenerationConfig(repetition_penalty=1.3)}, "options: got repetition_penalty; expected"),
        ({"streamer": Streamer()}, "options: got streamer; expected"),
        ({"do_sample": True, "temperature": 0.0}, "temperature: got 0.0; expected above 0"),
        ({"do_sample": True, "top_p": 1.5}, "top_p: got 1.5; expected above 0 and at most 1"),
        ({"max_length": 5}, "max_length: got 5 for ids of 5 tokens; expected more"),
        ({"max_new_tokens": -1}, "max_new_tokens: got -1; expected at least 0"),
        ({"max_new_tokens": 1.5}, "max_new_tokens: got 1.5; expected a whole number"),
    ],
)
def test_what_a_stack_without_a_generate_of_its_own_refuses(options: dict[str, Any], message: str) -> None:
    session = session_of(sleep_lm())
    session.adapter.open = None  # type: ignore[method-assign]
    with pytest.raises((ValueError, TypeError), match=message):
        session.generate(QUESTION, **options)


def test_neutral_settings_are_taken() -> None:
    session = session_of(sleep_lm())
    config = GenerationConfig(
        num_beams=1, repetition_penalty=1.0, no_repeat_ngram_size=0, bos_token_id=1, max_new_tokens=3
    )
    assert torch.equal(session.generate(QUESTION, generation_config=config), greedy(session, QUESTION, 3))


@pytest.mark.parametrize(("dtype", "bound"), [(torch.bfloat16, 0.02), (torch.float16, 0.003)], ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_logits_are_those_of_the_model(family: str, dtype: torch.dtype, bound: float) -> None:
    """In its type, and scaled as it scales them."""
    scaled = {"falcon_h1": {"lm_head_multiplier": 0.25}, "granitemoehybrid": {"logits_scaling": 4.0}}
    model, ids = build(family, **scaled.get(family, {})).to(dtype), tokens(2, 8)
    with torch.no_grad(), patch(model):
        session = SleepSession(model, L)
        found, expected = session.read(ids), model(ids).logits
        assert found.dtype == expected.dtype and relative_error(found, expected) < bound
        session.ingest(tokens(2, L + 3)).generate(ids, max_new_tokens=2)
