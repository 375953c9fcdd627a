"""A training by the Triton kernels is the one by the C++ kernels."""

from __future__ import annotations

import pytest

from sleepkern import settings
from sleepkern.experiments.tasks import Depo
from sleepkern.experiments.training import Configuration, Run, Training

TINY = Configuration(Depo(4, (1, 2), 2), width=32, heads=2, blocks=2, batch=2, steps=5)


@pytest.mark.parametrize("feedback", [pytest.param("reinject", marks=pytest.mark.hardening), "replay"])
def test_five_steps(feedback: str, monkeypatch: pytest.MonkeyPatch) -> None:
    losses = {}
    for name in ("triton", "cpu", "chunked"):
        monkeypatch.setattr(settings, "BACKEND", name)
        training = Training(Run(TINY, passes=2, feedback=feedback))
        losses[name] = [float(training.step()) for _ in range(5)]
    assert losses["triton"] == pytest.approx(losses["chunked"], rel=2e-4)
    assert losses["cpu"] == pytest.approx(losses["chunked"], rel=2e-4)
    assert losses["triton"][0] != losses["triton"][-1]
