"""What a GPU machine runs first: every kernel launched once."""

from __future__ import annotations

import pytest
import torch

import sleepkern
from benchmarks import gpu_checks as checks
from sleepkern.measure import peers
from sleepkern.measure.cases import Case
from sleepkern.rules import GATED_DELTA_RULE, KDA, Rule
from sleepkern.testing import TOLERANCE, Shape, relative_error


def test_every_kernel_is_launched_once(monkeypatch: pytest.MonkeyPatch) -> None:
    from sleepkern.backends.triton.launch import Job

    seen: set[str] = set()
    kept = Job.launch

    def note(job, kernel, *rest, **more):
        seen.add(kernel.fn.__name__)
        kept(job, kernel, *rest, **more)

    monkeypatch.setattr(Job, "launch", note)
    checks.triton_launches(KDA, "cpu")
    chunked = ("chunk_factors", "state_pass", "state_pass_backward", "chunk_backward")
    assert seen == {f"{stage}_kernel" for stage in (*chunked, "decode", "single_chunk", "single_chunk_backward")}


@pytest.mark.parametrize("rule", [GATED_DELTA_RULE, KDA], ids=lambda r: r.name)
@pytest.mark.parametrize("T", [24, 90])
def test_the_baseline_of_replay_is_a_replay(rule: Rule, T: int) -> None:
    """bench's "prepared once": a launch a pass."""
    case = Case("ingest", rule, Shape(T=T, H=2, HV=2, K=32, V=32), passes=3)
    x = case.inputs()
    _, state = peers.relaunched.prepare(case, x, 1)()
    expected = sleepkern.sleep_ingest(**{**x, "q": None}, passes=3, rule=rule, backend="reference").final_state
    assert relative_error(state, expected) <= TOLERANCE[torch.float32]
