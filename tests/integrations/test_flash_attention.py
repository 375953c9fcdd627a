"""Patched hybrid models with transformers' attention by flash-attn, for which a stand-in computes what it documents.

transformers chooses the function (rows of one length, packed, padded, sliding), masks and positions; the kernels of
sleepkern run beside it. Windows of a session, packed sequences and padding have to come out as with its default
attention.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from helpers.flash_attn_stand_in import Calls, install
from helpers.hf_models import FAMILIES, build, tokens
from torch import Tensor, nn
from transformers import modeling_flash_attention_utils as flash_utils
from transformers.integrations import flash_attention as flash_integration

from sleepkern.integrations.transformers import patch, unpatch
from sleepkern.sleep import SleepSession
from sleepkern.testing import relative_error

CLOSE = 4e-2
"""bfloat16 logits of four layers whose attention sums in another order."""
LENGTHS = (5, 9, 1, 7)
OFFSETS = torch.tensor([0, *LENGTHS]).cumsum(0).int()
_WITH_ATTENTION = ("qwen3_next", "qwen3_5", "olmo_hybrid", "bamba", "falcon_h1", "nemotron_h", "lara_mini")
HAVE = tuple(x for x in _WITH_ATTENTION if x in FAMILIES)
VERSIONS = [2, 4] if hasattr(flash_utils, "is_flash_attn_4_available") else [2]


@pytest.fixture(autouse=True)
def _start_and_end_unpatched() -> Iterator[None]:
    unpatch()
    yield
    unpatch()


def flash(monkeypatch: pytest.MonkeyPatch, model: nn.Module, version: int) -> Calls:
    """The model with attention by the stand-in of flash-attn 2 or 4, as set_attn_implementation sets it on a GPU."""
    for known in (2, 3, 4):
        name = f"is_flash_attn_{known}_available"
        if hasattr(flash_utils, name):
            monkeypatch.setattr(flash_utils, name, lambda *a, here=known == version, **k: here)
    for name in ("_loaded_implementation", "_flash_fn", "_flash_varlen_fn"):
        if hasattr(flash_utils, name):
            monkeypatch.setattr(flash_utils, name, None)
    monkeypatch.setattr(flash_integration, "_use_top_left_mask", False)
    config: Any = model.config
    config._attn_implementation = f"flash_attention_{version}"
    return install(monkeypatch, version)


@torch.no_grad()
@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("family", HAVE)
def test_rows_packed_and_padded(monkeypatch: pytest.MonkeyPatch, family: str, version: int) -> None:
    """Whole rows; packed sequences that the collators name; a row padded on its left."""
    model, ids = build(family).bfloat16(), tokens(2, 22)
    mask = torch.ones_like(ids)
    mask[1, :6] = 0
    names: dict[str, Any] = {"cu_seq_lens_q": OFFSETS, "cu_seq_lens_k": OFFSETS, "max_length_q": 9, "max_length_k": 9}
    positions = torch.cat([torch.arange(n) for n in LENGTHS])[None]

    def answers() -> list[Tensor]:
        whole = model(ids, use_cache=False).logits
        padded = model(ids, attention_mask=mask, use_cache=False).logits
        packed = model(ids[:1], position_ids=positions, use_cache=False, **names).logits
        return [whole, padded[0], padded[1, 6:], packed]

    with patch(family):
        expected = answers()
        calls = flash(monkeypatch, model, version)
        got = answers()
    made = {name for name, _, _ in calls.made}
    assert made == {f"flash-attn {version}", f"flash-attn {version} packed"}
    errors = [relative_error(a.float(), b.float()) for a, b in zip(got, expected, strict=True)]
    assert max(errors) < CLOSE, errors


@torch.no_grad()
@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("eviction", ["hard", "sliding"])
def test_sessions(monkeypatch: pytest.MonkeyPatch, version: int, eviction: Any) -> None:
    """A session's windows go on from kept keys, padded rows too, and `explain` names the attention."""
    model, ids = build(HAVE[0]).bfloat16(), tokens(2, 40)
    mask = torch.ones_like(ids)
    mask[1, :5] = 0

    def answers() -> list[Tensor]:
        session = SleepSession(model, 16, passes=2, eviction=eviction).ingest(ids)
        padded = SleepSession(model, 16, passes=2, eviction=eviction).ingest(ids, mask)
        return [session.read(ids[:, :7]), padded.read(ids[:, :7])]

    with patch(model):
        expected = answers()
        calls = flash(monkeypatch, model, version)
        got = answers()
        told = SleepSession(model, 16).explain()
    assert f"attention: transformers' flash_attention_{version}" in told
    assert len({name for name, _, _ in calls.made}) == 2
    assert eviction == "hard" or any(T != S for _, T, S in calls.made)
    errors = [relative_error(a.float(), b.float()) for a, b in zip(got, expected, strict=True)]
    assert max(errors) < CLOSE, errors


@torch.no_grad()
def test_generate(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tokens after a slept text, one at a time through the cache, are those of eager attention in logits."""
    model, ids = build(HAVE[0]).bfloat16(), tokens(1, 36)
    with patch(model):
        flash(monkeypatch, model, 2)
        session = SleepSession(model, 16, passes=2, eviction="sliding").ingest(ids)
        out = session.generate(ids[:, :3], max_new_tokens=5)
        manual = ids[:, :3]
        for _ in range(5):
            manual = torch.cat([manual, session.read(manual)[:, -1:].argmax(-1)], dim=1)
    assert out.shape == (1, 8) and torch.equal(out[:, :4], manual[:, :4])
