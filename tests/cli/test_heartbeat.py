"""A log has a line while a command is silent; a terminal has none."""

import importlib
import io
import threading
import time

import pytest
import typer
from typer.testing import CliRunner

from sleepkern.cli import app, heartbeat
from sleepkern.cli.heartbeat import LogConsole, clock
from sleepkern.cli.output import bars, console, status
from sleepkern.experiments.training.study import N1, N4, Study

verify_module = importlib.import_module("sleepkern.cli.verify")
bench_module = importlib.import_module("sleepkern.cli.bench")
train_module = importlib.import_module("sleepkern.cli.train")
study_module = importlib.import_module("sleepkern.cli.study")


@pytest.fixture(autouse=True)
def short(monkeypatch):
    monkeypatch.setattr(heartbeat, "SILENCE", 0.05)
    # A busy machine may take more than a second; that seconds are told has a test of its own.
    monkeypatch.setattr(heartbeat, "clock", lambda seconds: "0:00")


def beating():
    return [thread for thread in threading.enumerate() if thread.name == "heartbeat"]


def log_of(work, **options):
    """What `work(console)` and the heartbeat beside it write."""
    file = io.StringIO()
    log = LogConsole(file=file, width=60, **options)
    with heartbeat.heartbeat(log, "command"):
        work(log)
    assert not beating()
    return file.getvalue()


def test_silence_gives_lines_with_what_is_done_and_how_long():
    def work(log):
        time.sleep(0.2)
        with log.doing(lambda: "part 2 of 5"), log.doing(lambda: "[case] 1 of 3"):
            time.sleep(0.2)

    lines = log_of(work).splitlines()
    assert lines[0] == "[0:00] command"
    assert "[0:00] part 2 of 5, [case] 1 of 3" in lines
    assert clock(125.7) == "2:05"


def test_output_delays_the_next_line(monkeypatch):
    """Rows come each 10 ms, so that a busy machine too lets no SILENCE pass between two of them."""
    monkeypatch.setattr(heartbeat, "SILENCE", 0.7)

    def work(log):
        began = time.monotonic()
        while time.monotonic() < began + 1:
            log.print("a row")
            time.sleep(0.01)

    assert set(log_of(work).splitlines()) == {"a row"}


def test_a_terminal_has_no_lines():
    assert log_of(lambda log: time.sleep(0.2), force_terminal=True) == ""


def test_a_console_that_is_gone_ends_the_lines_alone():
    class Full(io.StringIO):
        def write(self, text):
            raise OSError(28, "No space left on device")

    with heartbeat.heartbeat(LogConsole(file=Full()), "command"):
        for thread in beating():
            thread.join(timeout=60)
        assert not beating()


def test_a_pipe_that_is_closed_ends_the_command_and_not_the_lines_alone():
    class Closed(io.StringIO):
        def write(self, text):
            raise BrokenPipeError(32, "Broken pipe")

    log = LogConsole(file=Closed())
    with heartbeat.heartbeat(log, "command"):
        for thread in beating():
            thread.join(timeout=60)
        with pytest.raises(BrokenPipeError):
            log.print("a row")


@pytest.mark.parametrize("error", [RuntimeError("broken"), OSError(28, "full"), typer.Exit(1), KeyboardInterrupt()])
def test_the_lines_stop_at_an_error(monkeypatch, error):
    def fail(*args, **options):
        time.sleep(0.2)
        raise error

    monkeypatch.setattr(verify_module, "run", fail)
    result = CliRunner().invoke(app, ["verify"])
    assert result.exit_code and "[0:00] verify is at work" in result.output
    assert not beating()


def test_a_status_and_bars_tell_what_they_show(capsys):
    def work():
        with status("loading") as change, console.doing(lambda: "part 1"):
            time.sleep(0.15)
            change("building")
            time.sleep(0.15)
        with bars() as bar:
            first = bar.add_task("first", total=3)
            bar.add_task("second", total=5)
            time.sleep(0.15)
            bar.update(first, completed=3)
            time.sleep(0.15)

    lines = captured(work, capsys)
    assert {
        "[0:00] loading, part 1",
        "[0:00] building, part 1",
        "[0:00] first, 0 of 3",
        "[0:00] second, 0 of 5",
    } <= lines


def captured(work, capsys):
    """The lines of a command on the console that all commands share."""
    with heartbeat.heartbeat(console, "command"):
        work()
    return set(capsys.readouterr().out.splitlines())


def test_hidden_bars_are_silent(capsys):
    def work():
        with bars(hidden=True) as bar:
            bar.add_task("first", total=3)
            time.sleep(0.2)

    assert captured(work, capsys) == set()
    assert not console.quiet


def test_verify_and_bench_tell_how_far_they_are(monkeypatch):
    def slow(*args, **options):
        progress = next(x for x in args if callable(x))
        progress("kda float32", 1, 4)
        time.sleep(0.2)
        raise ValueError("enough")

    monkeypatch.setattr(verify_module, "verify", slow)
    monkeypatch.setattr(bench_module, "bench_cases", slow)
    for command in (["verify"], ["bench", "--case", "decode"]):
        assert "[0:00] kda float32, 1 of 4" in CliRunner().invoke(app, command).output


def test_train_tells_its_steps(monkeypatch):
    def slow(training, out, label, seconds):
        with train_module._bar(training, label):
            time.sleep(0.2)

    monkeypatch.setattr(train_module, "train", slow)
    result = CliRunner().invoke(app, ["train", "depo", "--steps", "7"])
    assert "] N=4 reinject, 0 of 7\n" in result.output


def test_a_study_tells_the_steps_of_its_runs(capsys, tmp_path):
    study = Study(tmp_path, rows=(N1, N4), seeds=(0,), steps=9)

    def work():
        with study_module.watching(study):
            time.sleep(0.2)

    assert captured(work, capsys) - {""} == {"[0:00] N=1, seed 0, 0 of 9"}
