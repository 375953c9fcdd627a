"""`bench --model` on the command line."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from helpers.hf_models import build
from typer.testing import CliRunner, Result

from sleepkern.cli import app, model_bench
from sleepkern.measure import timing
from sleepkern.measure.models import LengthRow, ModelReport, Phase, SleepCost


def invoke(*arguments: object, width: int = 80) -> Result:
    return CliRunner().invoke(app, [str(a) for a in arguments], env={"COLUMNS": str(width)})


@pytest.fixture
def config(tmp_path: Path) -> Path:
    """The config.json of a tiny Qwen3-Next."""
    build("qwen3_next").config.save_pretrained(tmp_path)
    return tmp_path / "config.json"


def test_a_config_gives_tables_and_json(monkeypatch: pytest.MonkeyPatch, config: Path, tmp_path: Path) -> None:
    run = timing.time_in_turns
    monkeypatch.setattr(timing, "time_in_turns", lambda found, device, *_, **__: run(found, device, 0.05, (1, 2)))
    sizes = ("--T", 9, "--T", 33, "--B", 2, "--layers", 4)
    result = invoke("bench", "--model", config, "--quick", *sizes, "--json", tmp_path / "m.json")
    assert result.exit_code == 0, result.output
    for word in ("prefill", "decode 16", "keys", "N = 4", "Qwen3NextForCausalLM", "random weights", "replaced by"):
        assert word in result.output
    content = json.loads((tmp_path / "m.json").read_text())
    assert content["command"] == "bench --model" and content["passed"] is True
    assert {"date", "device", "threads", "versions"} <= set(content["environment"])
    assert content["layer_types"] == ["linear_attention"] * 3 + ["full_attention"]
    assert content["replaced"] and content["no_sleep"] is None and content["batch"] == 2
    assert [row["tokens"] for row in content["rows"]] == [9, 33]
    for row in content["rows"]:
        assert row["prefill"]["ratio"] > 0 and row["decode"]["stock_peak_bytes"] < 1 << 30
        assert [cost["passes"] for cost in row["sleep"]] == [1, 2, 4]


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (("--model", "nope"), "model: got 'nope', which is no file or folder; expected a config.json"),
        (("--layers", 2), "Invalid value for --layers: got it without --model"),
        (("--model", "mamba2", "--layers", 0), "layers: got 0; expected 1 to 24"),
        (("--model", "mamba2", "--suite", "decode"), "Invalid value for --suite: got it beside --model"),
        (("--model", "mamba2", "--case", "x"), "Invalid value for --case: got it beside --model"),
        (("--model", "mamba2", "--rule", "kda"), "Invalid value for --rule: got it beside --model"),
        (("--model", "mamba2", "--op", "train"), "Invalid value for --op: got it beside --model"),
        (("--model", "mamba2", "--K", 3), "Invalid value for --K: got it beside --model"),
        (("--model", "mamba2", "--plot", "x.png"), "Invalid value for --plot: got it beside --model"),
        (("--model", "mamba2", "--T", 0), "Invalid value for --T: got 0; expected at least 1"),
        (("--model", "mamba2", "--B", 0), "Invalid value for --B: got 0; expected at least 1"),
        (("--model", "mamba2", "--dtype", "int8"), "Invalid value for --dtype: got 'int8'"),
        (("--model", "mamba2", "--dtype", "float32", "--dtype", "float16"), "expected one type beside --model"),
        (("--model", "mamba2", "--threads", 0), "threads: got 0; expected at least 1"),
        (("--model", "mamba2", "--T", 10**9), "GB; expected a model (--layers), --B and --T that fits into the"),
    ],
    ids=lambda x: " ".join(map(str, x)) if isinstance(x, tuple) else "",
)  # fmt: skip
def test_wrong_usage_exits_2_in_a_sentence(arguments: tuple[object, ...], expected: str) -> None:
    result = invoke("bench", *arguments, width=1000)
    assert result.exit_code == 2, result.output
    assert expected in result.output


def report(**changes: Any) -> ModelReport:
    """A report that nothing was measured for."""
    phase = Phase(123.4, 2345.6, 19.0, 3, 123_456_789, 45_678_901)
    row = LengthRow(131072, 1e-6, None, 2e-5, phase, phase, 1_234_567_890, 2_345_678,
                    tuple(SleepCost(n, 123.4 * n, 1.0 * n) for n in (1, 2, 4)))  # fmt: skip
    where = {"device": "a device of a long name", "threads": 1, "date": "2026-11-23T00:00", "versions": {}}
    made = ModelReport(where, "a_family", "AForCausalLM", 10**9, ("linear_attention",) * 3, "random", 1, "float32", 64,
                       ("transformers.models.a.modeling_a.f",), (), None, (row,))  # fmt: skip
    return replace(made, **changes)


def test_a_wrong_model_is_red_and_has_no_times(monkeypatch: pytest.MonkeyPatch, config: Path) -> None:
    wrong = report(rows=(LengthRow(7, 0.5, None, 2e-5),))
    monkeypatch.setattr(model_bench, "bench_model", lambda *_, **__: wrong)
    result = invoke("bench", "--model", config)
    assert result.exit_code == 1
    assert "T=7: not timed, the logits differ with the patch" in result.output and "prefill" not in result.output


def test_tables_fit_80_columns_and_notes_are_told(monkeypatch: pytest.MonkeyPatch, config: Path) -> None:
    told = report(no_sleep="[it] keeps more", left=("no kernel for [x]",))
    monkeypatch.setattr(model_bench, "bench_model", lambda *_, **__: told)
    result = invoke("bench", "--model", config)
    assert result.exit_code == 0, result.output
    assert "no sleep for this family: [it] keeps more" in result.output
    assert "the original function is used: no kernel for [x]" in result.output
    assert "…" not in result.output and max(map(len, result.output.splitlines())) <= 80
    for figure in ("131072", "19.00", "1235", "2.3", "45.7", "494"):
        assert figure in result.output
