"""What a GPU machine runs first: every kernel launched once."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

from sleepkern.rules import KDA

FILE = Path(__file__).resolve().parents[2] / "benchmarks" / "gpu_checks.py"


def test_every_kernel_is_launched_once(monkeypatch: pytest.MonkeyPatch) -> None:
    spec = importlib.util.spec_from_file_location("gpu_checks", FILE)
    assert spec is not None and spec.loader is not None
    checks = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(checks)
    from sleepkern.backends.triton.launch import Job

    seen: set[str] = set()
    kept = Job.launch

    def note(job, kernel, *rest, **more):
        seen.add(kernel.fn.__name__)
        kept(job, kernel, *rest, **more)

    monkeypatch.setattr(Job, "launch", note)
    monkeypatch.setattr(checks, "RULES", {"kda": KDA})
    checks.launches("cpu")
    stages = ("prepare", "ingest", "adjoint", "gradient", "step", "window", "window_gradient")
    assert seen == {f"{stage}_kernel" for stage in stages}
