"""Files that commands write and read: whole or not at all, and a damaged one is told in one sentence."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.training import TINY
from typer.testing import CliRunner

from sleepkern.cli import app
from sleepkern.experiments.training import Run, Training
from sleepkern.experiments.training.costs import sweep_tol
from sleepkern.experiments.training.logs import read_log
from sleepkern.experiments.training.study import N1, Study, seeds_of
from sleepkern.files import read_json, replacing, write_text


def write_half(path: Path) -> None:
    with replacing(path) as place:
        place.write_text("half")
        raise KeyError


def test_a_file_is_replaced_whole_or_stays(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "x.json"
    write_text(path, "old")
    path.chmod(0o640)
    with pytest.raises(KeyError):
        write_half(path)
    assert path.read_text() == "old" and [p.name for p in path.parent.iterdir()] == ["x.json"]
    write_text(path, "new")
    assert path.read_text() == "new" and path.stat().st_mode & 0o777 == 0o640
    link = tmp_path / "link"
    link.symlink_to(path)
    write_text(link, "behind")
    assert link.is_symlink() and path.read_text() == "behind"
    with pytest.raises(OSError, match="No space left on device: '/dev/full'"):
        write_text(Path("/dev/full"), "x")


def test_json_that_is_none(tmp_path: Path) -> None:
    for text in ("", "{", "[" * 100_000, "\x00"):
        (tmp_path / "x").write_text(text)
        with pytest.raises(ValueError, match="got a damaged file .*; expected JSON"):
            read_json(tmp_path / "x")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One of a run that is half done."""
    path = tmp_path_factory.mktemp("run") / "checkpoint.pt"
    training = Training(Run(TINY, passes=2))
    training.train(until=3)
    training.save(path)
    return path


class Planted:
    """Runs a command when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return os.system, (f"touch {self.path}",)


def altered(checkpoint: Path, path: Path, **changes: Any) -> Path:
    torch.save({**torch.load(checkpoint, weights_only=True), **changes}, path)
    return path


def refuses(path: Path, reason: str) -> None:
    with pytest.raises(ValueError, match=f"checkpoint.pt: got .*{reason}.*expected"):
        Training(Run(TINY, passes=2)).load(path)


def test_no_code_of_a_checkpoint_is_run(checkpoint: Path, tmp_path: Path) -> None:
    path = altered(checkpoint, tmp_path / "checkpoint.pt", history=[Planted(tmp_path / "ran")])
    refuses(path, "damaged checkpoint")
    with pytest.raises(ValueError, match="damaged checkpoint"):
        sweep_tol(tmp_path)
    assert not (tmp_path / "ran").exists()


def test_damaged_checkpoints_are_refused(checkpoint: Path, tmp_path: Path) -> None:
    content, path = checkpoint.read_bytes(), tmp_path / "checkpoint.pt"
    flipped = bytearray(content)
    flipped[len(content) // 2] ^= 1
    for damaged in (b"", b"x", content[: len(content) // 2], bytes(flipped)):
        path.write_bytes(damaged)
        refuses(path, "damaged checkpoint")
    good = torch.load(checkpoint, weights_only=True)
    name = next(iter(good["weights"]))
    for changes, reason in (
        ({"weights": {}}, "weights missing or unknown"),
        ({"weights": {**good["weights"], name: torch.zeros(2)}}, "is not a tensor"),
        ({"optimisers": {}}, "optimiser states missing"),
        ({"curriculum": None}, "curriculum is of type NoneType"),
        ({"done": 10**9}, "steps done"),
        ({"done": -5}, "-5 steps done"),
        ({"extra": 1}, "expected run, weights"),
    ):
        refuses(altered(checkpoint, path, **changes), reason)
    Training(Run(TINY, passes=2)).load(altered(checkpoint, path))


@pytest.mark.parametrize("text", ["", '{"run"', "null", "[]", '{"run": {}}', '{"run": {"seed": 0}, "history": [1]}'])
def test_damaged_logs(tmp_path: Path, text: str) -> None:
    """One sentence for `curves`; a study has the training behind it write the log anew."""
    study = Study(tmp_path, rows=(N1,), seeds=(0,), steps=1)
    folder = study.folder_of(N1, 0)
    folder.mkdir(parents=True)
    (folder / "log.json").write_text(text)
    with pytest.raises(ValueError, match="log.json: got a damaged"):
        read_log(folder)
    assert study.log(N1, 0) is None
    result = CliRunner().invoke(
        app, ["curves", str(tmp_path), "--out", str(tmp_path / "x.png")], env={"COLUMNS": "300"}
    )
    assert result.exit_code == 2 and "got a damaged" in result.output


def test_a_run_at_its_end_writes_the_log_that_was_lost(tmp_path: Path) -> None:
    command = ["train", "depo", "--steps", "1", "--passes", "1", "--out", str(tmp_path), "--resume"]
    assert CliRunner().invoke(app, command).exit_code == 0
    whole = (tmp_path / "log.json").read_text()
    (tmp_path / "log.json").write_text(whole[:100])
    assert CliRunner().invoke(app, command).exit_code == 0
    assert json.loads((tmp_path / "log.json").read_text())["history"] == json.loads(whole)["history"]


def test_seeds() -> None:
    for seed in (-1, 2**63):
        with pytest.raises(ValueError, match="seed: got .*; expected 0 to"):
            Run(TINY, seed=seed)
    with pytest.raises(ValueError, match="seeds: got .*; expected numbers below"):
        seeds_of(f"1,{2**63}")


def run(*arguments: str, **options: Any) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "sleepkern", *arguments]
    return subprocess.run(command, stderr=subprocess.PIPE, text=True, timeout=120, **options)


def test_a_console_that_cannot_be_written_to_is_one_sentence() -> None:
    with open("/dev/full", "w") as full:
        found = run("explain", stdout=full)
    assert found.returncode == 1 and found.stderr == "sleepkern: [Errno 28] No space left on device\n"
    ascii_only = os.environ | {"PYTHONIOENCODING": "ascii"}
    found = run("info", "--json", "/dev/full", stdout=subprocess.PIPE, env=ascii_only)
    assert (
        "sleepkern" in found.stdout
        and found.returncode == 1
        and found.stderr == "sleepkern: [Errno 28] No space left on device: '/dev/full'\n"
    )


def test_wrong_usage() -> None:
    for arguments, expected in (
        (["train", "depo", "--out", ""], "--out': got an empty name; expected a path"),
        (["info", "--json", ""], "--json': got an empty name"),
        (["train", "depo", "--threads", "100000"], "threads: got 100000; expected 1 to 1024"),
        (["train", "depo", "--seed", str(2**70)], "seed: got"),
    ):
        result = CliRunner().invoke(app, arguments, env={"COLUMNS": "200"})
        assert result.exit_code == 2 and expected in result.output, result.output


def test_explain_of_a_shape_beyond_any_machine_and_the_version() -> None:
    result = CliRunner().invoke(app, ["explain", "kda", "--T", "99999999999999999999", "--B", "100000000"])
    assert result.exit_code == 0 and "work: " in result.output
    assert CliRunner().invoke(app, ["--version"]).output.strip().count(".") == 2
