"""Training: exactly repeatable, resumable, the same by any backend and on any number of processes."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.training import TINY
from torch import Tensor
from torch.nn import functional as F

from sleepkern import settings
from sleepkern.cli.curves import draw_curves
from sleepkern.cli.study import TRAINER
from sleepkern.experiments import training as public
from sleepkern.experiments.tasks import IGNORED, Batch, Depo
from sleepkern.experiments.training import (
    CONFIGURATIONS,
    Configuration,
    Run,
    Training,
    configuration,
    correct_answers,
    loss_of,
)
from sleepkern.experiments.training.curriculum import Frontier
from sleepkern.experiments.training.estimate import compute_matched_steps, compute_ratio, estimate
from sleepkern.experiments.training.logs import read_logs
from sleepkern.experiments.training.optimisers import Muon, orthogonal, rate_factor, split_parameters
from sleepkern.experiments.training.study import N1, N4, Study, StudyRow, markdown, seeds_of, summary
from sleepkern.testing import relative_error

FRONTIER = replace(TINY, curriculum="frontier")


def state(training: Training) -> list[Tensor]:
    """Every number that a step changes."""
    found = list(training.sleep_module.state_dict().values())
    for part in training.optimisers.parts:
        found += [t for slots in part.state_dict()["state"].values() for t in slots.values()]
    return found


@pytest.mark.parametrize("setting", [TINY, FRONTIER], ids=["uniform", "frontier"])
def test_resuming_changes_nothing(setting: Configuration, tmp_path: Path) -> None:
    run = Run(setting, passes=2)
    whole, first, second = Training(run), Training(run), Training(run)
    whole.train()
    first.train(until=3)
    first.save(tmp_path / "checkpoint.pt")
    second.load(tmp_path / "checkpoint.pt")
    second.train()
    assert second.done == 6 and [row["step"] for row in second.history] == [3, 6]
    assert all(torch.equal(a, b) for a, b in zip(state(second), state(whole), strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(state(first), state(whole), strict=True))
    assert second.history[-1]["accuracy"] == whole.history[-1]["accuracy"]
    assert second.curriculum.state() == whole.curriculum.state()
    with pytest.raises(ValueError, match="got a checkpoint of a run with other passes; expected the same"):
        Training(replace(run, passes=3)).load(tmp_path / "checkpoint.pt")


def losses(setting: Configuration = TINY, **options: Any) -> list[float]:
    training = Training(Run(setting, **{"passes": 3, **options}))
    return [float(training.step()) for _ in range(5)]


@pytest.mark.parametrize("feedback", ["reinject", "replay"])
def test_every_backend_learns_the_same(feedback: str, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = losses(feedback=feedback)
    for name in ("reference", "chunked"):
        monkeypatch.setattr(settings, "BACKEND", name)
        assert losses(feedback=feedback) == pytest.approx(expected, rel=2e-4)
    monkeypatch.setattr(settings, "BACKEND", None)
    assert losses(feedback=feedback, seed=1) != pytest.approx(expected, rel=2e-4)


@pytest.mark.parametrize("options", [{"eviction": "sliding"}, {"feedback": "raw"}, {"settled": 0.5}], ids=str)
def test_options_reach_the_session(options: dict[str, Any]) -> None:
    one = losses(**options)
    assert one != losses() and one == losses(**options)


def test_checkpointing_passes_changes_nothing_but_memory() -> None:
    assert losses(checkpoint=True) == pytest.approx(losses(), rel=1e-5)


def test_it_learns() -> None:
    """One hop on a small cycle, by N = 2."""
    training = Training(Run(replace(TINY, task=Depo(5, (1,), 5), width=32, batch=32, steps=150, look=150), passes=2))
    training.train()
    assert training.history[-1]["accuracy"][1] > 0.6
    assert training.tokens == 32 * (10 + 5)


def batch_of(targets: list[list[int]], answers: list[list[int]], level: list[list[int]]) -> Batch:
    rows = [torch.tensor(t) for t in (targets, answers, level)]
    return Batch(torch.zeros(2, 4).long(), torch.zeros_like(rows[0]), *rows)


def test_loss_and_answers_by_hand() -> None:
    ignored = IGNORED
    batch = batch_of([[ignored, 1, 2, 0], [3, 3, ignored, ignored]], [[-1, 0, 0, 1], [-1, 0, -1, -1]], [[1, 2], [1, 0]])
    logits = F.one_hot(torch.tensor([[5, 1, 4, 0], [0, 3, 0, 0]]), 6).float() * 9
    assert correct_answers(logits, batch).tolist() == [[False, True], [True, False]]
    rows, places = [0, 0, 0, 1, 1], [1, 2, 3, 0, 1]
    each = [-logits.log_softmax(-1)[r, p, batch.targets[r, p]] for r, p in zip(rows, places, strict=True)]
    assert float(loss_of(logits, batch)) == pytest.approx(float(sum(each)) / 5, rel=1e-6)


def test_muon_is_torchs() -> None:
    """But for the bfloat16 in which torch's iterates."""
    weights = [torch.nn.Parameter(torch.randn(24, 8, generator=torch.Generator().manual_seed(0))) for _ in range(2)]
    start = weights[0].detach().clone()
    options = {"lr": 0.1, "weight_decay": 0.1}
    parts = [Muon([weights[0]], {}, **options), torch.optim.Muon([weights[1]], **options)]
    for step in range(3):
        gradient = torch.randn(24, 8, generator=torch.Generator().manual_seed(step + 1))
        for part, weight in zip(parts, weights, strict=True):
            weight.grad = gradient.clone()
            part.step()
    assert relative_error(weights[0] - start, weights[1] - start) < 0.02
    values = torch.linalg.svdvals(orthogonal(torch.randn(16, 32), 3.4445, -4.775, 2.0315))
    assert 0.5 < float(values.min()) and float(values.max()) < 1.3


def test_muon_of_matrices_side_by_side_is_muon_of_each() -> None:
    both, pair = torch.nn.Parameter(torch.randn(24, 8)), [torch.nn.Parameter(torch.zeros(12, 8)) for _ in range(2)]
    for part, rows in zip(pair, both.detach().split(12), strict=True):
        part.data.copy_(rows)
    for step in range(2):
        both.grad = torch.randn(24, 8, generator=torch.Generator().manual_seed(step)) * torch.arange(24)[:, None]
        for part, rows in zip(pair, both.grad.split(12), strict=True):
            part.grad = rows
        if step == 0:
            one, two = Muon([both], {both: [12, 12]}, lr=0.1), Muon(pair, {}, lr=0.1)
        one.step()
        two.step()
    assert torch.equal(both, torch.cat([p.detach() for p in pair]))


def test_muon_with_a_closure() -> None:
    weight = torch.nn.Parameter(torch.eye(4))
    muon, before = Muon([weight], {}, lr=0.1), weight.detach().clone()

    def closure() -> Tensor:
        muon.zero_grad()
        loss = weight.square().sum()
        loss.backward()
        return loss

    assert muon.step(closure).item() == 4.0 and not torch.equal(weight, before)


def test_no_steps_are_no_steps(tmp_path: Path) -> None:
    run = Run(TINY, steps=0)
    assert run.length == 0 and Run(TINY).length == TINY.steps
    training = Training(run)
    training.train()
    assert training.done == 0 and estimate(TINY, 1, 0).flop == 0
    assert Study(tmp_path, steps=0).steps_of(N1) == 0


def test_muon_takes_the_matrices_of_blocks() -> None:
    model = Training(Run(TINY)).sleep_module
    matrices, others = split_parameters(model)
    names = {id(p): name for name, p in model.named_parameters()}
    assert {names[id(p)].split(".")[-2] for p in matrices} == {"qkv", "out", "up", "gate", "rates"}
    assert {names[id(p)].split(".")[-2] for p in others} >= {"tokens", "positions", "lm_head", "convolution"}
    assert len(matrices) + len(others) == len(names)


def test_rates_rise_stay_and_fall() -> None:
    factors = [rate_factor(step, 1000) for step in range(1000)]
    assert factors[0] == pytest.approx(0.02) and factors[49] == factors[699] == 1.0
    assert factors[850] == pytest.approx(0.5) and 0 < factors[-1] < 0.01


def test_the_frontier_moves_when_it_is_mastered() -> None:
    frontier = Frontier((1, 2, 3))
    assert frontier.weights() == [1.0, 0.0, 0.0]
    for _ in range(30):
        frontier.update({1: 1.0})
    assert frontier.reached == 1 and frontier.weights() == pytest.approx([0.35, 0.65, 0.0])
    for _ in range(30):
        frontier.update({1: 1.0, 2: 0.9})
    assert frontier.reached == 1
    other = Frontier((1, 2, 3))
    other.load(frontier.state())
    assert other.state() == frontier.state()


def test_every_configuration_runs_one_problem() -> None:
    for sizes in CONFIGURATIONS.values():
        for size in ("mini", "gpu"):
            setting = replace(sizes[size], batch=2, width=16, heads=2)
            assert torch.isfinite(Training(Run(setting, passes=2)).step())
    with pytest.raises(ValueError, match="size: got 'huge'; expected one of mini, gpu, paper"):
        configuration("depo", "huge")
    with pytest.raises(ValueError, match="task: got 'chess'; expected one of depo, rule110, arithmetic"):
        configuration("chess", "mini")


def test_estimates_count_tokens_and_products() -> None:
    mini = configuration("depo", "mini")
    assert compute_ratio(mini, 4) == pytest.approx((4 * 18 + 8) / (18 + 8))
    assert compute_matched_steps(mini, 4, 2600) == 8000
    found = estimate(mini, 4, steps=10)
    matrices = 64 * (3 * 64 + 64) + 64 * (3 * 64 + 64 + 64 + 4) + 2 * 2 * 2 * 64 * 64
    assert found.tokens == 640 * 26
    assert found.flop == pytest.approx(6 * 640 * (80 * matrices + 8 * 64 * 9))


def torchrun(kind: str, processes: int, out: Path) -> dict[str, Tensor]:
    """Two steps of TINY under torchrun; the gradients of the first and the weights after both."""
    place = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    command = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    script = Path(__file__).with_name("training_process.py")
    done = subprocess.run(
        [sys.executable, *command, str(script), kind, str(out)], env=place, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr[-2000:]
    found: dict[str, Tensor] = torch.load(out)
    return found


@pytest.mark.parametrize("kind", ["ddp", pytest.param("fsdp", marks=pytest.mark.hardening)])
def test_two_processes_are_one(kind: str, tmp_path: Path) -> None:
    found = torchrun(kind, 2, tmp_path / "two.pt")
    training = Training(Run(TINY, passes=3))
    loss = training.step()
    assert float(found["loss"]) == pytest.approx(float(loss), rel=1e-5)
    training.step()
    weights = training.sleep_module.state_dict()
    assert weights.keys() == found["weights"].keys()
    for name, weight in weights.items():
        assert relative_error(found["weights"][name], weight) < 1e-4, name
    assert found["accuracy"] == training.measure()


def test_a_study_goes_on_where_it_stopped(tmp_path: Path) -> None:
    study = Study(tmp_path, rows=(N1, N4), seeds=(0,), steps=2)
    shown: list[Any] = []
    study.run(TRAINER, watch=shown.append, interval=0.2)
    logs = [study.log(row, 0) for row in (N1, N4)]
    assert all(log is not None and log.finished and log.steps == 2 for log in logs) and shown
    found, text = summary(study), markdown(study)
    assert [row["row"] for row in found["rows"]] == ["N=1", "N=4"] and not found["passed"]
    assert len(text.splitlines()) == 5 and "| N=4 | 0 |" in text
    stamps = [(study.folder_of(row, 0) / "log.json").stat().st_mtime_ns for row in (N1, N4)]
    study.run(TRAINER)
    assert stamps == [(study.folder_of(row, 0) / "log.json").stat().st_mtime_ns for row in (N1, N4)]
    draw_curves(read_logs([tmp_path]), tmp_path / "study.png")
    assert (tmp_path / "study.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(ValueError, match="seeds: got '0,a'; expected numbers with commas between them"):
        seeds_of("0,a")
    wrong = StudyRow("wrong", 2, "none")
    with pytest.raises(RuntimeError, match="wrong, seed 0: got exit status 2; see"):
        Study(tmp_path, rows=(wrong,), seeds=(0,), steps=2).run(TRAINER)


def test_names_that_were_renamed_warn() -> None:
    for old, new in (("Sleeper", "SleepModule"), ("placed", "current_placement"), ("right", "correct_answers")):
        with pytest.warns(DeprecationWarning, match=f"training.{old} is sleepkern.experiments.training.{new}"):
            assert getattr(public, old) is getattr(public, new)
