"""Sessions that go back to positions that they keep, forks of them, and fast weights of bfloat16."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers.hf_models import build, tokens
from helpers.sleep_models import sleep_lm
from torch import Tensor

from sleepkern.integrations.transformers import patch
from sleepkern.sleep import SleepSession
from sleepkern.testing import relative_error
from sleepkern.testing.tolerances import MATTERS

L = 16
MODELS: dict[str, Any] = {"SleepLM": sleep_lm, "qwen3_next": lambda: build("qwen3_next")}
TEXT, OTHER, QUESTION = tokens(2, 6 * L + 5), tokens(2, 3 * L, seed=8), tokens(2, 5, seed=4)


@pytest.fixture(autouse=True)
def _kernels() -> Any:
    with patch("qwen3_next"):
        yield


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("eviction", ["hard", "sliding"])
@pytest.mark.parametrize("name", MODELS)
def test_back_and_on_with_another_text(name: str, eviction: str) -> None:
    model = MODELS[name]()
    session = SleepSession(model, L, 2, eviction, keep_every=2 * L).ingest(TEXT)
    assert session.kept_positions == [0, 2 * L, 4 * L, 6 * L]
    fork, far = session.fork(), session.state_dict()
    expected = SleepSession(model, L, 2, eviction).ingest(TEXT[:, : 4 * L])
    assert session.rewind(4 * L) is session
    assert same(session.state_dict(), expected.state_dict()) and session.pending is None
    assert session.kept_positions == [0, 2 * L, 4 * L] and [r.first for r in session.reports] == [0, L, 2 * L, 3 * L]
    session.ingest(OTHER)
    assert same(session.state_dict(), expected.ingest(OTHER).state_dict())
    assert same(fork.state_dict(), far)  # a fork has its own positions, and its memory is not written to
    assert same(fork.rewind(6 * L).ingest(TEXT[:, 6 * L :]).state_dict(), far)
    assert same(session.rewind(0).ingest(TEXT).state_dict(), far)


def test_the_latest_positions_are_kept() -> None:
    session = SleepSession(sleep_lm(), L, keep_every=L, keep_last=2).ingest(TEXT)
    assert session.kept_positions == [5 * L, 6 * L]


def test_positions_between_windows() -> None:
    """A sleep over pending tokens ends between two windows; the positions that follow are kept where they are."""
    session = SleepSession(sleep_lm(), L, keep_every=2 * L).ingest(TEXT[:, : L + 3]).sleep().ingest(TEXT[:, : 2 * L])
    assert session.kept_positions == [0, 2 * L + 3]
    expected = SleepSession(sleep_lm(), L).ingest(TEXT[:, : L + 3]).sleep().ingest(TEXT[:, :L])
    assert same(session.rewind(2 * L + 3).state_dict(), expected.state_dict())


def test_a_loaded_session_keeps_where_it_begins() -> None:
    model = sleep_lm()
    session = SleepSession(model, L, keep_every=L)
    session.load_state_dict(SleepSession(model, L).ingest(TEXT[:, : 2 * L]).state_dict())
    assert session.ingest(OTHER[:, :L]).kept_positions == [2 * L, 3 * L]


@pytest.mark.parametrize(
    ("position", "message"),
    [(L, r"position: got 16; expected one that the session keeps: 0, 32, 64, 96"), (True, "position: got True")],
)
def test_positions_that_are_not_kept(position: Any, message: str) -> None:
    session = SleepSession(sleep_lm(), L, keep_every=2 * L).ingest(TEXT)
    before = session.state_dict()
    with pytest.raises((TypeError, ValueError), match=message):
        session.rewind(position)
    assert same(session.state_dict(), before)
    with pytest.raises(ValueError, match="expected one that the session keeps: none, for keep_every is not set"):
        SleepSession(sleep_lm(), L).rewind(0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"keep_every": L + 1}, "keep_every: got 17; expected a multiple of window = 16"),
        ({"keep_every": 0}, "keep_every: got 0; expected at least 1"),
        ({"keep_last": None}, "keep_last: got None; expected a whole number"),
        ({"state_dtype": torch.float16}, "state_dtype: got torch.float16; expected torch.float32, torch.bfloat16"),
    ],
)
def test_bad_settings(options: dict[str, Any], message: str) -> None:
    with pytest.raises((TypeError, ValueError), match=message):
        SleepSession(sleep_lm(), L, **options)


@pytest.mark.parametrize("name", MODELS)
def test_fast_weights_of_bfloat16(name: str) -> None:
    model = MODELS[name]()
    session = SleepSession(model, L, 2, state_dtype=torch.bfloat16, keep_every=2 * L).ingest(TEXT)
    exact = SleepSession(model, L, 2).ingest(TEXT)
    kept = [x.state for x in session.memory.fast().values()]
    assert {t.dtype for t in kept} == {torch.bfloat16}
    for a, b in zip(kept, (x.state for x in exact.memory.fast().values()), strict=True):
        assert relative_error(a, b) < 2e-2
    assert MATTERS**2 < relative_error(session.read(QUESTION), exact.read(QUESTION)) < 5e-2
    answer = session.generate(QUESTION, max_new_tokens=3, do_sample=False)
    assert answer.shape == (2, 8) and {x.state.dtype for x in session.memory.fast().values()} == {torch.bfloat16}
    other = SleepSession(model, L, 2, state_dtype=torch.bfloat16)
    other.load_state_dict(session.state_dict())
    assert same(other.ingest(OTHER).state_dict(), session.ingest(OTHER).state_dict())
    with pytest.raises(ValueError, match="expected torch.float32"):
        SleepSession(model, L, 2).load_state_dict(session.state_dict())
