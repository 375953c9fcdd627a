"""Attention-only models of transformers with inserted fast weights: the same at first, asleep, trained, saved."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.hf_models import CLOSE, build, cached, retrofitted, tokens
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, DynamicCache, EncoderDecoderCache

from sleepkern.sleep import SleepSession, load_retrofitted, retrofit
from sleepkern.sleep.inserted_mixer import inserted_in
from sleepkern.testing import relative_error
from sleepkern.testing.tolerances import MATTERS

L, LAYERS = 16, (1, 2)
FAMILIES = ("llama", "qwen3")


def original(family: str = "llama") -> nn.Module:
    return build(family)


@torch.no_grad()
@pytest.mark.parametrize("family", FAMILIES)
def test_starts_as_the_original(family: str) -> None:
    plain, model, ids = original(family), retrofitted(family, awake=False), tokens(2, 20)
    assert torch.equal(model(ids).logits, plain(ids).logits)
    assert torch.equal(model.generate(ids, max_new_tokens=5), plain.generate(ids, max_new_tokens=5))
    added = model.state_dict().keys() - plain.state_dict().keys()
    assert plain.state_dict().keys() <= model.state_dict().keys()
    assert added and all(name.split(".")[2] in "12" and ".inserted." in name for name in added)
    assert relative_error(retrofitted(family)(ids).logits, plain(ids).logits) > 0.05


@torch.no_grad()
@pytest.mark.parametrize("family", FAMILIES)
def test_without_a_session_the_cache_carries_the_state(family: str) -> None:
    model, ids = retrofitted(family), tokens(2, 30)
    at_once = model(ids, use_cache=False).logits
    for cache in (DynamicCache(config=model.config), DynamicCache()):
        pieces = [model(piece, **cached(model, cache), use_cache=True).logits for piece in ids.split([9, 1, 20], dim=1)]
        assert relative_error(torch.cat(pieces, dim=1), at_once) < CLOSE
    cache = DynamicCache(config=model.config)
    model(ids[:, :9], **cached(model, cache))
    cache.layers[1].recurrent_states[0] = torch.zeros_like(cache.layers[1].recurrent_states[0])
    assert relative_error(model(ids[:, 9:], **cached(model, cache)).logits, at_once[:, 9:]) > MATTERS  # it matters


@torch.no_grad()
@pytest.mark.parametrize("name", ["past_key_values", "cache", "a name of a later version", None], ids=str)
def test_a_cache_is_found_by_any_name(name: str | None) -> None:
    """Or without one, by its place."""
    model, h = retrofitted(), torch.randn(2, 20, 32)
    block, cache = model.model.layers[1], DynamicCache(config=model.config)
    expected, _ = block.inserted(h)
    arguments, options = ((None, cache), {}) if name is None else ((), {name: cache})
    for part in h.split([9, 11], dim=1):
        (found, *rest), given = block.inserted.before_block(block, (part, *arguments), options)
        assert tuple(rest) == arguments and given is options
    assert relative_error(found, expected[:, 9:]) < CLOSE
    assert relative_error(block.inserted(part)[0], expected[:, 9:]) > MATTERS  # it matters


@torch.no_grad()
def test_packed_sequences_are_refused(tmp_path: Path) -> None:
    """Attention keeps some of them apart, a mixer would not. One sequence a row goes through, and so does padding."""
    model, ids = retrofitted(), tokens(2, 12)
    model.save_pretrained(tmp_path)
    expected = model(ids).logits
    packed, whole = torch.tensor([0, 5, 12, 24]), torch.tensor([0, 12, 24])
    numbers, positions = torch.tensor([[0] * 5 + [1] * 7]), torch.tensor([[*range(5), *range(7)]])
    ways: list[tuple[str, Any, Any]] = [
        *((name, packed, whole) for name in ("cu_seq_lens_q", "cu_seq_lens_k", "cu_seqlens")),
        ("seq_idx", numbers, torch.tensor([[3] * 12])),
        ("position_ids", positions, torch.arange(12)[None] + 1),
    ]
    for each in (model, copy.deepcopy(model), load_retrofitted(tmp_path)):
        for name, several, one in ways:
            message = f"^{name}: got several sequences in a row of a retrofitted model, whose mixers would mix them"
            with pytest.raises(ValueError, match=message):
                each(ids, **{name: several}, use_cache=False)
            assert relative_error(each(ids, **{name: one}, use_cache=False).logits, expected) < CLOSE
        with pytest.raises(ValueError, match="^position_ids: got several sequences"):
            each.model(ids, None, positions)
    padded = torch.tensor([[0] * 3 + [1] * 9]).expand(2, -1)
    at = torch.tensor([[1] * 3 + [*range(9)]])
    found = model(ids, attention_mask=padded, position_ids=at, use_cache=False).logits[:, 3:]
    assert relative_error(found, model(ids[:, 3:]).logits) < CLOSE


def test_packed_sequences_are_refused_in_a_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    """What runs under torch.compile, whose graph cannot look at values."""
    model, ids = retrofitted(), tokens(1, 12)
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    model(ids, seq_idx=torch.zeros(1, 12, dtype=torch.int32), use_cache=False)
    with pytest.raises(RuntimeError, match="seq_idx: got several sequences in a row of a retrofitted model"):
        model(ids, seq_idx=torch.arange(12)[None] // 6, use_cache=False)


@torch.no_grad()
def test_what_would_lose_the_state_is_refused() -> None:
    """A cache without layers, or none where one is to be used."""
    block, h = retrofitted().model.layers[1], torch.randn(2, 3, 32)
    both = EncoderDecoderCache(DynamicCache(), DynamicCache())
    for options, message in (
        ({"past_key_values": ((h, h),)}, "past_key_values: got a tuple; expected a cache of transformers with layers"),
        ({"states": both}, "cache: got a EncoderDecoderCache; expected a cache of transformers with layers"),
        ({"states": object(), "use_cache": True}, "cache: got none among states, use_cache, and use_cache=True"),
    ):
        with pytest.raises(ValueError, match=message):
            block.inserted.before_block(block, (h,), options)


@torch.no_grad()
@pytest.mark.parametrize("beams", [1, 3])
def test_generates_with_and_without_a_cache(beams: int) -> None:
    """A beam takes the fast weights of the beam that it goes on from."""
    model, ids = retrofitted(), tokens(2, 12)
    options = {"max_new_tokens": 8, "do_sample": False, "num_beams": beams}
    assert torch.equal(model.generate(ids, **options), model.generate(ids, use_cache=False, **options))


def masked(model: nn.Module, ids: Tensor, seen: int) -> Tensor:
    """Logits of one forward in which a token attends to its window and `seen` windows before."""
    t = torch.arange(ids.shape[1])
    ahead = t[:, None] // L - t // L
    allowed = (ahead >= 0) & (ahead <= seen) & (t[:, None] >= t)
    bias = torch.zeros(1, 1, len(t), len(t)).masked_fill(~allowed, torch.finfo(torch.float32).min)
    return model(ids, attention_mask=bias.expand(len(ids), -1, -1, -1), use_cache=False).logits


@torch.no_grad()
@pytest.mark.parametrize("eviction", ["hard", "sliding"])
def test_one_pass_is_one_forward_with_a_mask(eviction: str) -> None:
    model, ids = retrofitted(), tokens(2, 3 * L)
    session, logits = SleepSession(model, L, eviction=eviction), []
    assert session.memory.recurrent == list(LAYERS) and session.memory.attention == [0, 1, 2, 3]
    for window in ids.split(L, dim=1):
        logits.append(session.read(window))
        session.ingest(window)
    expected = masked(model, ids, seen=int(eviction == "sliding"))
    assert relative_error(torch.cat(logits, dim=1), expected) < CLOSE
    assert relative_error(masked(model, ids, seen=2), expected) > MATTERS


@torch.no_grad()
@pytest.mark.parametrize("blocks", [slice(0, 4), slice(1, 3)])
def test_three_passes_are_a_loop(blocks: slice) -> None:
    """Written out: mixer and original block by turns, a new cache for every block."""
    model, plain, ids = retrofitted(), original(), tokens(2, 2 * L)
    fast: dict[int, Any] = {}
    for start in (0, L):
        h, positions = plain.model.embed_tokens(ids[:, start : start + L]), torch.arange(start, start + L)[None]
        bias = torch.full((L, L), torch.finfo(h.dtype).min).triu(1)[None, None].expand(2, -1, -1, -1)
        options = {"attention_mask": bias, "position_ids": positions}
        options["position_embeddings"] = plain.model.rotary_emb(h, positions)
        before = dict(fast)
        for n in range(3):
            if n > 0:  # convolutions rewind
                conv = {i: before[i].conv if i in before else torch.zeros_like(x.conv) for i, x in fast.items()}
                fast = {i: x._replace(conv=conv[i]) for i, x in fast.items()}
            for i in range(0 if n == 0 else blocks.start, blocks.stop):
                if i in LAYERS:
                    h, fast[i] = model.model.layers[i].inserted(h, fast.get(i))
                h = plain.model.layers[i](h, **options)
    session = SleepSession(model, L, passes=3, blocks=blocks).ingest(ids)
    found = session.memory.fast()
    assert found.keys() == fast.keys() == set(LAYERS)
    assert max(relative_error(found[i].state, fast[i].state) for i in fast) < CLOSE
    once = SleepSession(model, L).ingest(ids).memory.fast()
    assert min(relative_error(once[i].state, fast[i].state) for i in fast) > 0.01


@torch.no_grad()
@pytest.mark.parametrize("eviction", ["hard", "sliding"])
def test_generates_what_reading_says(eviction: str) -> None:
    model, question = retrofitted(), tokens(2, 5, seed=4)
    session = SleepSession(model, L, passes=2, eviction=eviction).ingest(tokens(2, 40))
    before = {name: t.clone() for name, t in session.state_dict().items()}
    answer, manual = session.generate(question, max_new_tokens=6, do_sample=False), question
    for _ in range(6):
        manual = torch.cat([manual, session.read(manual)[:, -1:].argmax(-1)], dim=1)
    assert torch.equal(answer, manual)
    assert all(torch.equal(t, before[name]) for name, t in session.state_dict().items())
    forgetful = SleepSession(model, L).read(question)
    assert relative_error(forgetful, session.read(question)) > MATTERS


@torch.no_grad()
def test_padding_writes_nothing() -> None:
    model, ids, question = retrofitted(), tokens(2, 2 * L), tokens(2, 5, seed=4)
    mask = torch.ones_like(ids)
    mask[0, :7] = 0
    alone = model(ids[:1, 7:]).logits
    assert relative_error(model(ids, attention_mask=mask).logits[:1, 7:], alone) < CLOSE
    batch = torch.cat([torch.cat([torch.zeros_like(ids[:1, :L]), ids[:1]], dim=1), tokens(1, 3 * L, seed=5)])
    mask = torch.ones_like(batch)
    mask[0, :L] = 0
    session = SleepSession(model, L, passes=2).ingest(batch, attention_mask=mask)
    expected = SleepSession(model, L, passes=2).ingest(ids[:1])
    assert relative_error(session.read(question)[:1], expected.read(question[:1])) < CLOSE


@torch.no_grad()
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_a_step_after_right_padding_goes_on_from_the_text(attention: str) -> None:
    model = retrofitted()
    model.set_attn_implementation(attention)
    ids, step, mask = tokens(2, 12), tokens(2, 1, seed=5), torch.ones(2, 12, dtype=torch.long)
    mask[1, 7:] = 0
    cache = model(ids, attention_mask=mask, use_cache=True).past_key_values
    mask, places = torch.cat([mask, torch.ones_like(step)], dim=1), torch.tensor([[12], [7]])
    found = model(step, attention_mask=mask, position_ids=places, past_key_values=cache).logits[1]
    expected = model(torch.cat([ids[1:, :7], step[1:]], dim=1)).logits[0, -1:]
    assert relative_error(found, expected) < CLOSE


@torch.no_grad()
def test_to_disk_and_back(tmp_path: Path) -> None:
    model, ids, question = retrofitted(), tokens(2, 40), tokens(2, 5, seed=4)
    save_file(model.state_dict(), tmp_path / "model.safetensors")
    again = retrofit(original(), layers=LAYERS, heads=2)
    again.load_state_dict(load_file(tmp_path / "model.safetensors"))
    session = SleepSession(model, L, passes=2, eviction="sliding").ingest(ids)
    save_file(session.state_dict(), tmp_path / "session.safetensors")
    other = SleepSession(again, L, passes=2, eviction="sliding")
    other.load_state_dict(load_file(tmp_path / "session.safetensors"))
    assert torch.equal(other.read(question), session.read(question))
    copied = copy.deepcopy(model)
    nn.init.zeros_(copied.model.layers[1].inserted.mixer.out.weight)  # a copy has mixers of its own
    assert relative_error(copied(ids).logits, model(ids).logits) > MATTERS
    assert torch.equal(again(ids).logits, model(ids).logits)


@torch.no_grad()
def test_saved_by_transformers_and_loaded_whole(tmp_path: Path) -> None:
    """Or refused by transformers, which would drop the mixers."""
    model, ids = retrofitted(decay_bias=2.5, key_width=8, convolution=3, negative=True), tokens(2, 12)
    model.save_pretrained(tmp_path / "one", max_shard_size="20KB")
    again = load_retrofitted(tmp_path / "one")
    assert type(again) is type(model) and not again.training and again.config.model_type == "llama"
    assert torch.equal(again(ids).logits, model(ids).logits)
    copy.deepcopy(again).save_pretrained(tmp_path / "two")
    assert torch.equal(load_retrofitted(tmp_path / "two")(ids).logits, model(ids).logits)
    half = load_retrofitted(tmp_path / "one", dtype=torch.bfloat16)
    assert {p.dtype for p in half.parameters()} == {torch.bfloat16}
    with pytest.raises(ValueError, match="model type `sleepkern_retrofit`"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "one")
    with pytest.raises(ValueError, match="load_retrofitted loads it"):
        type(model).from_pretrained(tmp_path / "one")
    with pytest.raises(ValueError, match="push_to_hub: got True"):
        model.save_pretrained(tmp_path / "three", push_to_hub=True)
    weights = {name: t for name, t in model.state_dict().items() if ".2.inserted.norm." not in name}
    model.save_pretrained(tmp_path / "four", state_dict=weights)
    with pytest.raises(ValueError, match=r"without model.layers.2.inserted.norm.weight and 0 more"):
        load_retrofitted(tmp_path / "four")
    original().save_pretrained(tmp_path / "five")
    with pytest.raises(ValueError, match="expected one to which a retrofitted model was saved"):
        load_retrofitted(tmp_path / "five")


def test_half_precision_and_checkpointing() -> None:
    model = retrofitted().to(torch.bfloat16)
    with torch.no_grad():
        session = SleepSession(model, L, passes=2).ingest(tokens(2, 2 * L))
        assert session.read(tokens(2, 3)).dtype == torch.bfloat16
        assert session.memory.fast()[1].state.dtype == torch.float32
    model, weight = retrofitted(), "model.layers.1.inserted.mixer.qkv.weight"

    def gradient(checkpoint: bool) -> Tensor:
        options = {"checkpoint": checkpoint, "differentiable": True}
        slept = SleepSession(model, L, passes=2, **options).ingest(tokens(2, 2 * L))
        return torch.autograd.grad(slept.read(tokens(2, 3)).square().sum(), model.get_parameter(weight))[0]

    assert relative_error(gradient(True), gradient(False)) < CLOSE and float(gradient(False).abs().max()) > 0
    model.train().gradient_checkpointing_enable()
    with pytest.raises(ValueError, match="gradient checkpointing"):
        gradient(True)


@pytest.mark.parametrize(
    ("layers", "message"),
    [
        ("12", "layers: got '12'; expected numbers of the 4 blocks"),
        ([1.5], r"layers: got \[1.5\]"),
        (True, "layers: got True"),
        (None, "layers: got None"),
        ([4], r"layers: got \[4\]; expected numbers of the 4 blocks"),
        ([], "layers: got none"),
        ([-1], r"got \[-1\]"),
    ],
)
def test_wrong_layers(layers: Any, message: str) -> None:
    with pytest.raises((TypeError, ValueError), match=message):
        retrofit(original(), layers=layers)


def test_wrong_heads_and_one_layer() -> None:
    plain = original()
    with pytest.raises(ValueError, match="heads: got 7; expected a divisor of width = 32, or key_width"):
        retrofit(plain, layers=[1, 2], heads=7)
    assert list(inserted_in(plain.model.layers)) == []
    assert list(inserted_in(retrofit(plain, layers=1, heads=7, key_width=4).model.layers)) == [1]


def test_wrong_models() -> None:
    with pytest.raises(ValueError, match=r"layers: got \[1\], which have mixers already"):
        retrofit(retrofitted(), layers=[1, 3])
    with pytest.raises(ValueError, match="model: got a Linear without layers"):
        retrofit(nn.Linear(2, 2), layers=[0])
    with pytest.raises(ValueError, match="model: got a LlamaForCausalLM; expected one with layers"):
        SleepSession(original(), L)
    sliding = build("qwen3", use_sliding_window=True, sliding_window=8, layer_types=["sliding_attention"] * 4)
    with pytest.raises(ValueError, match="cache: got a layer DynamicSlidingWindowLayer"):
        SleepSession(retrofit(sliding, layers=[1]), L)
