"""The command line: what it prints, writes, and exits with."""

import importlib
import json
import subprocess
import sys

import pytest
from typer.testing import CliRunner

from sleepkern import rules, settings
from sleepkern.backends import chunked
from sleepkern.cli import app
from sleepkern.measure import cases
from sleepkern.measure.cases import Case
from sleepkern.testing import Shape

demo = importlib.import_module("sleepkern.cli.demo")
verify_module = importlib.import_module("sleepkern.measure.verify")

TINY = (Case("forward", rules.GATED_DELTA_RULE, Shape(T=33, H=1, HV=1, K=16, V=16)),)


def invoke(*arguments):
    return CliRunner().invoke(app, [str(a) for a in arguments], env={"COLUMNS": "200"})


@pytest.fixture
def tiny(monkeypatch):
    """verify and bench on next to nothing."""
    monkeypatch.setattr(verify_module, "QUICK_SHAPES", ("T=17",))
    monkeypatch.setattr(cases, "QUICK", {"forward": TINY})


@pytest.fixture
def fault(monkeypatch):
    """A chunk form whose largest readout is 1 % off."""
    forward = chunked.forward

    def wrong(problem, x):
        out = forward(problem, x)
        if out.o is not None:
            flat = out.o.view(-1)
            flat[flat.abs().argmax()] *= 1.01
        return out

    monkeypatch.setattr(chunked, "forward", wrong)


def test_verify_prints_a_table_and_writes_json(tiny, tmp_path):
    path = tmp_path / "deep" / "verify.json"
    result = invoke("verify", "--quick", "--backend", "chunked", "--rule", "delta_rule", "--json", path)
    assert result.exit_code == 0, result.output
    assert "delta_rule" in result.output
    assert "pass" in result.output
    content = json.loads(path.read_text())
    assert content["command"] == "verify"
    assert content["passed"] is True
    assert {"date", "device", "threads", "versions"} <= set(content["environment"])
    row = content["rows"][0]
    assert row["backend"] == "chunked"
    assert row["errors"]["dk"] < row["tolerance"]
    assert row["passed"]


def test_verify_exits_1_on_a_planted_fault(tiny, fault, tmp_path):
    path = tmp_path / "verify.json"
    result = invoke("verify", "--quick", "--backend", "chunked", "--rule", "kda", "--json", path)
    assert result.exit_code == 1
    assert "FAIL" in result.output
    assert "chunked kda float32 rule T=17, slow decay: o " in result.output
    assert json.loads(path.read_text())["passed"] is False


def test_verify_exits_1_when_the_backend_asked_for_refuses_everything(tiny, monkeypatch):
    monkeypatch.setattr(chunked, "why_not", lambda problem: "on strike")
    result = invoke("verify", "--quick", "--backend", "chunked", "--rule", "gla")
    assert result.exit_code == 1
    assert "chunked refused: on strike" in result.output


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["verify", "--backend", "nope"], "got 'nope'"),
        (["verify", "--rule", "nope"], "got 'nope'"),
        (["verify", "--device", "tpu"], "expected cpu or cuda"),
        (["bench", "--suite", "nope"], "got 'nope'"),
        (["bench", "--threads", "0"], "threads: got 0"),
        (["explain", "nope"], "expected one of gated_delta_rule"),
        (["explain", "--dtype", "int8"], "expected one of float32"),
        (["explain", "--H", "2", "--HV", "3"], "expected a multiple of H = 2"),
        (["demo", "--text", "nowhere"], "nowhere is not a file"),
        (["train", "chess"], "task: got 'chess'; expected one of depo, rule110, arithmetic"),
        (["train", "depo", "--feedback", "none"], "feedback: got 'none'; expected one of raw, reinject, replay"),
        (["train", "depo", "--distributed", "ddp"], "expected to be started by torchrun"),
        (["curves", "nowhere"], "folder: got nowhere; expected folders that `train` has written to"),
        (["study", "mini-depo", "--out", "x", "--seeds", "a"], "seeds: got 'a'; expected numbers"),
    ],
    ids=lambda x: " ".join(x) if isinstance(x, list) else "",
)
def test_wrong_usage_exits_2_and_says_what(arguments, expected):
    result = invoke(*arguments)
    assert result.exit_code == 2
    assert expected in result.output


def test_bench_writes_json_and_a_plot(tiny, tmp_path):
    result = invoke("bench", "--quick", "--json", tmp_path / "b.json", "--plot", tmp_path / "b.png")
    assert result.exit_code == 0, result.output
    assert "x token" in result.output
    content = json.loads((tmp_path / "b.json").read_text())
    assert content["command"] == "bench"
    assert content["passed"] is True
    row = content["rows"][0]
    assert row["milliseconds"] > 0
    assert row["backend"] in ("cpu", "chunked")
    assert {"name", "milliseconds", "ratio", "error", "note"} == set(row["peers"][0])
    assert (tmp_path / "b.png").read_bytes().startswith(b"\x89PNG")


def test_bench_exits_1_on_a_planted_fault_and_shows_no_speed_up(tiny, fault, monkeypatch):
    monkeypatch.setattr(settings, "BACKEND", "chunked")
    result = invoke("bench", "--quick")
    assert result.exit_code == 1
    assert "not timed" in result.output
    assert "x token" not in result.output


def test_explain_says_what_is_chosen_and_why_not():
    shape = ("--T", 512, "--K", 96, "--V", 256)
    result = invoke("explain", "kda", *shape, "--dtype", "bfloat16", "--device", "cuda")
    assert result.exit_code == 0, result.output
    assert "chosen: " in result.output
    assert "GFLOP" in result.output
    forward, both = invoke("explain").output, invoke("explain", "--backward").output
    assert "work: 3.89 GFLOP" in forward
    assert "work: 11.7 GFLOP" in both


def test_info_lists_backends_and_versions(tmp_path):
    result = invoke("info", "--json", tmp_path / "info.json")
    assert result.exit_code == 0, result.output
    content = json.loads((tmp_path / "info.json").read_text())
    assert content["backends"]["chunked"] == "ready"
    assert content["environment"]["versions"]["torch"]


DROPIN = {
    "tokens": 10,
    "generated_tokens": 2,
    "model": "a model",
    "read_tokens_per_second": {"stock": 10.0, "patched": 25.0},
    "generate_tokens_per_second": {"stock": 4.0, "patched": 5.0},
    "max_logit_difference": 1e-6,
    "relative_logit_difference": 1e-7,
    "same_tokens": True,
}


SLEEP = {
    "tokens": 20,
    "window": 10,
    "rows": [{"passes": 2, "tokens_per_second": 1234.0, "memory_bytes": [10, 10], "overhead": 0.03}],
    "kept_bytes": 4000000,
}


@pytest.fixture
def dropin(monkeypatch):
    for name, result in (("dropin", DROPIN), ("asleep", SLEEP)):
        module = importlib.import_module(f"sleepkern.cli.{name}")
        function = {"dropin": "run_dropin", "asleep": "run_sleep"}[name]
        monkeypatch.setattr(module, function, lambda text, progress=None, result=result: result)
    thinking = importlib.import_module("sleepkern.cli.thinking")
    monkeypatch.setattr(thinking, "run_thinking", lambda folder: {"passed": True})


def test_demo_shows_all_parts_and_writes_them(tiny, dropin, tmp_path):
    (tmp_path / "text").write_bytes(b"words")
    result = invoke("demo", "--out", tmp_path / "out", "--text", tmp_path / "text")
    assert result.exit_code == 0, result.output
    assert "2.50x" in result.output
    assert "a model" in result.output
    assert "1234" in result.output and "+3 %" in result.output and "4.0 MB" in result.output
    written = {path.name for path in (tmp_path / "out").iterdir()}
    assert written == {"verify.json", "bench.json", "bench.png", "dropin.json", "sleep.json"}


def test_demo_exits_1_on_a_planted_fault(tiny, dropin, fault, tmp_path):
    (tmp_path / "text").write_bytes(b"words")
    assert invoke("demo", "--out", tmp_path / "out", "--text", tmp_path / "text").exit_code == 1


def test_train_writes_a_log_that_curves_draws(tmp_path):
    steps = ("--steps", 2, "--passes", 2, "--out", tmp_path / "run")
    for more in ((), ("--resume",)):
        result = invoke("train", "depo", *steps, *more)
        assert result.exit_code == 0, result.output
        assert "step 2, loss" in result.output and "hops 1: 0." in result.output
    log = json.loads((tmp_path / "run" / "log.json").read_text())
    assert log["finished"] and log["label"] == "N=2 reinject" and log["run"]["configuration"]["task"]["nodes"] == 9
    assert (tmp_path / "run" / "checkpoint.pt").is_file()
    result = invoke("curves", tmp_path / "run", "--out", tmp_path / "curves.png")
    assert result.exit_code == 0, result.output
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")
    listed = invoke("train", "--list")
    assert listed.exit_code == 0 and "arithmetic" in listed.output and "estimates by arithmetic" in listed.output


def test_python_m_sleepkern_is_the_command_line():
    result = subprocess.run(
        [sys.executable, "-m", "sleepkern", "explain", "gla"],
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert result.returncode == 0
    assert "chosen" in result.stdout
