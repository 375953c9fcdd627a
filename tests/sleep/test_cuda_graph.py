"""Captured sleeps, by a recorder that stands for CUDA's: what it replays knows nothing but tensors."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers.hf_models import build, retrofitted, tokens
from helpers.recorder import Recorder
from helpers.sleep_models import sleep_lm
from torch import Tensor, nn

from sleepkern.sleep import SleepSession
from sleepkern.sleep.cuda_graph import CudaRecorder, GraphCache
from sleepkern.testing import relative_error
from sleepkern.testing.tolerances import BLOCKS, MATTERS, SAME_SUMS, SESSION_STATES

L = 16


def captured(model: nn.Module, **options: Any) -> tuple[SleepSession, Recorder]:
    recorder, session = Recorder(), SleepSession(model, L, capture=True, **options)
    assert session.graph_cache is not None and isinstance(session.graph_cache.recorder, CudaRecorder)
    session.graph_cache = GraphCache(recorder)
    return session, recorder


MODELS = {"SleepLM": sleep_lm, "qwen3_next": lambda: build("qwen3_5"), "retrofit": lambda: retrofitted(decay_bias=1.0)}


@torch.no_grad()
@pytest.mark.parametrize("eviction", ["hard", "sliding"])
@pytest.mark.parametrize("made", MODELS.values(), ids=MODELS)
def test_replays_are_sleeps(made: Callable[[], nn.Module], eviction: str) -> None:
    """Other tokens, positions, states and kept keys than those recorded; texts end with what fills no window."""
    model, options = made(), {"passes": 3, "eviction": eviction, "blocks": slice(1, 3)}
    session, recorder = captured(model, **options)
    plain = SleepSession(model, L, **options)
    for seed, length in ((1, 5 * L), (2, 2 * L)):
        ids = tokens(2, length, seed)
        session.ingest(ids)
        plain.ingest(ids)
        expected, found = plain.state_dict(), session.state_dict()
        assert found.keys() == expected.keys() and session.position == plain.position
        assert max(relative_error(found[name], expected[name]) for name in expected if "." in name) < SESSION_STATES
    assert len(recorder.tapes) == 2  # the first window, which follows nothing, and all others
    for one, other in zip(session.reports, plain.reports, strict=True):
        assert (one.first, one.tokens) == (other.first, other.tokens) and one.changes.shape == (3,)
        assert relative_error(one.changes, other.changes) < BLOCKS
    question = tokens(2, 5, seed=4)
    assert relative_error(session.read(question), plain.read(question)) < BLOCKS
    state = session.state_dict()
    session.fork().ingest(tokens(2, L, seed=9))
    assert all(
        torch.equal(t, state[name]) for name, t in session.state_dict().items()
    )  # nothing shares a graph's memory


@torch.no_grad()
def test_the_stand_in_sees_what_a_graph_would_freeze(monkeypatch: pytest.MonkeyPatch) -> None:
    """A position out of Python, a state that goes past the buffers, and a wait for the device are all found."""
    model, ids = build("qwen3_5"), tokens(1, 5 * L)
    plain = SleepSession(model, L, passes=2, eviction="sliding").ingest(ids).state_dict()
    outside: list[SleepSession] = []

    def error(wrong: Callable[..., Any]) -> float:
        session, _ = captured(model, passes=2, eviction="sliding")
        right = SleepSession.pass_through
        outside.append(session)
        with monkeypatch.context() as patched:
            patched.setattr(SleepSession, "pass_through", lambda self, *given: wrong(self, right, *given))
            state = session.ingest(ids).state_dict()
        return max(relative_error(state[name], plain[name]) for name in plain if "." in name)

    assert error(lambda self, run, ids, mask, first: run(self, ids, mask, first)) < SAME_SUMS

    def position_of_python(self: SleepSession, run: Any, ids: Tensor, mask: Any, first: Any) -> Tensor:
        return run(self, ids, mask, self.position)

    def state_past_the_buffers(self: SleepSession, run: Any, ids: Tensor, mask: Any, first: Any) -> Tensor:
        self.memory.set_fast(outside[-1].memory.fast())
        return run(self, ids, mask, first)

    assert error(position_of_python) > MATTERS and error(state_past_the_buffers) > MATTERS
    with pytest.raises(AssertionError, match="waits for the device"):
        error(lambda self, run, ids, mask, first: run(self, ids, torch.ones_like(ids), first))


@torch.no_grad()
def test_weights_elsewhere_are_recorded_anew() -> None:
    """A graph reads them where they lay; what is written there is read without another recording."""
    model, ids = build("qwen3_5"), tokens(1, 2 * L)
    session, recorder = captured(model, passes=2)
    others = {name: 1.1 * t for name, t in model.state_dict().items()}
    session.fork().ingest(ids)
    recordings = len(recorder.tapes)
    for assign, more in ((False, 0), (True, 2)):
        model.load_state_dict({name: t.clone() for name, t in others.items()}, assign=assign)
        found = session.fork().ingest(ids).state_dict()
        expected = SleepSession(model, L, passes=2).ingest(ids).state_dict()
        assert max(relative_error(found[name], expected[name]) for name in expected if "." in name) < SESSION_STATES
        assert len(recorder.tapes) == recordings + more
        model.load_state_dict({name: t / 1.1 for name, t in others.items()})


def test_what_is_not_captured() -> None:
    model, ids = sleep_lm(), tokens(2, L)
    session, recorder = captured(model, passes=2)
    captures, mask = session.graph_cache, torch.ones_like(ids)
    assert captures is not None
    assert "gradients may be wanted" in str(captures.why_not(SleepSession(model, L, differentiable=True), ids, None))
    assert captures.why_not(session, ids, None) is None
    with torch.no_grad():
        assert captures.why_not(session, ids, None) is None
        assert captures.why_not(session, ids, mask) == "padding"
        assert captures.why_not(session, ids[:, 1:], None) == f"a window of {L - 1} tokens instead of {L}"
        assert "graphs are of cuda" in str(GraphCache().why_not(session, ids, None))
        tolerant = SleepSession(model, L, passes=2, tol=0.1)
        assert "tol" in str(captures.why_not(tolerant, ids, None))
        mask[0, :4] = 0
        session.ingest(ids, attention_mask=mask).ingest(ids[:, 3:]).sleep()
    trained, of_trained = captured(model, passes=2, differentiable=True)
    trained.ingest(ids)
    assert not recorder.tapes and len(session.reports) == 2 and not of_trained.tapes and len(trained.reports) == 1
    on_the_cpu = SleepSession(model, L, passes=2, capture=True)
    with torch.no_grad():
        on_the_cpu.ingest(ids)  # there is no CUDA device here, and none is asked for
    assert on_the_cpu.graph_cache is not None and not on_the_cpu.graph_cache.graphs
