"""The bench of a whole model: its rows, and that a wrong model gets no time."""

from __future__ import annotations

import importlib
import importlib.util
from typing import Any

import pytest
import torch
from helpers.hf_models import build

from sleepkern.cli.bench import tables
from sleepkern.integrations.caches import cache_among
from sleepkern.measure import bench_cases
from sleepkern.measure import block_cases as stacks
from sleepkern.measure import model_cases as models
from sleepkern.measure.block_cases import BlocksCase
from sleepkern.measure.model_cases import ModelCase
from sleepkern.measure.suites import QUICK, SUITES, select
from sleepkern.nn import SleepLM
from sleepkern.ops import recurrence as ops

READ, GENERATE = ModelCase("read", 40, generated=3), ModelCase("generate", 40, generated=3)


@pytest.fixture(autouse=True)
def _small(monkeypatch: pytest.MonkeyPatch) -> None:
    model = build("qwen3_next")
    monkeypatch.setattr(models, "hybrid_model", lambda: model)
    monkeypatch.setattr(models, "_text", lambda tokens: torch.randint(64, (1, tokens)))


def test_rows_of_a_model() -> None:
    report = bench_cases([READ, GENERATE], quick=True)
    assert report.passed and report.peer_names == ["transformers"]
    for row, tokens in zip(report.rows, (40, 3), strict=True):
        assert row.rule == "gated_delta_rule" and row.gflops is None and 0 < row.error < 1e-5
        assert row.milliseconds is not None and row.tokens_per_second == pytest.approx(tokens / row.milliseconds * 1e3)
        assert row.peers[0].ratio is not None and row.peers[0].ratio > 0
    assert report.to_dict()["rows"][1]["case"] == "model generate T=40 +3"
    (shown,) = tables(report)
    assert shown.row_count == 2 and len(shown.columns) == 5


@pytest.mark.parametrize("wrong", ["logits", "tokens"])
def test_a_model_that_differs_gets_no_time(wrong: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Outputs that are 1 % off; or right logits from which other tokens are made."""
    run = ops.gated_delta_rule

    def spoiled(*args: Any, **options: Any) -> Any:
        o, S = run(*args, **options)
        return 1.01 * o, S

    stock_session, sessions = models._session, []

    def other_tokens(*args: Any) -> models.Session:
        sessions.append(stock_session(*args))
        made = sessions[-1]
        return made if len(sessions) == 1 else made._replace(generated=made.generated + 1)

    if wrong == "logits":
        monkeypatch.setattr(ops, "gated_delta_rule", spoiled)
    else:
        monkeypatch.setattr(models, "_session", other_tokens)
    (row,) = bench_cases([READ], quick=True).rows
    assert not row.passed and row.milliseconds is None and row.peers == ()
    assert row.error == float("inf") or wrong == "logits"


def test_rows_of_stacks() -> None:
    """A tiny stack: found right, timed beside its modules, its share of the peak counted."""
    case = BlocksCase("tiny", 9, 32, 2, 2, 3, passes=2)
    model = SleepLM(2, 32, 2, 2, 9, factor=4)
    matrices = [p for block in model.blocks() for p in block.parameters() if p.ndim == 2 and p.shape[1] > 4]
    assert case.flops == 2 * 3 * 9 * 2 * sum(p.numel() for p in matrices)
    (row,) = bench_cases([case], quick=True).rows
    assert row.passed and row.milliseconds is not None and row.share_of_peak is not None
    assert row.tokens == 54 and [peer.name for peer in row.peers] == ["ours, modules"]


def test_a_stack_that_differs_gets_no_time(monkeypatch: pytest.MonkeyPatch) -> None:
    right = stacks.sleep_blocks

    def spoiled(*args: Any, **options: Any) -> Any:
        slept = right(*args, **options)
        return slept._replace(h=1.001 * slept.h)

    monkeypatch.setattr(stacks, "sleep_blocks", spoiled)
    (row,) = bench_cases([BlocksCase("tiny", 9, 32, 2, 2, 3)], quick=True).rows
    assert not row.passed and row.milliseconds is None and row.peers == ()


@pytest.mark.parametrize("who", ["ours", "modules"])
def test_a_stack_is_checked_on_all_that_is_timed(who: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Wrong in the last window of a batch only: ours gets no time, a peer no ratio."""
    right = stacks.sleep_blocks if who == "ours" else stacks.one_by_one

    def spoiled(h: torch.Tensor, *args: Any, **options: Any) -> Any:
        slept = right(h, *args, **options)
        if h.dtype == torch.float32:
            slept.h[-1] *= 2
        return slept

    monkeypatch.setattr(stacks, "sleep_blocks" if who == "ours" else "one_by_one", spoiled)
    (row,) = bench_cases([BlocksCase("tiny", 9, 32, 2, 2, 20)], quick=True).rows
    if who == "ours":
        assert not row.passed and row.milliseconds is None and row.peers == ()
    else:
        (peer,) = row.peers
        assert row.passed and peer.ratio is None and str(peer.note).startswith("wrong")


def test_generating_attends_to_as_many_keys_every_time() -> None:
    lengths: list[int] = []
    model = build("qwen3_next")
    patched, _ = models.calls(model, GENERATE)
    attention = model.model.layers[3].self_attn
    attention.register_forward_hook(
        lambda module, args, options, out: lengths.append(cache_among(options.values()).get_seq_length()),
        with_kwargs=True,
    )
    for _ in range(3):
        patched()
    assert lengths == [41, 42, 43] * 3


def test_without_transformers_there_is_no_model(monkeypatch: pytest.MonkeyPatch) -> None:
    assert select("model", quick=False) == SUITES["model"] and select("model", quick=True) == QUICK["model"]
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "transformers" else find(name))
    assert not any(isinstance(case, ModelCase) for case in select("all", quick=False))
    with pytest.raises(ValueError, match="suite: got 'model', for which transformers is not installed"):
        select("model", quick=False)
