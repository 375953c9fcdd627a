"""Public names: what the package offers, and what it was called before."""

from __future__ import annotations

import importlib
import subprocess
import sys
from pathlib import Path

import pytest

import sleepkern

ROOT = Path(__file__).resolve().parents[2]


def test_every_public_name_is_there() -> None:
    assert all(getattr(sleepkern, name) is not None for name in sleepkern.__all__)
    assert set(sleepkern.__all__) <= set(dir(sleepkern))
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = sleepkern.nothing  # type: ignore[attr-defined]


@pytest.mark.parametrize("name", ["tasks", "training"])
def test_a_former_name_warns_and_is_the_same(name: str) -> None:
    sys.modules.pop(f"sleepkern.{name}", None)
    with pytest.warns(DeprecationWarning, match=f"sleepkern.experiments.{name}"):
        found = importlib.import_module(f"sleepkern.{name}")
    assert found is importlib.import_module(f"sleepkern.experiments.{name}")


def test_use_plans_warns_and_names_its_place() -> None:
    from sleepkern.backends.triton.plan import use_plans

    with pytest.warns(DeprecationWarning, match=r"sleepkern\.backends\.triton\.plan\.use_plans"):
        assert sleepkern.use_plans is use_plans  # type: ignore[attr-defined]
    assert "use_plans" not in sleepkern.__all__


@pytest.mark.parametrize("module", ["sleepkern.backends", "sleepkern.backends.interface"])
def test_backend_is_a_recurrence_backend(module: str) -> None:
    found = importlib.import_module(module)
    with pytest.warns(DeprecationWarning, match=rf"{module}\.Backend is {module}\.RecurrenceBackend"):
        assert found.Backend is found.RecurrenceBackend
    with pytest.raises(AttributeError, match="no attribute 'Nothing'"):
        _ = found.Nothing


@pytest.mark.parametrize("missing", ["typer", "rich", "matplotlib"])  # the last of them only where a plot is drawn
def test_the_command_line_says_what_it_needs(missing: str) -> None:
    command = "from sleepkern import cli; cli.main = lambda: __import__('matplotlib'); " * (missing == "matplotlib")
    code = f"import sys; sys.modules[{missing!r}] = None; {command}from sleepkern.__main__ import main; main()"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, cwd=ROOT)
    assert done.returncode == 1, done.stderr
    assert done.stderr == f"sleepkern: the command line needs {missing}; pip install 'sleepkern[cli]' brings it\n"
