"""Calls of one's own for `bench` and `verify`, and a choice of cases."""

import json

import pytest
import torch
import typer
from typer.testing import CliRunner

from sleepkern import rules
from sleepkern.cli import app
from sleepkern.cli.output import check_device
from sleepkern.measure import suites
from sleepkern.measure.cases import Case
from sleepkern.testing import Shape

TINY = Case("forward", rules.GATED_DELTA_RULE, Shape(T=33, H=1, HV=1, K=16, V=16))


def invoke(*arguments):
    return CliRunner().invoke(app, [str(a) for a in arguments], env={"COLUMNS": "200"})


def test_bench_times_a_call_of_ones_own(tmp_path):
    sizes = ("--T", 33, "--H", 1, "--HV", 2, "--K", 16, "--V", 24, "--dtype", "bfloat16")
    result = invoke("bench", "--quick", "--rule", "kda", *sizes, "--json", tmp_path / "b.json")
    assert result.exit_code == 0, result.output
    (row,) = json.loads((tmp_path / "b.json").read_text())["rows"]
    assert row["case"] == "forward kda T=33 H=1 HV=2 K=16 V=24 bfloat16"
    assert row["milliseconds"] > 0


def test_bench_chooses_cases_by_a_part_of_their_name(monkeypatch, tmp_path):
    names = [case.name for case in suites.select("all", False, names=("decode", "train kda"))]
    assert {name.split()[0] for name in names} == {"decode", "train"} and len(names) == 6
    monkeypatch.setattr(suites, "QUICK", {"forward": (TINY,)})
    result = invoke("bench", "--quick", "--case", "T=33", "--case", "K=16", "--json", tmp_path / "b.json")
    assert result.exit_code == 0, result.output
    assert [row["case"] for row in json.loads((tmp_path / "b.json").read_text())["rows"]] == [TINY.name]


def test_verify_compares_at_a_shape_of_ones_own(tmp_path):
    sizes = ("--B", 2, "--T", 9, "--H", 1, "--HV", 2, "--K", 16, "--V", 8)
    one = ("--backend", "chunked", "--rule", "kda", "--dtype", "float32")
    result = invoke("verify", "--quick", *one, *sizes, "--json", tmp_path / "v.json")
    assert result.exit_code == 0, result.output
    rows = json.loads((tmp_path / "v.json").read_text())["rows"]
    assert {row["shape"] for row in rows} == {"B=2 T=9 H=1 HV=2 K=16 V=8"}
    assert {row["op"] for row in rows} == {"rule", "step", "sleep"}
    assert {row["variant"] for row in rows} == {"slow decay", "strong decay", "beta to 2"}


def test_a_device_that_is_not_there_is_wrong_usage(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert check_device("cuda:1") == "cuda:1"
    with pytest.raises(typer.BadParameter, match="got cuda:2; expected a number below 2"):
        check_device("cuda:2")
