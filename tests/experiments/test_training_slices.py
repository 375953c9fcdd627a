"""Trainings in slices of any length, and their losses beside those of a small run."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.training import TINY
from typer.testing import CliRunner

from sleepkern.cli import app
from sleepkern.experiments.training import CONFIGURATIONS, Run, Training
from sleepkern.experiments.training import expected as expected_module
from sleepkern.experiments.training.checkpoints import read_checkpoint
from sleepkern.experiments.training.expected import FILE, compare, expected_losses, store
from sleepkern.experiments.training.logs import log_content
from sleepkern.experiments.training.training import is_loss_step


def test_slices_end_by_the_clock_and_change_nothing(tmp_path: Path) -> None:
    """Slices of no time at all make one step each, between measurements too."""
    run = Run(TINY, passes=2)
    whole, sliced = Training(run), Training(run)
    whole.train()
    for step in range(1, 7):
        sliced.train(seconds=0.0)
        assert sliced.done == step
        sliced.save(tmp_path / "checkpoint.pt")
        sliced = Training(run)
        sliced.load(tmp_path / "checkpoint.pt")
    assert sliced.losses == whole.losses and set(whole.losses) == {1, 2, 5}
    expected, found = (x.sleep_module.state_dict() for x in (whole, sliced))
    assert all(torch.equal(found[name], t) for name, t in expected.items())
    assert [row["step"] for row in sliced.history] == [3, 6]


def test_loss_steps() -> None:
    assert [n for n in range(1, 1001) if is_loss_step(n)] == [1, 2, 5, 10, 20, 50, 100, 200, 500, 1000]


def test_a_checkpoint_without_losses_is_read(tmp_path: Path) -> None:
    """Older versions wrote none."""
    training = Training(Run(TINY, passes=2))
    training.train(until=2)
    training.save(tmp_path / "new.pt")
    content = torch.load(tmp_path / "new.pt", weights_only=True)
    del content["losses"]
    torch.save(content, tmp_path / "old.pt")
    assert read_checkpoint(tmp_path / "old.pt")["losses"] == {}


def test_losses_beside_a_small_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another batch, seed and number of steps are the same run; other passes are not."""
    small = Training(Run(TINY, passes=2))
    small.train()
    path = tmp_path / "losses.json"
    for _ in range(2):  # a second run takes the place of the first
        store(json.loads(json.dumps(log_content(small, "N=2"))), path)
    assert len(json.loads(path.read_text())) == 1
    monkeypatch.setattr(expected_module, "FILE", path)
    monkeypatch.setattr(expected_module, "_rows", expected_module._rows.__wrapped__)
    found = expected_losses(Run(replace(TINY, batch=2 * TINY.batch), passes=2, seed=3, steps=50))
    assert found is not None and found["batch"] == TINY.batch
    assert expected_losses(Run(TINY, passes=3)) is None
    rows = compare({1: small.losses[1], 2: 2 * small.losses[2], 7: 0.0}, found)
    assert [(step, far) for step, _, _, far in rows] == [(1, False), (2, True)]


def test_the_papers_configuration_has_expected_losses() -> None:
    row = expected_losses(Run(CONFIGURATIONS["rule110"]["paper"], passes=4))
    assert row is not None and len(row["losses"]) >= 3, f"{FILE.name} lacks it"
    losses = list(row["losses"].values())
    assert losses[-1] < losses[0]


def test_the_command_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One command, said again with --resume until the end, prints the steps done and the losses beside each other."""
    monkeypatch.setitem(CONFIGURATIONS["depo"], "mini", replace(TINY, steps=2))
    row: Any = {"batch": 4, "losses": {"1": 0.001}}
    monkeypatch.setattr("sleepkern.cli.train.expected_losses", lambda run: row)
    command = ["train", "depo", "--passes", "2", "--out", str(tmp_path), "--resume", "--seconds", "0", "--batch", "8"]
    first, second, third = (CliRunner().invoke(app, command) for _ in range(3))
    assert first.exit_code == second.exit_code == third.exit_code == 0, first.output
    assert "1 of 2 steps" in first.output and "--resume goes on" in first.output and "far above" in first.output
    assert "steps are done" not in second.output and "steps are done" not in third.output
    assert json.loads((tmp_path / "log.json").read_text())["finished"]
