"""The demo's parts, its summary of them, and its exit status."""

import importlib
import time

import pytest
from helpers.reports import bench_report
from typer.testing import CliRunner

from sleepkern.cli import app, heartbeat
from sleepkern.cli.demo.parts import PARTS, Outcome, Part, benched, verified
from sleepkern.cli.demo.summary import announcement
from sleepkern.testing.verify import Row

demo = importlib.import_module("sleepkern.cli.demo")
NAMES = ["verify", "bench", "model", "asleep", "thinking"]


def parts_of(**other):
    """The five parts, each of which passes at once unless `other` has a function for it."""

    def passes(text, out):
        return Outcome(True, "all is [well]", ("a.json",))

    return tuple(Part(name, f"Title of {name}", 30, other.get(name, passes)) for name in NAMES)


@pytest.fixture
def run(monkeypatch, tmp_path):
    def invoke(**other):
        monkeypatch.setattr(demo, "PARTS", parts_of(**other))
        (tmp_path / "text").write_text("words")
        arguments = ["demo", "--out", str(tmp_path / "out"), "--text", str(tmp_path / "text")]
        return CliRunner().invoke(app, arguments, env={"COLUMNS": "100"})

    return invoke


def line_of(output, name):
    """The part's line in the summary, which comes last."""
    lines = output[output.index("Summary") :].splitlines()
    return next(line for line in lines if line.strip().startswith(name))


def test_the_summary_has_the_five_parts(run):
    result = run()
    assert result.exit_code == 0, result.output
    for name in NAMES:
        line = line_of(result.output, name)
        assert "pass" in line and "all is [well]" in line
    assert result.output.count("Summary") == 1 and "all parts passed" in result.output
    assert result.output.startswith("5 parts, about 2 minutes on two idle cores: verify 0:30, bench 0:30")


def test_a_text_that_has_nothing_to_read_is_wrong_usage_before_the_work(monkeypatch, tmp_path):
    monkeypatch.setattr(demo, "PARTS", parts_of(verify=lambda *_: pytest.fail("the work has begun")))
    (tmp_path / "empty").touch()
    for name, expected in (("empty", "which is empty; expected a text"), ("none", "is not a file")):
        arguments = ["demo", "--out", str(tmp_path / "out"), "--text", str(tmp_path / name)]
        result = CliRunner().invoke(app, arguments, env={"COLUMNS": "300"})
        assert result.exit_code == 2 and expected in result.output, result.output
    assert not (tmp_path / "out").exists()


def test_the_demo_has_these_parts():
    assert [part.name for part in PARTS] == NAMES
    assert all(part.seconds > 0 for part in PARTS) and "thinking" in announcement(PARTS)


def test_a_red_part_fails_the_demo(run):
    result = run(model=lambda text, out: Outcome(False, "other bytes"))
    assert result.exit_code == 1
    assert "FAIL" in line_of(result.output, "model") and "other bytes" in line_of(result.output, "model")
    assert "pass" in line_of(result.output, "thinking") and "failed: model" in result.output


def test_a_part_that_breaks_off_fails_the_demo_and_the_next_ones_run(run):
    def breaks(text, out):
        raise ImportError("no [transformers]")

    result = run(asleep=breaks)
    assert result.exit_code == 1
    assert "broke off: ImportError: no [transformers]" in line_of(result.output, "asleep")
    assert "Traceback" in result.output and "pass" in line_of(result.output, "thinking")


def test_a_slow_part_gives_lines(run, monkeypatch):
    monkeypatch.setattr(heartbeat, "SILENCE", 0.05)
    monkeypatch.setattr(heartbeat, "clock", lambda seconds: "0:00")

    def slow(text, out):
        time.sleep(0.2)
        return Outcome(True, "done")

    lines = run(bench=slow).output.splitlines()
    assert "[0:00] part 2 of 5, bench" in lines


def test_what_verify_and_bench_say():
    rows = [
        Row("cpu", "kda", "float32", "rule", "T=1", "", 1e-5, {"o": 2e-6}),
        Row("cuda", "kda", "float32", "rule", "T=1", "", 1e-5, {}, "no device"),
    ]
    assert verified(rows) == "1 comparisons of 1 backends with float64: 0 wrong, worst error 0.2 x its limit"
    assert verified([]).startswith("0 comparisons")
    found = benched(bench_report((0.3, 0.4), ["token loop", "ours, modules"]))
    assert found == "2 of 2 cases timed; faster than a peer in 2 of 2 comparisons (2 to 2 x)"
    assert benched(bench_report((0.3,), [])) == "1 of 1 cases timed, no peer was timed"
