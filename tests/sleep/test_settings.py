"""Settings of a session: the backend of its passes, and the names that settings and classes had before."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import sleepkern.sleep
from sleepkern.nn import SleepLM
from sleepkern.sleep import CausalLMAdapter, LayerCache, ModelAdapter, SleepSession
from sleepkern.testing.tolerances import BLOCK_GRADIENTS, SAME_SUMS

L = 8


def lm() -> SleepLM:
    torch.manual_seed(0)
    return SleepLM(16, width=16, heads=2, blocks=2, window=L)


def ids() -> torch.Tensor:
    return torch.randint(16, (2, L), generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def test_a_session_runs_its_passes_by_the_backend_that_it_names() -> None:
    model = lm()
    states = {}
    for backend in ("cpu", "modules", None):
        session = SleepSession(model, L, 3, backend=backend)
        assert ("block by block: backend='modules'" in session.explain()) == (backend == "modules")
        assert ("sleep_blocks: cpu" in session.explain()) == (backend != "modules")
        states[backend] = session.ingest(ids()).memory.fast()[1].state
    assert torch.equal(states["cpu"], states[None])
    assert torch.allclose(states["cpu"], states["modules"], rtol=BLOCK_GRADIENTS, atol=SAME_SUMS)


@torch.no_grad()
def test_a_backend_that_cannot_run_a_window_is_refused() -> None:
    padded = torch.ones(2, L, dtype=torch.int64)
    padded[0, 0] = 0
    session = SleepSession(lm(), L, backend="cpu")
    with pytest.raises(ValueError, match="backend: got 'cpu', which cannot run this window: padding"):
        session.ingest(ids(), padded)
    assert session.position == 0
    with pytest.raises(ValueError, match="backend: got 'cuda', which cannot do this call"):
        SleepSession(lm(), L, backend="cuda").explain()
    with pytest.raises(ValueError, match="backend: got 'gpu'; expected one of None, cuda, cpu, modules"):
        SleepSession(lm(), L, backend="gpu")


def test_tol_was_called_settled() -> None:
    with pytest.warns(DeprecationWarning, match="settled is tol of SleepSession") as caught:
        session = SleepSession(lm(), L, settled=0.5)
    assert caught[0].filename == __file__ and session.tol == 0.5
    with pytest.warns(DeprecationWarning, match=r"SleepSession\.settled is SleepSession\.tol") as caught:
        assert session.settled == 0.5
    assert caught[0].filename == __file__
    with pytest.raises(ValueError, match="tol: got 0.1 and settled=0.5, its former name; expected one of them"):
        SleepSession(lm(), L, tol=0.1, settled=0.5)


def test_attributes_are_known_by_the_names_they_had() -> None:
    session = SleepSession(lm(), L).ingest(ids()[:, :3])
    with pytest.warns(DeprecationWarning, match="SleepSession.pending"):
        assert session.waiting is session.pending
    with pytest.warns(DeprecationWarning, match="SleepSession.adapter"):
        assert session.stack is session.adapter
    with pytest.raises(AttributeError, match="'SleepSession' object has no attribute 'wait'"):
        session.wait  # noqa: B018


@pytest.mark.parametrize(
    ("name", "new"), [("Stack", ModelAdapter), ("Memory", LayerCache), ("RecordedStack", CausalLMAdapter)]
)
def test_classes_are_known_by_the_names_they_had(name: str, new: type) -> None:
    with pytest.warns(
        DeprecationWarning, match=rf"sleepkern\.sleep\.{name} is sleepkern\.sleep\.{new.__name__}"
    ) as caught:
        assert getattr(sleepkern.sleep, name) is new
    assert caught[0].filename == __file__


def test_a_model_that_is_no_adapter_is_refused() -> None:
    with pytest.raises(ValueError, match="for others, a ModelAdapter"):
        SleepSession(nn.Linear(2, 2), L)
