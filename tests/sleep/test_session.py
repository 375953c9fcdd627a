"""Sleep over models of transformers: against one masked forward, and against loops written out here."""

from __future__ import annotations

import resource
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.hf_models import CLOSE, build, cached, tokens
from helpers.sleep_models import sleep_lm
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer, LinearAttentionLayer

from sleepkern.cli.demo.sleeping import run_sleep
from sleepkern.integrations.transformers import patch
from sleepkern.sleep import SleepSession
from sleepkern.testing import relative_error
from sleepkern.testing.tolerances import BLOCK_GRADIENTS, MATTERS

FAMILIES = ("qwen3_next", "qwen3_5", "qwen3_5_moe", "olmo_hybrid", "kimi_linear", "bailing_hybrid")
L = 24


@pytest.fixture(autouse=True)
def _kernels():
    with patch(*FAMILIES):
        yield


@pytest.fixture(scope="module")
def model() -> nn.Module:
    return build("qwen3_next")


def masked(model: nn.Module, ids: Tensor, seen: int) -> tuple[Tensor, Any]:
    """Logits and cache of one forward in which a token attends to its window and `seen` windows before."""
    t = torch.arange(ids.shape[1])
    ahead = t[:, None] // L - t // L
    allowed = (ahead >= 0) & (ahead <= seen) & (t[:, None] >= t)
    bias = torch.zeros(1, 1, len(t), len(t)).masked_fill(~allowed, torch.finfo(torch.float32).min)
    cache = DynamicCache(config=model.config)
    masks = {"full_attention": bias, "linear_attention": None}
    return model(ids, attention_mask=masks, **cached(model, cache), use_cache=True).logits, cache


@torch.no_grad()
@pytest.mark.parametrize("eviction", ["hard", "sliding"])
@pytest.mark.parametrize("family", FAMILIES)
def test_one_pass_is_one_forward_with_a_mask(family: str, eviction: str) -> None:
    model, ids = build(family), tokens(2, 3 * L)
    expected, cache = masked(model, ids, seen=int(eviction == "sliding"))
    session = SleepSession(model, L, eviction=eviction)
    logits = []
    for window in ids.split(L, dim=1):
        logits.append(session.read(window))
        session.ingest(window)
    assert relative_error(torch.cat(logits, dim=1), expected) < CLOSE
    states = {i: x.recurrent_states[0] for i, x in enumerate(cache.layers) if isinstance(x, LinearAttentionLayer)}
    found = session.memory.fast()
    assert found.keys() == states.keys() and len(states) == 3
    assert max(relative_error(found[i].state, states[i]) for i in states) < CLOSE
    assert (session.memory.slow() == {}) == (eviction == "hard")
    wrong, _ = masked(model, ids, seen=2)
    assert relative_error(wrong, expected) > MATTERS  # what was evicted matters


@torch.no_grad()
def looped(
    model: nn.Module, ids: Tensor, passes: int, low: int, high: int, carry: bool = False, reinject: bool = False
) -> tuple[list[Tensor], Tensor]:
    """States after each window, and what the last block leaves of the last: written out, a cache for every pass."""
    base, states, convs = model.model, {}, {}
    for window in range(ids.shape[1] // L):
        part = slice(window * L, (window + 1) * L)
        h, positions = base.embed_tokens(ids[:, part]), torch.arange(part.start, part.stop)[None]
        rotary = base.rotary_emb(h, positions) if hasattr(base, "rotary_emb") else None
        bias = torch.full((L, L), torch.finfo(h.dtype).min).triu(1)[None, None]
        first_convs = dict(convs)

        def run(i: int, h: Tensor, rotary=rotary, bias=bias, positions=positions) -> Tensor:
            cache, layer = DynamicCache(config=model.config), base.layers[i]
            mine = cache.layers[i]
            if i in states:
                mine.update_conv_state(convs[i])
                mine.update_recurrent_state(states[i])
            attends = type(mine) is DynamicLayer
            options = {} if rotary is None else {"position_embeddings": rotary}
            out: Tensor = layer(
                h, attention_mask=bias if attends else None, position_ids=positions, **cached(layer, cache),
                use_cache=True, **options,
            )  # fmt: skip
            if not attends:
                convs[i], states[i] = mine.conv_states[0].clone(), mine.recurrent_states[0].clone()
            return out

        for i in range(low):
            h = run(i, h)
        start = h
        for n in range(passes):
            if n > 0 and not carry:
                for i in range(low, high):
                    if i in convs:
                        convs[i] = first_convs.get(i, torch.zeros_like(convs[i]))
            if n > 0 and reinject:
                h = h / (h.square().mean(-1, keepdim=True) + torch.finfo(h.dtype).eps).sqrt() + start
            for i in range(low, high):
                h = run(i, h)
        for i in range(high, len(base.layers)):
            h = run(i, h)
    return [states[i] for i in sorted(states)], h


@pytest.mark.parametrize("family", FAMILIES)
def test_three_passes_are_a_loop(family: str) -> None:
    model, ids = build(family), tokens(2, 2 * L)
    expected, _ = looped(model, ids, 3, 0, 4)
    with torch.no_grad():
        session = SleepSession(model, L, passes=3).ingest(ids)
    found = [x.state for _, x in sorted(session.memory.fast().items())]
    assert max(map(relative_error, found, expected)) < CLOSE
    once, _ = looped(model, ids, 1, 0, 4)
    assert min(map(relative_error, once, expected)) > 0.01  # passes matter


@pytest.mark.parametrize(
    "options", [{"conv_state": "carry"}, {"feedback": "reinject"}, {"blocks": slice(1, 3)}], ids=str
)
def test_options_of_a_pass(model: nn.Module, options: dict[str, Any]) -> None:
    ids, blocks = tokens(2, 2 * L), options.get("blocks", slice(0, 4))
    carry, reinject = "conv_state" in options, "feedback" in options
    expected, _ = looped(model, ids, 3, blocks.start, blocks.stop, carry, reinject)
    plain, _ = looped(model, ids, 3, 0, 4)
    with torch.no_grad():
        session = SleepSession(model, L, passes=3, **options).ingest(ids)
    found = [x.state for _, x in sorted(session.memory.fast().items())]
    assert max(map(relative_error, found, expected)) < CLOSE
    assert max(map(relative_error, found, plain)) > MATTERS


@torch.no_grad()
def test_text_may_come_in_any_pieces(model: nn.Module) -> None:
    ids, question = tokens(2, 70), tokens(2, 5, seed=4)
    at_once = SleepSession(model, L, passes=2).ingest(ids)
    session = SleepSession(model, L, passes=2)
    for piece in ids.split([1, 30, 2, 37], dim=1):
        session.ingest(piece)
    assert [r.first for r in session.reports] == [0, L] and session.pending.shape[1] == 70 - 2 * L
    assert relative_error(session.read(question), at_once.read(question)) < CLOSE
    asleep = session.fork().sleep()
    assert asleep.position == 70 and asleep.pending is None and asleep.reports[-1].tokens == 22
    assert session.position == 2 * L  # a fork goes on alone
    assert relative_error(asleep.read(question), session.read(question)) > MATTERS


@torch.no_grad()
@pytest.mark.parametrize("eviction", ["hard", "sliding"])
def test_generates_what_reading_says(model: nn.Module, eviction: str) -> None:
    """Greedy, token by token through read; and asking leaves the session as it was."""
    session = SleepSession(model, L, passes=2, eviction=eviction).ingest(tokens(2, 60))
    question = tokens(2, 5, seed=4)
    before = {name: t.clone() for name, t in session.state_dict().items()}
    answer = session.generate(question, max_new_tokens=6, do_sample=False)
    manual = question
    for _ in range(6):
        manual = torch.cat([manual, session.read(manual)[:, -1:].argmax(-1)], dim=1)
    assert torch.equal(answer, manual)
    after = session.state_dict()
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)
    forgetful = SleepSession(model, L).generate(question, max_new_tokens=6, do_sample=False)
    assert not torch.equal(forgetful, answer)


@torch.no_grad()
@pytest.mark.parametrize("eviction", ["hard", "sliding"])
def test_to_disk_and_back(model: nn.Module, eviction: str, tmp_path: Path) -> None:
    session, more = SleepSession(model, L, passes=2, eviction=eviction).ingest(tokens(2, 60)), tokens(2, 40, seed=5)
    save_file(session.state_dict(), tmp_path / "session.safetensors")
    other = SleepSession(model, L, passes=2, eviction=eviction)
    other.load_state_dict(load_file(tmp_path / "session.safetensors"))
    first, second = session.ingest(more).state_dict(), other.ingest(more).state_dict()
    assert first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


@torch.no_grad()
@pytest.mark.parametrize("eviction", ["hard", "sliding"])
def test_left_padded_batch(model: nn.Module, eviction: str) -> None:
    """A row behind a window of padding ends as alone; so does the row beside it."""
    text, other, question = tokens(1, 60), tokens(1, 60 + L, seed=7), tokens(1, 5, seed=4)
    batch = torch.cat([torch.cat([torch.zeros(1, L, dtype=torch.long), text], dim=1), other])
    mask = torch.ones_like(batch)
    mask[0, :L] = 0
    session = SleepSession(model, L, passes=2, eviction=eviction).ingest(batch, attention_mask=mask)
    for row, alone in enumerate((text, other)):
        expected = SleepSession(model, L, passes=2, eviction=eviction).ingest(alone)
        expected = expected.read(question)
        assert relative_error(session.read(question.expand(2, -1))[row], expected[0]) < CLOSE


@torch.no_grad()
@pytest.mark.parametrize("eviction", ["hard", "sliding"])
def test_padding_within_a_window(model: nn.Module, eviction: str) -> None:
    """One pass over a row padded by less than a window is a forward of the padded row with the masks of its windows."""
    ids, question = tokens(1, 2 * L), tokens(1, L, seed=4)
    mask = torch.ones_like(ids)
    mask[:, :7] = 0
    session = SleepSession(model, L, eviction=eviction).ingest(ids, attention_mask=mask)
    full = torch.cat([ids, question], dim=1)
    t = torch.arange(3 * L)
    ahead = t[:, None] // L - t // L
    allowed = (ahead >= 0) & (ahead <= int(eviction == "sliding")) & (t[:, None] >= t) & (t >= 7)
    bias = torch.zeros(1, 1, 3 * L, 3 * L).masked_fill(~allowed, torch.finfo(torch.float32).min)
    linear = torch.cat([mask, torch.ones_like(question)], dim=1)
    expected = model(full, attention_mask={"full_attention": bias, "linear_attention": linear}, use_cache=False).logits
    assert relative_error(session.read(question), expected[:, -L:]) < CLOSE


@pytest.mark.parametrize("blocks", [None, slice(1, 3)])
def test_gradients_through_passes(blocks: slice | None) -> None:
    """In float64 against differences (norms inside are float32); by the kernels in float32 against that."""
    model, ids = build("qwen3_5"), tokens(1, 2 * L)
    name = "model.layers.1.linear_attn.in_proj_qkv.weight"

    def loss(checkpoint: bool = False) -> Tensor:
        options = {"checkpoint": checkpoint, "differentiable": True}
        session = SleepSession(model, L, passes=3, blocks=blocks, **options).ingest(ids)
        return torch.stack([x.state.square().sum() for x in session.memory.fast().values()]).sum()

    found = [torch.autograd.grad(loss(c), model.get_parameter(name))[0] for c in (False, True)]
    weight = model.double().get_parameter(name)
    (exact,) = torch.autograd.grad(loss(), weight)
    direction = exact / exact.norm()
    with torch.no_grad():
        values, step = [], 1e-3
        for sign in (1, -1):
            weight += sign * step * direction
            values.append(float(loss()))
            weight -= sign * step * direction
    assert float(exact.norm()) == pytest.approx((values[0] - values[1]) / (2 * step), rel=1e-3)
    assert max(relative_error(g, exact) for g in found) < BLOCK_GRADIENTS


def test_memory_does_not_grow_with_the_text() -> None:
    """As one writes it: parameters want gradients, and nothing says that there are none to come."""
    model = build("qwen3_next", num_hidden_layers=4)
    session = SleepSession(model, window=2000)
    sizes, resident = [], []
    for _ in range(8):
        session.ingest(torch.randint(1, 64, (1, 6_000)))
        sizes.append(sum(t.numel() for t in session.state_dict().values()))
        resident.append(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
    assert session.position == 48_000 and len(set(sizes)) == 1
    assert resident[-1] - resident[3] < 20 << 10  # KiB


@pytest.mark.parametrize("name", ["qwen3_next", "SleepLM"])
def test_reading_keeps_no_graph(name: str) -> None:
    """As one writes it, with parameters that want gradients; a session that is differentiable keeps it."""
    model = build(name) if name == "qwen3_next" else sleep_lm()
    for options in ({}, {"eviction": "sliding"}, {"differentiable": True}, {"checkpoint": True}):
        session = SleepSession(model, 8, passes=2, **options).ingest(tokens(1, 2 * 8 + 3))
        kept = [t for of in (session.memory.fast(), session.memory.slow()) for pair in of.values() for t in pair]
        wanted = "eviction" not in options and bool(options)
        assert any(t.requires_grad for t in kept) == wanted
        assert session.read(tokens(1, 3)).requires_grad == session.sleep().read(tokens(1, 3)).requires_grad == wanted
    assert all(p.requires_grad for p in model.parameters()) and torch.is_grad_enabled()


@torch.no_grad()
def test_reading_nothing(model: nn.Module) -> None:
    """Not the logits of what waits."""
    for length in (0, 60):
        session = SleepSession(model, L, passes=2, eviction="sliding").ingest(tokens(2, length))
        assert session.read(tokens(2, 0)).shape == (2, 0, 64)


@pytest.mark.parametrize(
    "options", [{"num_beams": 3}, {"num_beams": 3, "num_return_sequences": 2}, {"num_return_sequences": 2}], ids=str
)
@pytest.mark.parametrize("family", ["qwen3_next", "bamba"])
def test_beams_are_those_of_the_model(family: str, options: dict[str, Any]) -> None:
    """One pass, sliding, over a window that the next sees all of, is the model's own reading; 5 tokens wait."""
    model, ids = build(family), tokens(2, L + 10)
    options = {**options, "max_new_tokens": 6, "do_sample": "num_beams" not in options}
    session = SleepSession(model, L, eviction="sliding").ingest(ids[:, : L + 5])
    torch.manual_seed(3)
    expected = model.generate(ids, **options)[:, L + 5 :]
    torch.manual_seed(3)
    assert torch.equal(session.generate(ids[:, L + 5 :], **options), expected)
    torch.manual_seed(3)
    made = session.generate(ids[:, L + 5 :], **options, return_dict_in_generate=True, output_scores=True)
    assert torch.equal(made.sequences, expected) and len(made.scores) == 6
    model.generation_config.update(**options)
    torch.manual_seed(3)
    assert torch.equal(session.generate(ids[:, L + 5 :]), expected)


class Stopped(BaseException):
    """Like Ctrl-C."""


@torch.no_grad()
@pytest.mark.parametrize("eviction", ["hard", "sliding"])
@pytest.mark.parametrize("family", ["qwen3_next", "bamba"])
@pytest.mark.parametrize("window", [0, 1])
def test_a_sleep_that_fails_did_not_happen(family: str, eviction: str, window: int) -> None:
    """In its second pass of three, in the first window or the second; what goes on after is as if it never had."""
    model, ids, calls = build(family), tokens(2, 4 * L + 3), [0]
    mask = torch.ones_like(ids)
    mask[0, :7] = 0
    options: dict[str, Any] = {"passes": 3, "eviction": eviction}
    session = SleepSession(model, L, **options).ingest(ids[:, : L + 5], mask[:, : L + 5])
    expected = session.fork().ingest(ids[:, L + 5 :], mask[:, L + 5 :])
    before = {name: t.clone() for name, t in session.state_dict().items()}

    def stop(module: nn.Module, args: Any) -> None:
        calls[0] += 1
        if calls[0] == 3 * window + 2:
            raise Stopped

    hook = model.model.layers[2].register_forward_pre_hook(stop)
    with pytest.raises(Stopped):
        session.ingest(ids[:, L + 5 :], mask[:, L + 5 :])
    hook.remove()
    after = session.state_dict()
    assert session.position == (1 + window) * L == session.reports[-1].first + L
    if window == 0:
        assert before.keys() == after.keys() and all(torch.equal(after[name], t) for name, t in before.items())
        session.ingest(ids[:, L + 5 :], mask[:, L + 5 :])
    else:
        assert torch.equal(after["waiting"], ids[:, 2 * L :])
        asleep = session.fork().sleep()  # in windows still
        assert [r.tokens for r in asleep.reports[2:]] == [L, L, 3] and asleep.pending is None
        session.ingest(ids[:, :0])
    found, right = session.state_dict(), expected.state_dict()
    assert found.keys() == right.keys() and all(torch.equal(found[name], t) for name, t in right.items())


@torch.no_grad()
def test_what_waits_is_kept_alone(model: nn.Module) -> None:
    """Not the whole text, which may change."""
    ids, mask = tokens(1, 40 * L + 5), torch.ones(1, 40 * L + 5, dtype=torch.long)
    mask[:, :3] = 0
    for text, padding in ((ids, mask), (ids[:, :5], mask[:, :5])):
        session = SleepSession(model, L, eviction="sliding").ingest(text, padding)
        state = session.state_dict()
        sizes = {name: t.untyped_storage().nbytes() // t.element_size() for name, t in state.items() if "_" in name}
        assert sizes.pop("kept_mask", L) == L and sizes == {"waiting_mask": 5}
        assert state["waiting"].untyped_storage().nbytes() == 5 * 8
        waiting = session.pending.clone()
        text.zero_()
        assert torch.equal(session.pending, waiting)


def test_sleep_of_the_demo() -> None:
    lines: list[str] = []
    result = run_sleep(b"words", lines.append, tokens=96, window=32)
    assert [row["passes"] for row in result["rows"]] == [1, 2, 4] and lines
    for row in result["rows"]:
        assert row["tokens_per_second"] > 0 and len(set(row["memory_bytes"])) == 1 and row["overhead"] > -1
    assert result["kept_bytes"] == 96 * 2 * 256 * 4
    with pytest.raises(ValueError, match="text: got 0 bytes"):
        run_sleep(b"")
