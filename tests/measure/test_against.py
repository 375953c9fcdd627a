"""Two builds in turns: the statistics on made-up samples, and the rounds with processes that are not there."""

import json
import random
import statistics

import pytest
import torch
from typer.testing import CliRunner

from sleepkern import rules
from sleepkern.cli import app
from sleepkern.measure import against, builds
from sleepkern.measure.against import Effort, bench_against
from sleepkern.measure.block_cases import BlocksCase
from sleepkern.measure.cases import Case
from sleepkern.measure.model_cases import ModelCase
from sleepkern.measure.sign_test import LOOKS, is_open, judged, rounds_for, sign_interval
from sleepkern.testing import Shape

CASES = tuple(
    Case("forward", rules.RULES[name], Shape(T=5, H=1, HV=1, K=8, V=8)) for name in ("kda", "gla", "delta_rule")
)


def test_the_interval_is_that_of_the_sign_test():
    values = [1.0, 5.0, 2.0, 4.0, 3.0, 6.0, 9.0, 7.0, 8.0]
    assert sign_interval(values, 0.95) == (2.0, 8.0, pytest.approx(1 - 20 / 512))
    assert sign_interval(values, 0.97) == (1.0, 9.0, pytest.approx(1 - 2 / 512))
    assert sign_interval(values[:4], 0.95) == (1.0, 5.0, pytest.approx(1 - 2 / 16))


def test_more_cases_need_more_rounds():
    levels = [1 - 0.05 / (LOOKS * cases) for cases in (1, 8, 33, 100)]
    assert [(rounds_for(level, 0), rounds_for(level)) for level in levels] == [(7, 13), (10, 17), (12, 19), (13, 21)]


def test_a_verdict_needs_a_change_that_matters_and_rounds_that_agree():
    level, few, many = 0.975, 7, 13
    assert judged([1.1] * few, level) == "worse" and judged([0.9] * few, level) == "better"
    assert judged([1.1] * (many - 2) + [0.5] * 2, level) == "worse"  # two rounds may be on the other side
    assert judged([1.1] * (many - 3) + [0.5] * 3, level) == "within noise"
    assert judged([1.015] * many, level) == "within noise"  # certain, and too little
    assert judged([1.1] * 4, level) == "within noise"  # too few rounds
    assert is_open([1.1] * 4, level) and not is_open([1.1] * few, level)
    assert is_open([1.1] * few + [0.9], level) and not is_open([1.1] * (many - 1) + [0.9], level)
    assert not is_open([1.01] * 4, level) and not is_open([1.1] * 4 + [0.9] * 3, level)


def measured(draw, cases):
    """The verdict of one case as `bench_against` comes to it."""
    level = 1 - Effort().false_alarm / (LOOKS * cases)
    ratios = [draw() for _ in range(Effort().rounds)]
    while is_open(ratios, level):
        ratios.append(draw())
    return judged(ratios, level)


@pytest.mark.parametrize("noise", [0.003, 0.02, 0.08, 0.3])
def test_noise_alone_gives_no_verdict_and_a_tenth_does_where_noise_is_small(noise):
    """Rounds of the same build, whose noise has a long tail, in runs of 33 cases."""
    random.seed(0)

    def draw(change=1.0):
        return change * 2 ** (random.gauss(0, noise) * (5 if random.random() < 0.1 else 1))

    runs = [sum(measured(draw, 33) != "within noise" for _ in range(33)) for _ in range(100)]
    assert sum(wrong > 0 for wrong in runs) <= 5
    if noise <= 0.02:
        slower = [measured(lambda: draw(1.1), 33) for _ in range(200)]
        assert statistics.mean(verdict == "worse" for verdict in slower) > 0.95


class NoProcess:
    """A worker that makes up its answers: `plan` says what each build does with each rule."""

    plan = {}
    started = 0

    def __init__(self, build):
        NoProcess.started += 1
        self.who = "this" if build == builds.this_build() else "other"
        self.ended, self.rule = False, None

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.ended = True

    def facts(self):
        return builds.BuildFacts("[a]", "[a]/sleepkern/__init__.py", "avx2", "0", "3", "2")

    def ask(self, **order):
        if "load" in order:
            request = torch.load(order["load"], weights_only=True)
            self.rule = request.get("rule", request["op"])
            if self.doing("fails"):
                raise builds.CallFailed("TypeError: no [/] argument [x]")
            if self.doing("ends"):
                self.ended = True
                raise builds.CallFailed("its process ended with status -11")
            if order["result"] is not None:
                torch.save([torch.full((3,), 2.0 if self.doing("differs") else 1.0)], order["result"])
            return {}
        return {"seconds": 1e-3 * random.gauss(1, 0.001) * (1.1 if self.doing("slow") else 1)}

    def doing(self, what):
        return what in self.plan.get((self.who, self.rule), ())


@pytest.fixture
def no_process(monkeypatch, tmp_path):
    (tmp_path / "sleepkern").mkdir()
    (tmp_path / "sleepkern" / "__init__.py").touch()
    monkeypatch.setattr(against, "Worker", NoProcess)
    monkeypatch.setattr(NoProcess, "plan", {})
    monkeypatch.setattr(NoProcess, "started", 0)
    random.seed(0)
    return tmp_path


def verdicts(build, plan, cases=CASES):
    NoProcess.plan = {key: (what,) for key, what in plan.items()}
    report = bench_against(cases, build)
    return report, [row.verdict for row in report.rows]


def test_only_undecided_cases_take_more_rounds(no_process):
    report, found = verdicts(no_process, {("this", "kda"): "slow", ("other", "delta_rule"): "slow"})
    assert found == ["worse", "within noise", "better"] and not report.passed
    full = rounds_for(1 - 0.05 / (LOOKS * 3), 0)
    assert [len(row.ratios) for row in report.rows] == [full, 4, full]
    assert NoProcess.started == 2 * full  # each round has processes of its own
    assert report.rows[0].ratio == pytest.approx(1.1, rel=0.01) and report.rows[0].interval.low > 1.05


def test_results_that_differ_are_wrong_and_not_timed(no_process):
    report, found = verdicts(no_process, {("other", "gla"): "differs"})
    assert found == ["within noise", "wrong", "within noise"] and not report.passed
    assert report.rows[1].this is None and report.rows[1].error == pytest.approx(0.5)


@pytest.mark.parametrize("how", ["fails", "ends"])
def test_a_build_that_fails_at_a_case_goes_on_with_the_next(no_process, how):
    report, found = verdicts(no_process, {("other", "kda"): how})
    assert found == ["not timed", "within noise", "within noise"] and report.passed
    assert report.rows[0].note.startswith("other: ")
    report, found = verdicts(no_process, {("this", "kda"): how})
    assert found == ["wrong", "within noise", "within noise"] and not report.passed


def test_a_process_that_has_ended_before_its_first_case_fails_at_it(no_process, monkeypatch):
    """Without a case that counts as failed, new processes would start for ever."""

    def ask(self, **order):
        raise builds.CallFailed("its process ended with status -9")

    monkeypatch.setattr(NoProcess, "ask", ask)
    monkeypatch.setattr(NoProcess, "facts", lambda self: setattr(self, "ended", True))
    report, found = verdicts(no_process, {})
    assert found == ["not timed"] * 3 and NoProcess.started == 2 * 3


def test_most_rounds_below_rounds_adds_none(no_process):
    NoProcess.plan = {("this", "kda"): ("slow",)}
    report = bench_against(CASES[:1], no_process, effort=Effort(rounds=3, most_rounds=1))
    assert len(report.rows[0].ratios) == 3


def test_blocks_are_timed_and_models_are_left_out(no_process):
    cases = (BlocksCase("small", 4, 16, 2, 2, 1), ModelCase("read", 8))
    report, found = verdicts(no_process, {}, cases)
    assert found == ["within noise"] and report.left_out == ("model read T=8",)
    with pytest.raises(ValueError, match="expected a case of other suites than model"):
        bench_against(cases[1:], no_process)


def invoke(*arguments):
    result = CliRunner().invoke(app, ["bench", *map(str, arguments)], env={"COLUMNS": "80"})
    return result.exit_code, result.output


def test_the_command_prints_a_line_a_case_in_80_columns(no_process, tmp_path):
    NoProcess.plan = {("this", "kda"): ("slow",), ("other", "gla"): ("differs",), ("other", "delta_rule"): ("fails",)}
    options = ("--against", no_process, "--T", 9, "--K", 16, "--V", 16, "--json", tmp_path / "[b].json")
    code, text = invoke(*options)
    assert code == 1, text
    table = text[: text.index("other: ")]
    assert max(map(len, table.splitlines())) <= 80 and "…" not in table
    assert "1.10" in table and "worse" in table and "wrong" in table and "within noise" in table
    assert "the results of the builds differ: relative error 5.0e-01 > 2e-05" in text
    for told in ("other: [a]/sleepkern, version 0", "not timed, other: TypeError: no [/] argument [x]", "[b].json"):
        assert told in text
    written = json.loads((tmp_path / "[b].json").read_text())
    assert written["command"] == "bench --against" and written["passed"] is False and len(written["rows"]) == 5
    assert {"low", "high", "level"} == set(written["rows"][0]["interval"])


def test_wrong_usage_is_one_sentence(tmp_path):
    (tmp_path / "file").touch()
    for arguments, expected in (
        ((tmp_path,), "which has no sleepkern/__init__.py; expected a folder with a compiled sleepkern"),
        ((tmp_path / "none",), "which is not there; expected a folder with a compiled sleepkern"),
        ((tmp_path / "file",), "which has no sleepkern/__init__.py"),
        ((tmp_path, "--plot", tmp_path / "x.png"), "Invalid value for --plot: got it beside --against"),
    ):
        code, text = invoke("--against", *arguments)
        assert code == 2 and expected in " ".join(text.replace("│", " ").split()), text
