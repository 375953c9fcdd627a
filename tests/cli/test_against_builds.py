"""`bench --against` with builds that are there: copies of this one, made slow, wrong or incomplete."""

import shlex
import shutil
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

import sleepkern
from sleepkern.cli import app
from sleepkern.measure import against, builds

PACKAGE = Path(sleepkern.__file__).parent
SLOW = """
import time
def _slower(function):
    def call(*arguments, **options):
        start = time.perf_counter()
        result = function(*arguments, **options)
        end = start + {factor} * (time.perf_counter() - start)
        while time.perf_counter() < end:
            pass
        return result
    return call
gated_delta_rule = _slower(gated_delta_rule)
"""
WRONG = """
_right = kda
def kda(*arguments, **options):
    o, state = _right(*arguments, **options)
    return 1.001 * o, state
"""
FEW = against.Effort(rounds=2, most_rounds=2, turns=2, seconds=0.02, false_alarm=2.0)
"""Two rounds that agree are enough for two cases, which a factor of two in one of them needs. Noise is not tested."""


@pytest.fixture
def build(tmp_path):
    """A copy of this build."""
    shutil.copytree(PACKAGE, tmp_path / "copy" / "sleepkern", ignore=shutil.ignore_patterns("__pycache__"))
    return tmp_path / "copy"


def plant(build, *code):
    with (build / "sleepkern" / "__init__.py").open("a") as file:
        file.writelines(code)


def bench_copy(build, monkeypatch, *arguments):
    """`bench` of the copy against this build, as (exit status, output)."""
    monkeypatch.setattr(against, "this_build", lambda: builds.Build(build, sys.executable, build))
    return invoke(PACKAGE.parent, *arguments)


def invoke(other, *arguments):
    sizes = ("--H", "2", "--K", "64", "--V", "64")
    command = ["bench", "--against", str(other), "--quick", *sizes, *arguments]
    result = CliRunner().invoke(app, command, env={"COLUMNS": "200"})
    return result.exit_code, result.output


def line(text, rule):
    return next(line for line in text.splitlines() if line.startswith(f" forward {rule}"))


def test_a_slow_and_a_wrong_build_are_seen(build, monkeypatch):
    monkeypatch.setattr(against, "QUICK", FEW)
    plant(build, SLOW.format(factor=2), WRONG)
    code, text = bench_copy(build, monkeypatch, "--T", "512", "--rule", "gated_delta_rule", "--rule", "kda")
    assert code == 1, text
    assert "worse" in line(text, "gated_delta_rule") and "wrong" in line(text, "kda"), text


@pytest.mark.parametrize(
    ("spoil", "expected"),
    [
        (lambda package: [path.unlink() for path in package.glob("_C*.so")], "whose sleepkern has no compiled _C"),
        (lambda package: (package / "rules.py").write_text("1 / 0"), "cannot be imported: ZeroDivisionError"),
    ],
    ids=["no _C", "no import"],
)
def test_a_folder_that_is_no_build_is_one_sentence(build, spoil, expected):
    spoil(build / "sleepkern")
    code, text = invoke(build, "--T", "9", "--rule", "kda")
    assert code == 2 and expected in " ".join(text.replace("│", " ").split()), text


def test_a_python_that_imports_sleepkern_is_a_build(tmp_path, monkeypatch):
    """A virtual environment's interpreter, which has its own packages, whatever PYTHONPATH says."""
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    python = tmp_path / "python"
    folder, program = shlex.quote(str(PACKAGE.parent)), shlex.quote(sys.executable)
    python.write_text(f'#!/bin/sh\ntest -z "$PYTHONPATH" && PYTHONPATH={folder} exec {program} "$@"\n')
    python.chmod(0o755)
    with builds.Worker(builds.build_at(python)) as worker:
        assert Path(worker.facts().file).parent == PACKAGE


@pytest.mark.parametrize(
    ("code", "expected"),
    [
        ("no program", "which cannot run: Exec format error; expected a folder with a compiled sleepkern"),
        ("#!/bin/sh\necho no JSON\n", "cannot be imported: its process wrote 'no JSON', which is no answer"),
        ("#!/bin/sh\necho 1\n", "cannot be imported: its process wrote '1', which is no answer"),
        ("#!/bin/sh\necho this one >&2; exit 3\n", "cannot be imported: this one"),
    ],
    ids=["no program", "no JSON", "a number", "ends"],
)
def test_a_program_that_is_no_python_is_one_sentence(tmp_path, code, expected):
    program = tmp_path / "a [b] program"
    program.write_text(code)
    program.chmod(0o755)
    code, text = invoke(program, "--T", "9", "--rule", "kda")
    assert code == 2 and expected in " ".join(text.replace("│", " ").split()), text


def test_a_folder_may_link_to_the_package(tmp_path):
    (tmp_path / "sleepkern").symlink_to(PACKAGE)
    with builds.Worker(builds.build_at(tmp_path)) as worker:
        assert Path(worker.facts().file).resolve().parent == PACKAGE


@pytest.mark.alone
def test_a_tenth_is_seen_and_the_same_code_is_not(build, monkeypatch):
    plant(build, SLOW.format(factor=1.1))
    rules = ("gated_delta_rule", "kda", "gla")
    code, text = bench_copy(build, monkeypatch, "--T", "256", *(x for rule in rules for x in ("--rule", rule)))
    assert code == 1, text
    assert "worse" in line(text, "gated_delta_rule"), text
    assert all("within noise" in line(text, rule) for rule in rules[1:]), text
