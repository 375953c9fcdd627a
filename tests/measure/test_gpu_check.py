"""`make gpu-check` without a GPU: its rehearsal runs through, its limits fit one call, and no part hides another."""

import json
import os
import subprocess
import sys
import tarfile
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from benchmarks.gpu_check import __main__ as driver
from benchmarks.gpu_check import parts, profile, times
from sleepkern.testing import Shape

ROOT = Path(__file__).resolve().parents[2]
RIGHT, TABLES, TIMES, PROFILE, SANITIZERS = range(1, 6)


def part(name, code, limit=60, group=None, file=""):
    command = ("{python}", "-c", code)
    return parts.Part(name, group or name, limit, name, command, command, file)


def call_with(tmp_path, *chosen, wheels=None):
    call = driver.Call(tmp_path / "out", tmp_path / "work", False, wheels)
    for group in parts.groups(chosen):
        call.wait([call.start(one, one.limit) for one in group])
    return call, json.loads((tmp_path / "out" / "gpu-check.json").read_text())["parts"]


def test_the_parts_come_in_order_of_worth_and_fit_one_call():
    assert parts.total() <= parts.TOTAL == 480
    worth = [part.worth for part in parts.PARTS if part.worth]
    assert worth == sorted(worth) and set(worth) == {RIGHT, TABLES, TIMES, PROFILE, SANITIZERS}
    assert len({part.file for part in parts.PARTS if part.file}) == sum(bool(part.file) for part in parts.PARTS)


def test_the_page_lists_the_parts_with_their_limits():
    page = (ROOT / "docs" / "developing" / "testing.md").read_text()
    for one in parts.PARTS:
        assert f"| `{one.name}` | {one.limit} s |" in page, one.name


@pytest.mark.hardening
def test_the_rehearsal_of_the_whole_call(tmp_path):
    command = [sys.executable, "-m", "benchmarks.gpu_check", tmp_path / "out", "--dry", "--work", tmp_path / "work"]
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout
    found = json.loads((tmp_path / "out" / "gpu-check.json").read_text())["parts"]
    assert list(found) and set(found) == {one.name for one in parts.PARTS}
    assert {name: row["end"] for name, row in found.items() if row["end"] != "ok"} == {"peers": "left out"}
    assert all("result" in found[one.name] for one in parts.PARTS if one.file)
    rows = found["times"]["result"]["rows"]
    assert len(rows) == len(times.CASES) and all("python us" in row["ours"] for row in rows)
    assert all("LookupError" in row["FlashQLA"]["note"] for row in rows)
    assert found["profile"]["result"]["times"]
    plans = json.loads((tmp_path / "out" / "plans.json").read_text())
    assert plans["plans"] and any(trial["stage"] == "state_pass" for trial in plans["trials"])
    assert "480 s" in done.stdout and not list((tmp_path / "out").glob("*.part"))


def test_a_red_part_does_not_hide_the_others(tmp_path):
    call, found = call_with(
        tmp_path,
        part("bad", "print('seen'); raise SystemExit(3)"),
        part("absent", f"print('no such tool'); raise SystemExit({parts.LEFT_OUT})"),
        part("good", "import pathlib; pathlib.Path(r'{work}/good.json').write_text('{{\"a\": 1}}')", file="good.json"),
        part("broken", "import pathlib; pathlib.Path(r'{work}/broken.json').write_text('{{')", file="broken.json"),
    )
    ends = {name: row["end"] for name, row in found.items()}
    assert ends == {"bad": "red: exit 3", "absent": "left out", "good": "ok", "broken": "red: broken.json is not JSON"}
    assert found["good"]["result"] == {"a": 1} and found["bad"]["log"] == "seen\n"
    assert "bad" in driver.summary(call) and "seen" in (tmp_path / "out" / "log.txt").read_text()


def test_a_part_over_its_limit_is_ended_with_what_it_wrote(tmp_path):
    code = "import pathlib, time; pathlib.Path(r'{work}/slow.json').write_text('[1]'); time.sleep(100)"
    begin = time.monotonic()
    _, found = call_with(tmp_path, part("slow", code, limit=5, file="slow.json"))
    assert found["slow"]["end"] == "out of time" and found["slow"]["result"] == [1]
    assert time.monotonic() - begin < 60


def test_parts_of_a_group_run_side_by_side(tmp_path):
    code = "import pathlib, time\npathlib.Path(r'{work}/%s').touch()\n"
    code += "while not pathlib.Path(r'{work}/%s').exists(): time.sleep(.01)"
    _, found = call_with(
        tmp_path, part("a", code % ("a", "b"), group="both"), part("b", code % ("b", "a"), group="both")
    )
    assert [row["end"] for row in found.values()] == ["ok", "ok"]


def test_peers_come_as_files(tmp_path):
    wheels = tmp_path / "wheels"
    wheels.mkdir()
    module = tmp_path / "peer_of_a_test.py"
    module.write_text("NAME = 'peer'\n")
    with tarfile.open(wheels / "peers.tar.xz", "w:xz") as archive:
        archive.add(module, arcname=module.name)
    _, found = call_with(
        tmp_path, replace(part("peers", ""), command=()), part("uses", "import peer_of_a_test"), wheels=wheels
    )
    assert [row["end"] for row in found.values()] == ["ok", "ok"]


def test_counters_are_read_from_what_ncu_prints():
    names = ("gpu__time_duration.sum", "launch__registers_per_thread")
    text = "==PROF== Connected\n" + "\n".join(
        ",".join(f'"{word}"' for word in line)
        for line in (
            ("ID", "Kernel Name", *names, "other"), ("", "", "nsecond", "register/thread", ""),
            ("0", "state_pass_kernel", "232,010", "180", "x"), ("1", "decode_kernel", "n/a", "40", ""),
        )
    )  # fmt: skip
    units = dict(zip(names, ("nsecond", "register/thread"), strict=True))
    assert profile.counters(text) == [
        {"kernel": "state_pass_kernel", "values": {names[0]: 232010.0, names[1]: 180.0}, "units": units},
        {"kernel": "decode_kernel", "values": {names[0]: "n/a", names[1]: 40.0}, "units": units},
    ]
    assert profile.counters("==ERROR== ERR_NVGPUCTRPERM") == []


@pytest.mark.parametrize("case", times.CASES[:1] + times.CASES[-1:])
def test_a_way_that_fails_leaves_the_others_their_times(monkeypatch, case):
    def refuse(*_):
        raise RuntimeError("not captured")

    monkeypatch.setattr(times, "PEERS", (replace(times.PEERS[0], why_not=lambda *_: None, prepare=refuse),))
    monkeypatch.setattr(times, "ways", lambda c, d: [("ours", lambda: (torch.ones(3), None)), ("fla", refuse)])
    row = times.measured(times.tiny(case), "cpu")
    assert row["ours"]["python us"] > 0 and "not captured" in row["fla"]["note"]


def test_cases_ask_for_what_the_goals_are_about():
    shapes = {(case.op, case.shape.H, case.shape.HV) for case in times.CASES}
    assert {("forward", 2, 8), ("forward", 64, 64), ("train", 16, 32)} <= shapes
    states = [case.shape.B * case.shape.HV for case in times.CASES if case.op == "decode"]
    assert states[0] == 1 and states[-1] == 4096
    assert any(case.shape.lengths for case in times.CASES) and Shape(T=8192, H=32, HV=32, K=128, V=128) in {
        case.shape for case in times.CASES
    }
