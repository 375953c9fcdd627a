"""Packed sequences in patched models: as each sequence alone, whatever names them; what cannot be kept apart raises."""

from __future__ import annotations

import functools
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.hf_models import CLOSE, FAMILIES, build, tokens
from torch import Tensor, nn
from transformers import DataCollatorWithFlattening, DynamicCache

from sleepkern.integrations.transformers import base_model, mamba2, patch, unpatch
from sleepkern.integrations.transformers import gated_delta as delta
from sleepkern.integrations.transformers import short_convolution as convolution
from sleepkern.testing import relative_error
from sleepkern.testing.tolerances import BLOCK_GRADIENTS

LENGTHS = (5, 9, 1, 7)
OFFSETS = torch.tensor([0, *LENGTHS]).cumsum(0).int()
NUMBERS = torch.repeat_interleave(torch.arange(4), torch.tensor(LENGTHS))[None].int()
POSITIONS = torch.cat([torch.arange(n) for n in LENGTHS])[None]
WAYS: dict[str, dict[str, Any]] = {
    "cu_seq_lens_q": {"cu_seq_lens_q": OFFSETS},
    "cu_seq_lens_k": {"cu_seq_lens_k": OFFSETS.long()},
    "cu_seqlens": {"cu_seqlens": OFFSETS},
    "seq_idx": {"seq_idx": NUMBERS},
    "position_ids": {"position_ids": POSITIONS},
    "all": {"position_ids": POSITIONS, "seq_idx": NUMBERS, "cu_seqlens": OFFSETS, "cu_seq_lens_q": OFFSETS},
    "beside a mask of ones": {"cu_seqlens": OFFSETS, "attention_mask": torch.ones(1, 22, dtype=torch.long)},
}


@pytest.fixture(autouse=True)
def _start_and_end_unpatched() -> Iterator[None]:
    unpatch()
    yield
    unpatch()


@pytest.fixture(scope="module")
def ids() -> Tensor:
    return tokens(1, sum(LENGTHS))


def apart(model: nn.Module, ids: Tensor, lengths: tuple[int, ...] = LENGTHS) -> Tensor:
    return torch.cat([model(piece, use_cache=False).logits for piece in ids.split(lengths, dim=1)], dim=1)


# ---------------------------------------------------------------- every family


@torch.no_grad()
@pytest.mark.parametrize("family", FAMILIES)
def test_each_name_keeps_sequences_apart(family: str, ids: Tensor) -> None:
    model = build(family)
    expected = apart(model, ids)
    assert relative_error(model(ids, use_cache=False).logits, expected) > 100 * CLOSE  # they would see each other
    with patch(family):
        for way, names in WAYS.items():
            assert relative_error(model(ids, **names, use_cache=False).logits, expected) < CLOSE, way
        out = model(inputs_embeds=model.get_input_embeddings()(ids), cu_seqlens=OFFSETS)  # no cache unless asked for
    assert relative_error(out.logits, expected) < CLOSE
    assert out.get("past_key_values") is None and out.get("cache_params") is None


@pytest.mark.parametrize("family", FAMILIES)
def test_a_collators_batch_trains_as_its_samples(family: str) -> None:
    """Loss and gradients of DataCollatorWithFlattening's output as it is."""
    model = build(family).train()
    samples = [{"input_ids": x} for x in (tokens(1, n, seed=n)[0].tolist() for n in LENGTHS)]

    def gradients(*losses: Tensor) -> dict[str, Tensor]:
        model.zero_grad()
        sum(losses, torch.zeros(())).backward()
        return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}

    def loss_of(sample: dict[str, Any]) -> Tensor:
        piece = torch.tensor([sample["input_ids"]])
        predicted = piece.shape[1] - 1  # the last token predicts nothing, and a sample of one token has no loss
        loss: Tensor = model(piece, labels=piece, use_cache=False).loss
        return loss * predicted if predicted else torch.zeros(())

    expected = [x / (sum(LENGTHS) - len(LENGTHS)) for x in map(loss_of, samples)]
    alone = gradients(*expected)
    for options in ({"return_flash_attn_kwargs": True, "return_seq_idx": True}, {}):
        batch = DataCollatorWithFlattening(return_tensors="pt", **options)(samples)
        with patch(family):
            loss = model(**batch).loss
            packed = gradients(loss)
        assert relative_error(loss, sum(expected, torch.zeros(()))) < CLOSE
        assert packed.keys() == alone.keys()
        worst = {name: relative_error(packed[name], alone[name]) for name in alone if alone[name].norm() > 1e-6}
        assert max(worst.values()) < BLOCK_GRADIENTS, worst


@torch.no_grad()
@pytest.mark.parametrize("family", ["qwen3_5", "kimi_linear", "mamba2", "granitemoehybrid"])
def test_several_in_each_row_of_a_batch(family: str) -> None:
    model, ids = build(family), tokens(2, 12)
    expected = torch.cat([apart(model, ids[:1], (5, 7)), apart(model, ids[1:], (1, 8, 3))])
    numbers = torch.tensor([[0] * 5 + [1] * 7, [0] + [1] * 8 + [2] * 3])
    positions = torch.tensor([[*range(5), *range(7)], [0, *range(8), *range(3)]])
    with patch(family):
        for names in (
            {"seq_idx": numbers},
            {"position_ids": positions},
            {"cu_seq_lens_q": torch.tensor([0, 5, 12, 13, 21, 24])},
        ):
            assert relative_error(model(ids, **names, use_cache=False).logits, expected) < CLOSE


@torch.no_grad()
@pytest.mark.since("5.23")
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize(
    ("family", "sizes"),
    [
        (
            "glm5_next",
            {
                "index_topk": 8,
                "layer_types": ["linear_attention"] * 2 + ["full_attention"] * 2,
                "indexer_types": ["full"] * 3 + ["shared"],
            },
        ),
        ("qwen4_exp", {"indexer_budget": 8}),
    ],
)
def test_an_indexer_picks_tokens_of_its_own_sequence(family: str, sizes: dict[str, Any], attention: str) -> None:
    """Fewer than a sequence has, so that it matters which; GLM-5-Next's last layer takes those of the one before."""
    model, ids, lengths = build(family, **sizes), tokens(1, 34), (19, 3, 11, 1)
    model.set_attn_implementation(attention)
    numbers = torch.repeat_interleave(torch.arange(4), torch.tensor(lengths))[None]
    expected, two = apart(model, ids, lengths), ids[:, :32].view(2, 16)
    of_rows = torch.cat([apart(model, two[:1], (15, 1)), model(two[1:], use_cache=False).logits])
    with patch(family):
        found = model(ids, seq_idx=numbers, use_cache=False, output_attentions=attention == "eager")
        assert relative_error(found.logits, expected) < CLOSE
        rows = model(two, cu_seq_lens_q=torch.tensor([0, 15, 16, 32]), use_cache=False).logits
        assert relative_error(rows, of_rows) < CLOSE
    assert attention == "sdpa" or found.attentions
    for weights in found.attentions or ():
        assert weights.shape[-2:] == (34, 34) and not weights[:, :, numbers[0, :, None] != numbers].any()


@torch.no_grad()
@pytest.mark.parametrize("family", ["olmo_hybrid", "bailing_hybrid", "mamba2", "granitemoehybrid"])
def test_padding_behind_the_last_sequence(family: str, ids: Tensor) -> None:
    model = build(family)
    padded = torch.cat([ids, tokens(1, 4, seed=5)], dim=1)
    positions = torch.cat([POSITIONS, torch.zeros(1, 4, dtype=torch.long)], dim=1)
    with patch(family):
        for names in ({"cu_seqlens": OFFSETS}, {"cu_seqlens": OFFSETS, "position_ids": positions}):
            found = model(padded, **names, use_cache=False).logits[:, : sum(LENGTHS)]
            assert relative_error(found, apart(model, ids)) < CLOSE


@torch.no_grad()
def test_the_example_of_the_documentation() -> None:
    text = (Path(__file__).resolve().parents[2] / "docs/guides/packed_sequences.md").read_text()
    names: dict[str, Any] = {}
    exec(re.findall(r"```python\n(.*?)```", text, re.S)[-1], names)
    model, texts = build("falcon_h1", num_hidden_layers=1), (tokens(1, 6), tokens(1, 4, seed=2))
    expected = apart(model, torch.cat(texts, dim=1), (6, 4))
    found = names["packed"](model, *texts)
    assert len(found) == 5 and all(relative_error(logits, expected) < CLOSE for logits in found)


# ---------------------------------------------------------------- one sequence a row is nothing special


@torch.no_grad()
@pytest.mark.parametrize("family", ["qwen3_next", "mamba2", "granitemoehybrid"])
def test_names_of_whole_rows_change_nothing(family: str) -> None:
    model, ids = build(family), tokens(2, 12)
    expected = model(ids).logits
    whole = {
        "cu_seq_lens_q": torch.tensor([0, 12, 24]),
        "seq_idx": torch.tensor([[3] * 12, [4] * 12]),
        "position_ids": torch.arange(12)[None],
    }
    with patch(family):
        out = model(ids, **whole, use_cache=True)
    assert relative_error(out.logits, expected) < CLOSE
    assert out.get("past_key_values") is not None or out.get("cache_params") is not None


@torch.no_grad()
def test_vision_positions_get_a_row_for_text(ids: Tensor) -> None:
    """Qwen3.5 takes positions of time, height and width, three rows, beside those of text, a fourth in front."""
    model = build("qwen3_5")
    expected = apart(model, ids)
    three, four = POSITIONS[None].expand(3, 1, -1), POSITIONS[None].expand(4, 1, -1)
    with patch(model):
        assert relative_error(model(ids, position_ids=three, cu_seqlens=OFFSETS).logits, expected) < CLOSE
        assert relative_error(model(ids, position_ids=four, use_cache=False).logits, expected) < CLOSE


# ---------------------------------------------------------------- what cannot be kept apart


@torch.no_grad()
@pytest.mark.parametrize("family", ["granitemoehybrid", "mamba2"])
def test_forwards_that_hooks_hold(family: str, ids: Tensor) -> None:
    """accelerate keeps a module's forward, bound, as _old_forward, and puts another on the instance."""
    model = build(family)
    expected = apart(model, ids)
    for module in (model, model.base_model):
        module._old_forward = module.forward
        module.forward = functools.partial(lambda module, *x, **y: module._old_forward(*x, **y), module)
    held = model.base_model._old_forward
    with patch(model):
        assert relative_error(model(ids, position_ids=POSITIONS, use_cache=False).logits, expected) < CLOSE
        assert relative_error(model(ids, cu_seqlens=OFFSETS).logits, expected) < CLOSE
    assert model.base_model._old_forward is held


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"use_cache": True}, "use_cache: got True with packed sequences, of which no cache can be kept"),
        ({"past_key_values": DynamicCache()}, r"(past_key_values|cache): got a cache with packed sequences"),
        ({"attention_mask": torch.tensor([[0] + [1] * 21])}, "attention_mask: got one that hides tokens of packed"),
        ({"position_ids": torch.arange(22)[None]}, r"position_ids: got sequences that start at tokens \[0\]; expected"),
        ({"seq_idx": NUMBERS.flip(1)}, r"seq_idx: got sequences .*; expected those of cu_seq_lens_q, \[0, 5, 14, 15\]"),
        ({"seq_idx": NUMBERS[:, 1:]}, r"seq_idx: got shape \[1, 21\]; expected \[B,T\] = \[1, 22\]"),
        ({"cu_seqlens": torch.tensor([0, 5, 22])}, r"cu_seqlens: got sequences that start at tokens \[0, 5\]"),
        ({"cu_seq_lens_q": torch.tensor([1, 5, 22])}, r"cu_seq_lens_q: got \[1, 5, 22\]; expected offsets"),
        ({"cu_seq_lens_q": torch.tensor([0, 9, 5, 22])}, r"cu_seq_lens_q: got \[0, 9, 5, 22\]; expected offsets"),
        ({"cu_seq_lens_q": torch.tensor([0, 5, 23])}, r"cu_seq_lens_q: got \[0, 5, 23\]; expected .* 0 to 22 tokens"),
    ],
    ids=lambda x: next(iter(x)) if isinstance(x, dict) else "",
)
def test_what_cannot_be_kept_apart_raises(given: dict[str, Any], message: str, ids: Tensor) -> None:
    model = build("qwen3_next", num_hidden_layers=1)
    with patch(model), pytest.raises(ValueError, match=message):
        model(ids, **{"cu_seq_lens_q": OFFSETS, **given})


@torch.no_grad()
def test_in_a_graph_offsets_are_trusted_and_positions_asserted(ids: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    """What runs under torch.compile, whose graph cannot look at values."""
    model = build("granitemoehybrid")
    expected = apart(model, ids)
    with patch(model):
        monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
        for names in ({"cu_seq_lens_q": OFFSETS}, {"seq_idx": NUMBERS}, {"cu_seqlens": OFFSETS.long()}):
            assert relative_error(model(ids, **names, use_cache=False).logits, expected) < CLOSE
        model(ids, position_ids=torch.arange(22)[None], use_cache=False)
        with pytest.raises(RuntimeError, match="position_ids: restart in a compiled model; expected cu_seq_lens_q"):
            model(ids, position_ids=POSITIONS, use_cache=False)
        with pytest.raises(RuntimeError, match="attention_mask: hides tokens of packed sequences"):
            model(ids, cu_seqlens=OFFSETS, attention_mask=torch.zeros(1, 22, dtype=torch.long), use_cache=False)


def test_a_row_may_not_start_inside_a_sequence() -> None:
    model = build("qwen3_next", num_hidden_layers=1)
    with patch(model), pytest.raises(ValueError, match="expected every row of 11 tokens to start a sequence"):
        model(tokens(2, 11), cu_seq_lens_q=OFFSETS, use_cache=False)


def test_positions_that_restart_with_a_cache_asked_for_raise(ids: Tensor) -> None:
    """Attention would take them for one sequence, without a word."""
    model = build("kimi_linear", num_hidden_layers=4)
    with patch(model), pytest.raises(ValueError, match="use_cache: got True with packed sequences"):
        model(ids, position_ids=POSITIONS, use_cache=True)


@torch.no_grad()
@pytest.mark.since("5.23")
def test_embeddings_of_ngrams_refuse_packed_sequences(ids: Tensor) -> None:
    """Their convolution and n-grams are told of no sequences; one a row goes through."""
    per_layer = {"ple_layer_ids": [1], "ngram_size": 2, "ngram_vocab_size_base": 8, "eos_token_id": 0}
    model = build("qwen4_exp", **per_layer)
    expected = model(ids, use_cache=False).logits
    with patch(model):
        with pytest.raises(ValueError, match="Qwen4ExpTextModel with ple_layer_ids, whose embeddings of n-grams read"):
            model(ids, cu_seq_lens_q=OFFSETS, use_cache=False)
        whole = model(ids, cu_seq_lens_q=torch.tensor([0, 22]), use_cache=False).logits
    assert relative_error(whole, expected) < CLOSE


def test_layers_that_hand_nothing_on_refuse(ids: Tensor) -> None:
    """As those of transformers 4.57 to 5.10 on a CPU."""

    class Older(nn.Module):
        def forward(self, input_ids: Tensor, position_ids: Tensor | None = None, **kwargs: Any) -> str:
            return "stock"

    made = base_model.forward(Older.forward, hands_on=False, masks=False)
    with pytest.raises(ValueError, match="got several in a row for a Older of this version of transformers"):
        made(Older(), ids, position_ids=POSITIONS)
    assert made(Older(), ids, position_ids=torch.arange(22)[None]) == "stock"
    elsewhere = {"input_ids": ids.to("meta"), "cu_seqlens": OFFSETS}
    assert made(Older(), **elsewhere) == "stock"


def test_a_call_that_stays_stocks_is_told_by_the_name_that_stock_heeds() -> None:
    """So that it raises, or keeps the sequences apart where packages do, instead of mixing them."""
    heard: list[dict[str, Any]] = []

    def stock(*args: Any, **kwargs: Any) -> None:
        heard.append(kwargs)

    x = torch.zeros(1, 22, 2, 4, dtype=torch.float64)
    for names in ({"cu_seq_lens_q": OFFSETS}, {"seq_idx": NUMBERS}):
        delta.many_tokens(stock)(x, x, x, x[..., 0], x[..., 0], **names)
        convolution.many_tokens(stock)(torch.zeros(1, 4, 22), torch.zeros(4, 4), activation="gelu", **names)
        mamba2.scan(stock)(x, x[..., 0], x[0, 0, :, 0], x, x, 16, **names)
        assert mamba2.fused_mixer(stock)(x, **names) is None
    assert [list(x) for x in heard] == [["cu_seqlens"], ["activation", "seq_idx"], ["seq_idx"]] * 2
    assert all(torch.equal(x["cu_seqlens"], OFFSETS) for x in heard if "cu_seqlens" in x)
    assert all(torch.equal(x["seq_idx"], NUMBERS) for x in heard if "seq_idx" in x)
    mamba2.fused_mixer(stock)(x, dt_limit=(0.0, 1.0))
    assert list(heard[-1]) == ["dt_limit"]
