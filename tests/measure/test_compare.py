"""Two reports of `bench` side by side, on reports that nothing was measured for."""

import json

import pytest
from typer.testing import CliRunner

from sleepkern.cli import app
from sleepkern.measure.compare import compare, read_report


def row(case="a", median=10.0, best=None, threads=1):
    best = median if best is None else best
    return {"case": case, "threads": threads, "milliseconds": median, "best_milliseconds": best}


def verdict(before, after):
    (one,) = compare([before], [after]).rows
    return one.verdict


def test_ten_percent_slower_is_worse_and_faster_is_better():
    slower = compare([row(median=10.0)], [row(median=11.0)])
    assert slower.rows[0].verdict == "worse" and slower.rows[0].ratio == pytest.approx(1.1) and not slower.passed
    faster = compare([row(median=11.0)], [row(median=10.0)])
    assert faster.rows[0].verdict == "better" and faster.passed


@pytest.mark.parametrize("median", [9.6, 10.0, 10.4])
def test_about_equal_is_within_noise(median):
    assert verdict(row(median=10.0), row(median=median)) == "within noise"


@pytest.mark.parametrize("median", [5.0, 10.0, 20.0])
def test_the_verdict_of_an_unsteady_row_is_withheld(median):
    steady, unsteady = row(median=10.0, best=9.5), row(median=median, best=0.85 * median)
    assert verdict(steady, unsteady) == verdict(unsteady, steady) == "unsteady"
    assert compare([steady], [unsteady]).passed


def test_cases_of_one_report_are_listed_and_threads_tell_cases_apart():
    compared = compare([row("a"), row("b"), row("c")], [row("a"), row("c", threads=2)])
    assert [one.case for one in compared.rows] == ["a"]
    assert compared.only_before == ("b, 1 thread(s)", "c, 1 thread(s)")
    assert compared.only_after == ("c, 2 thread(s)",)
    assert compared.passed


def test_a_case_that_is_wrong_after_fails():
    red = row(median=None)
    assert verdict(row(), red) == "wrong" and not compare([row()], [red]).passed
    assert verdict(red, row()) == "not timed" and compare([red], [row()]).passed


def written(path, rows):
    where = {"device": "a device", "threads": 1, "date": "2026-11-23T00:00"}
    path.write_text(json.dumps({"environment": where, "rows": rows}))
    return path


def invoke(*arguments):
    return CliRunner().invoke(app, ["bench", *map(str, arguments)], env={"COLUMNS": "200"})


def test_the_command_prints_a_row_a_case_and_exits_1_when_one_is_worse(tmp_path):
    before = written(tmp_path / "a.json", [row("fast"), row("slow"), row("gone")])
    after = written(tmp_path / "b.json", [row("fast"), row("slow", 11.0)])
    result = invoke("--compare", before, after, "--json", tmp_path / "c.json")
    assert result.exit_code == 1, result.output
    assert "1.10" in result.output and "worse" in result.output and "within noise" in result.output
    assert "only in A: gone, 1 thread(s)" in result.output
    assert json.loads((tmp_path / "c.json").read_text())["rows"][1]["verdict"] == "worse"
    assert invoke("--compare", before, before).exit_code == 0


def test_wrong_usage_of_the_command_is_one_sentence(tmp_path):
    good, bad = written(tmp_path / "a.json", [row()]), tmp_path / "bad.json"
    bad.write_text("[1]")
    for arguments, expected in (
        ((good, bad), "got another file; expected a report that `bench --json` has written"),
        ((good, tmp_path / "none.json"), "has written: No such file or directory"),
        ((good, good, "--T", 9), "Invalid value for --T: got it beside --compare"),
    ):
        result = invoke("--compare", *arguments)
        assert result.exit_code == 2 and expected in result.output, result.output
    with pytest.raises(ValueError, match="bad.json: got another file"):
        read_report(bad)
