"""A store of prefixes: what it gives is what the model would have read, and a request disturbs no other."""

from __future__ import annotations

import threading
from array import array
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from helpers.hf_models import CLOSE, build, cached, tokens
from torch import Tensor, nn

from sleepkern.integrations.transformers import RollbackCache, patch
from sleepkern.sleep import PrefixCache, prefix_cache
from sleepkern.testing import relative_error

pytestmark = pytest.mark.since("5.20")
MANY = 2**30


@pytest.fixture(scope="module")
def model() -> Iterator[nn.Module]:
    model = build("qwen3_next")
    with patch(model):
        yield model


@torch.no_grad()
def logits(model: nn.Module, ids: Tensor, cache: Any = None, first: int = 0) -> Tensor:
    """Logits of the tokens from `first` on, those before which are in the cache."""
    at = {} if "Mamba2" in type(model).__name__ else {"position_ids": torch.arange(first, ids.shape[1])[None]}
    out: Tensor = model(ids[:, first:], **cached(model, cache), **at, use_cache=cache is not None).logits
    return out


def filled(model: nn.Module, *texts: Tensor, every: int = 16, max_bytes: int = MANY) -> PrefixCache:
    """A store that has seen these texts."""
    prefixes = PrefixCache(model, max_bytes, every)
    for ids in texts:
        cache, known = prefixes.lookup(ids)
        logits(model, ids, cache, known)
        prefixes.insert(ids, cache)
    return prefixes


def branch(ids: Tensor, first: int, seed: int) -> Tensor:
    """The same text with other tokens from `first` on."""
    return torch.cat([ids[:, :first], tokens(1, ids.shape[1] - first, seed)], dim=1)


@pytest.mark.parametrize("family", ["qwen3_next", "kimi_linear", "bamba", "falcon_h1", "mamba2"])
def test_a_hit_goes_on_as_if_the_text_was_read(family: str) -> None:
    model, ids = build(family), tokens(1, 70)
    with patch(model):
        prefixes = filled(model, ids)
        assert len(prefixes) == 4
        for other, length in ((ids, 64), (branch(ids, 50, 7), 48), (branch(ids, 16, 8), 16), (ids[:, :48], 32)):
            for _ in range(2):  # the second time after the first has written to what it was given
                cache, known = prefixes.lookup(other)
                assert known == length == cache.get_seq_length()
                steps = [logits(model, other[:, : known + 1], cache, known), logits(model, other, cache, known + 1)]
                assert relative_error(torch.cat(steps, dim=1), logits(model, other)[:, known:]) < CLOSE
        assert prefixes.lookup(branch(ids, 15, 9)).length == 0
        assert prefixes.lookup(ids[:, :3]).length == 0


def test_generated_text_and_branches_are_known_too(model: nn.Module) -> None:
    ids, options = tokens(1, 40), {"max_new_tokens": 30, "do_sample": False}
    expected = model.generate(ids, **options)
    prefixes = PrefixCache(model, MANY, 16)
    for known_before in (0, 32):
        cache, known = prefixes.lookup(ids)
        assert known == known_before
        out = model.generate(ids, past_key_values=cache, **options)
        assert torch.equal(out, expected)
        prefixes.insert(out, cache)
    assert len(prefixes) == 4 and prefixes.lookup(expected).length == 64
    with pytest.raises(ValueError, match="got a cache of 64 tokens and positions from 0; expected later ones"):
        model.generate(expected, past_key_values=prefixes.lookup(expected).cache, prompt_lookup_num_tokens=4, **options)


def test_tokens_that_were_taken_back_are_not_stored(model: nn.Module) -> None:
    ids = tokens(1, 40)
    prefixes = PrefixCache(model, MANY, 16)
    cache, _ = prefixes.lookup(ids)
    logits(model, branch(ids, 30, 3), cache)
    cache.crop(-10)
    logits(model, ids, cache, 30)
    prefixes.insert(ids, cache)
    hit = prefixes.lookup(ids)
    assert hit.length == 32
    assert relative_error(logits(model, ids, hit.cache, 32), logits(model, ids)[:, 32:]) < CLOSE


def test_the_least_recently_used_goes_first(model: nn.Module) -> None:
    texts = [tokens(1, 33, seed) for seed in range(4)]
    one = filled(model, texts[0], every=32).bytes
    prefixes = filled(model, *texts[:3], every=32, max_bytes=3 * one)
    assert len(prefixes) == 3 and prefixes.bytes == 3 * one
    prefixes.lookup(texts[0])
    cache, _ = prefixes.lookup(texts[3])
    logits(model, texts[3], cache)
    prefixes.insert(texts[3], cache)
    assert [prefixes.lookup(x).length for x in texts] == [32, 0, 32, 32]
    assert prefixes.bytes == 3 * one and "3 prefixes" in repr(prefixes)
    held = [t for node in prefixes._used.values() for pair in node.keys_values for t in pair]
    held += [t for node in prefixes._used.values() for s in node.snapshots or [] for t in s[1:]]
    assert 0 <= prefixes.bytes - sum(t.untyped_storage().nbytes() for t in held) <= 3 * 32 * 8  # and no more is held
    prefixes.clear()
    assert prefixes.bytes == len(prefixes) == 0
    assert len(filled(model, texts[0], every=32, max_bytes=1)) == 0


def test_inner_states_go_and_the_keys_stay_for_longer_prefixes(model: nn.Module) -> None:
    ids = tokens(1, 33)
    prefixes = filled(model, ids, every=16)
    prefixes.max_bytes = prefixes.bytes - 1
    logits(model, ids[:, :20], cache := prefixes.lookup(ids[:, :4]).cache)
    prefixes.insert(ids[:, :20], cache)
    assert prefixes.lookup(ids[:, :20]).length == 0 and prefixes.lookup(ids).length == 32


def test_threads_share_one(model: nn.Module) -> None:
    ids = tokens(1, 64)
    texts = [branch(ids, 8 * (i % 6) + 10, seed=i) for i in range(8)]
    expected = [model.generate(x, max_new_tokens=6, do_sample=False) for x in texts]
    prefixes = PrefixCache(model, 3 * filled(model, ids).bytes, 16)
    wrong: list[int] = []

    def serve(first: int) -> None:
        for i in range(first, first + 4):
            cache, _ = prefixes.lookup(texts[i % 8])
            out = model.generate(texts[i % 8], past_key_values=cache, max_new_tokens=6, do_sample=False)
            prefixes.insert(out, cache)
            if not torch.equal(out, expected[i % 8]):
                wrong.append(i)

    threads = [threading.Thread(target=serve, args=(2 * i,)) for i in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong and 0 < prefixes.bytes <= prefixes.max_bytes


# ---------------------------------------------------------------- planted faults and bad input


class _Blind(array):  # type: ignore[type-arg]
    """Tokens whose blocks are known by all but their last eight tokens."""

    def __getitem__(self, at: Any) -> Any:
        return _Blind("q", super().__getitem__(at)) if isinstance(at, slice) else super().__getitem__(at)

    def tobytes(self) -> bytes:
        return super().tobytes()[:-64]


def test_a_store_that_ignores_the_last_tokens_of_a_block_is_found(
    model: nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    read = prefix_cache._tokens
    monkeypatch.setattr(prefix_cache, "_tokens", lambda ids: _Blind("q", read(ids)))
    ids = tokens(1, 70)
    cache, known = filled(model, ids).lookup(other := branch(ids, 60, 7))
    assert known == 64  # where 48 is right
    assert relative_error(logits(model, other, cache, known), logits(model, other)[:, known:]) > 100 * CLOSE


def test_a_store_that_hands_its_states_out_is_found(model: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sleepkern.integrations.transformers.rollback_layers.RollbackLayer.own", lambda self: None)
    ids = tokens(1, 40)
    prefixes = filled(model, ids)
    cache, known = prefixes.lookup(ids)
    logits(model, branch(ids, known, 3)[:, : known + 1], cache, known)
    cache, known = prefixes.lookup(ids)
    assert relative_error(logits(model, ids, cache, known), logits(model, ids)[:, known:]) > 100 * CLOSE


def test_bad_input_is_named(model: nn.Module) -> None:
    prefixes, ids = PrefixCache(model, MANY, 16), tokens(1, 20)
    for wrong, error, text in (
        (ids.float(), TypeError, r"^ids: got torch.float32; expected integers"),
        (ids.repeat(2, 1), ValueError, r"^ids: got shape \[2, 20\]; expected \[T\] or \[1,T\]"),
        ("text", TypeError, r"^ids: got a str; expected integers"),
        ([1, 2.0], TypeError, r"^ids: got a float among them; expected integers"),
        ([True], TypeError, r"^ids: got a bool among them; expected integers"),
    ):
        with pytest.raises(error, match=text):
            prefixes.lookup(wrong)
    cache, _ = prefixes.lookup(ids[0].tolist())
    logits(model, ids, cache)
    with pytest.raises(ValueError, match=r"^ids: got 19 tokens; expected at least the 20 that the cache has read"):
        prefixes.insert(ids[:, :19], cache)
    for other in (RollbackCache(model), RollbackCache(build_patched(), every=16), None):
        with pytest.raises(ValueError, match=r"^cache: got a .* expected one that lookup of this PrefixCache gave"):
            prefixes.insert(ids, other)  # type: ignore[arg-type]
    for options, error in (({"max_bytes": 0}, ValueError), ({"every": 0}, ValueError), ({"every": 1.5}, TypeError)):
        with pytest.raises(error, match=f"^{next(iter(options))}: got"):
            PrefixCache(model, **{"max_bytes": 1, **options})  # type: ignore[arg-type]
    wide, _ = prefixes.lookup(ids)
    logits_of_two = torch.cat([ids, ids])
    model(logits_of_two, past_key_values=wide, use_cache=True)
    with pytest.raises(ValueError, match=r"^cache: got 2 rows; expected one request"):
        prefixes.insert(ids, wide)


def build_patched() -> nn.Module:
    """Another model of a family that is patched."""
    return build("qwen3_next")


@pytest.mark.since("5.23")
def test_models_that_cannot_be_divided_are_refused() -> None:
    with pytest.raises(ValueError, match=r"^model: got a BambaForCausalLM that is not patched"):
        PrefixCache(build("bamba"), MANY)
    model = build("glm5_next")
    with patch(model), pytest.raises(ValueError, match=r"^model: got a cache layer .*; expected layers with keys"):
        PrefixCache(model, MANY)
