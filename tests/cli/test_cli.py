"""The command line: what it prints, writes, and exits with."""

import importlib
import itertools
import json
import subprocess
import sys

import pytest
from helpers.reports import bench_report
from typer.testing import CliRunner

from sleepkern import rules, settings
from sleepkern.backends import chunked
from sleepkern.cli import app
from sleepkern.measure import suites
from sleepkern.measure.cases import Case
from sleepkern.testing import Shape

demo = importlib.import_module("sleepkern.cli.demo")
output = importlib.import_module("sleepkern.cli.output")
verify_module = importlib.import_module("sleepkern.testing.verify")

TINY = (Case("forward", rules.GATED_DELTA_RULE, Shape(T=33, H=1, HV=1, K=16, V=16)),)


def invoke(*arguments):
    return CliRunner().invoke(app, [str(a) for a in arguments], env={"COLUMNS": "200"})


@pytest.fixture
def tiny(monkeypatch):
    """verify and bench on next to nothing."""
    monkeypatch.setattr(verify_module, "QUICK_SHAPES", ("T=17",))
    monkeypatch.setattr(suites, "QUICK", {"forward": TINY})


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


def test_verify_json_agrees_with_the_exit_status_when_one_of_two_backends_refuses(tiny, monkeypatch, tmp_path):
    monkeypatch.setattr(chunked, "why_not", lambda problem: "on strike")
    both = ("--backend", "reference", "--backend", "chunked")
    result = invoke("verify", "--quick", *both, "--rule", "gla", "--json", tmp_path / "verify.json")
    content = json.loads((tmp_path / "verify.json").read_text())
    assert all(row["passed"] for row in content["rows"])
    assert result.exit_code == 1 and content["passed"] is False


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["verify", "--backend", "nope"], "got 'nope'"),
        (["verify", "--rule", "nope"], "got 'nope'"),
        (["verify", "--device", "tpu"], "expected cpu or cuda"),
        (["bench", "--suite", "nope"], "got 'nope'"),
        (["bench", "--threads", "0"], "threads: got 0"),
        (["bench", "--rule", "nope"], "Invalid value for --rule: got 'nope'; expected one of gated_delta_rule"),
        (["bench", "--op", "nope"], "Invalid value for --op: got 'nope'; expected one of forward, train"),
        (["bench", "--dtype", "int8"], "Invalid value for --dtype: got 'int8'; expected one of float32"),
        (["bench", "--K", "0"], "Invalid value for --K: got 0; expected at least 1"),
        (["bench", "--H", "2", "--HV", "3"], "Invalid value for --HV: got 3; expected a multiple of H = 2"),
        (["bench", "--T", "9000000000"], "GB; expected a call that fits into the"),
        (["bench", "--T", "9", "--suite", "decode"], "Invalid value for --suite: got a choice of suites beside a call"),
        (["bench", "--T", "9", "--case", "decode"], "Invalid value for --case: got a choice of suites beside a call"),
        (["bench", "--case", "nope"], "case: got 'nope'; expected a part of a case's name, such as 'forward gated_"),
        (["verify", "--dtype", "int8"], "Invalid value for --dtype: got 'int8'; expected one of float32"),
        (["verify", "--T", "-1"], "Invalid value for --T: got -1; expected at least 1"),
        (["verify", "--T", "9000000000"], "for which the float64 reference takes about"),
        (["explain", "nope"], "expected one of gated_delta_rule"),
        (["explain", "--dtype", "int8"], "Invalid value for --dtype: got 'int8'; expected one of float32"),
        (["explain", "--device", "tpu"], "Invalid value for --device: got 'tpu'; expected one of cpu, cuda"),
        (["tune", "plans.json", "--dtype", "int8"], "Invalid value for --dtype: got 'int8'"),
        (["tune", "plans.json", "--rule", "nope"], "Invalid value for --rule: got 'nope'"),
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


@pytest.fixture
def at_work(monkeypatch):
    """What fails a test in which a command begins its work."""

    def began(*args, **options):
        pytest.fail("the work has begun")

    for module, name in (
        ("verify", "run"), ("bench", "run"), ("info", "gather"), ("tune", "tune"), ("train", "Training"),
        ("curves", "read_logs"), ("study", "run_study"), ("study", "step_costs"),
    ):  # fmt: skip
        monkeypatch.setattr(importlib.import_module(f"sleepkern.cli.{module}"), name, began)


@pytest.mark.parametrize(
    ("command", "option"),
    [
        (("verify",), "--json"),
        (("bench",), "--json"),
        (("info",), "--json"),
        (("tune", "--device", "cpu"), "out"),
        (("bench",), "--plot"),
        (("curves", "runs"), "--out"),
    ],
)
def test_a_file_that_cannot_be_written_is_wrong_usage_before_the_work(at_work, tmp_path, command, option):
    (tmp_path / "file.png").write_text("kept")
    (tmp_path / "folder.png").mkdir()
    for place, reason in (("folder.png", "Is a directory"), ("file.png/x.png", "Not a directory")):
        given = (tmp_path / place,) if option == "out" else (option, tmp_path / place)
        result = invoke(*command, *given)
        assert result.exit_code == 2, result.output
        assert f"Invalid value for {option}: got" in result.output and reason in result.output
    assert {path.name for path in tmp_path.iterdir()} == {"file.png", "folder.png"}
    assert (tmp_path / "file.png").read_text() == "kept"


@pytest.mark.parametrize("command", [("train", "depo"), ("study", "mini-depo"), ("study", "costs"), ("demo",)])
def test_a_folder_that_cannot_be_written_to_is_wrong_usage_before_the_work(at_work, tmp_path, command):
    (tmp_path / "file").write_text("kept")
    text = ("--text", tmp_path / "file") if command == ("demo",) else ()
    for place in ("file", "file/x"):
        result = invoke(*command, *text, "--out", tmp_path / place)
        assert result.exit_code == 2, result.output
        assert "Invalid value for --out: got" in result.output and "Not a directory" in result.output


@pytest.mark.parametrize("command", [("bench", "--plot"), ("curves", "runs", "--out")])
@pytest.mark.parametrize("name", ["x.nope", "x", "x.pgf"])
def test_a_picture_of_no_known_format_is_wrong_usage_before_the_work(at_work, tmp_path, command, name):
    result = invoke(*command, tmp_path / name)
    assert result.exit_code == 2, result.output
    assert ".pdf, " in result.output and ".png, " in result.output
    assert not list(tmp_path.iterdir())


def test_what_may_be_written_is_left_as_it_was(tmp_path):
    old = tmp_path / "old.json"
    old.write_text("kept")
    for place, folder in ((old, False), (tmp_path / "a" / "b.json", False), (tmp_path / "a" / "b", True)):
        output.writable(place, "--json", folder)
    output.writable(None, "--json")
    output.drawable(tmp_path / "x.PNG", "--plot")
    assert [path.name for path in tmp_path.iterdir()] == ["old.json"] and old.read_text() == "kept"


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
    assert {"name", "milliseconds", "turns", "ratio", "error", "note"} == set(row["peers"][0])
    assert (tmp_path / "b.png").read_bytes().startswith(b"\x89PNG")


def test_bench_exits_1_on_a_planted_fault_and_shows_no_speed_up(tiny, fault, monkeypatch, tmp_path):
    monkeypatch.setattr(settings, "BACKEND", "chunked")
    result = invoke("bench", "--quick", "--plot", tmp_path / "b.png")
    assert result.exit_code == 1
    assert "not timed" in result.output and "nothing to draw" in result.output
    assert not list(tmp_path.iterdir())
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


@pytest.mark.parametrize("rule", [rules.KDA, rules.GLA], ids=str)
def test_work_of_gradients_counts_the_passes(rule):
    """Products of each pass forward and twice backward, states between passes out and in; GLA has a closed form."""
    shape = Shape(B=2, T=64, H=2, HV=2, K=16, V=8)
    one, many = (Case("train", rule, shape, passes=passes) for passes in (1, 16))
    a_pass = 2 * 64 * 2 * (2 * 2 * 16 * 8) if rule.delta else 0
    a_state = 2 * 2 * 16 * 8 * 4 if rule.delta else 0
    assert many.flops - one.flops == 15 * 3 * a_pass
    assert many.bytes - one.bytes == 15 * 2 * a_state
    counts = [invoke("explain", rule.name, "--T", 64, "--backward", "--passes", n).output for n in (1, 16)]
    assert len({text.partition("work: ")[2] for text in counts}) == (2 if rule.delta else 1)


def test_help_tells_defaults_that_are_not_numbers_and_the_suites_of_a_gpu():
    assert "[default: (H)]" in invoke("explain", "--help").output
    shown = invoke("tune", "--help").output
    assert "[default: (gated_delta_rule, kda)]" in shown and "[default: (16, 32, 64)]" in shown
    shown = invoke("bench", "--help").output
    assert "ingest" in shown and "state" in shown and "replay" in shown


@pytest.fixture
def drawn(monkeypatch, tmp_path):
    """Draws a report and returns the figure."""
    plot = importlib.import_module("sleepkern.cli.plot")

    def draw(report):
        figures = []
        monkeypatch.setattr(plot.pyplot, "close", figures.append)
        plot.draw_report(report, tmp_path / "x.png")
        return figures[0]

    return draw


def test_plot_has_room_for_every_share_and_says_of_what(drawn):
    for shares, most in (((0.3, 0.9), 100), ((0.3, 4.2), 420)):
        panel = drawn(bench_report(shares, ["a", "b"])).axes[1]
        renderer = panel.figure.canvas.get_renderer()
        assert panel.get_xlim()[1] >= most
        for text in panel.texts:
            assert text.get_window_extent(renderer).x1 <= panel.get_window_extent(renderer).x1
        assert "float32 peak" in panel.get_xlabel()
    label = drawn(bench_report((0.3,), ["a"], gigabytes=3e3)).axes[1].xaxis.label
    assert "bfloat16" in label.get_text() and label.get_window_extent().x1 <= label.figure.bbox.width


def test_plot_gives_each_of_many_peers_a_colour_and_room(drawn):
    peers = [f"peer {i}" for i in range(8)]
    panel = drawn(bench_report((0.3, 0.3), peers)).axes[0]
    bars = sorted(panel.patches, key=lambda bar: bar.get_y())
    assert len({bar.get_facecolor() for bar in bars}) == 8
    for upper, lower in itertools.pairwise(bars):
        assert upper.get_y() + upper.get_height() <= lower.get_y() + 1e-9
    legend, figure = panel.get_legend(), panel.figure
    box = legend.get_window_extent(figure.canvas.get_renderer())
    assert box.x0 >= 0 and box.x1 <= figure.bbox.width


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
    for name, result in (("demo.patched_model", DROPIN), ("demo.sleeping", SLEEP)):
        module = importlib.import_module(f"sleepkern.cli.{name}")
        function = {"demo.patched_model": "run_patched_model", "demo.sleeping": "run_sleep"}[name]
        monkeypatch.setattr(module, function, lambda text, progress=None, result=result: result)
    thinking = importlib.import_module("sleepkern.cli.demo.training")
    trained = {"passed": True, "gap_of_N4_to_N1_at_equal_steps": {"0": 0.3}, "wanted_gap": 0.15}
    monkeypatch.setattr(thinking, "run_training", lambda folder: trained)


def test_demo_shows_all_parts_and_writes_them(tiny, dropin, tmp_path):
    (tmp_path / "text").write_bytes(b"words")
    result = invoke("demo", "--out", tmp_path / "out", "--text", tmp_path / "text")
    assert result.exit_code == 0, result.output
    assert "2.50x" in result.output
    assert "a model" in result.output
    assert "1234" in result.output and "+3 %" in result.output and "4.0 MB" in result.output
    written = {path.name for path in (tmp_path / "out").iterdir()}
    assert written == {
        "verify.json", "verify.html", "bench.json", "bench.png", "bench.html", "dropin.json", "sleep.json"
    }  # fmt: skip


def test_demo_exits_1_on_a_planted_fault(tiny, dropin, fault, tmp_path):
    (tmp_path / "text").write_bytes(b"words")
    assert invoke("demo", "--out", tmp_path / "out", "--text", tmp_path / "text").exit_code == 1


@pytest.mark.parametrize(
    "found", [{"same_tokens": False}, {"relative_logit_difference": 0.01}, {"relative_logit_difference": float("nan")}]
)
def test_demo_exits_1_when_the_model_is_not_the_same_with_sleepkern(tiny, dropin, monkeypatch, tmp_path, found):
    module = importlib.import_module("sleepkern.cli.demo.patched_model")
    monkeypatch.setattr(module, "run_patched_model", lambda text, progress=None: {**DROPIN, **found})
    (tmp_path / "text").write_bytes(b"words")
    result = invoke("demo", "--out", tmp_path / "out", "--text", tmp_path / "text")
    assert result.exit_code == 1
    assert "expected the same bytes, and logits within 1e-05" in result.output
    assert json.loads((tmp_path / "out" / "dropin.json").read_text())["passed"] is False


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
