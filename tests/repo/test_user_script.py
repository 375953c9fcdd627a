"""The user's script of the wheel check runs, and uses every public name."""

from __future__ import annotations

import ast
import importlib
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "packaging" / "user_script.py"
PACKAGES = (
    "sleepkern", "sleepkern.ops", "sleepkern.nn", "sleepkern.sleep", "sleepkern.integrations.transformers",
    "sleepkern.integrations.fla", "sleepkern.integrations.serving", "sleepkern.testing", "sleepkern.measure",
    "sleepkern.experiments.tasks", "sleepkern.experiments.training",
)  # fmt: skip
INSIDE = {"run"}
"""Step 1 of an operator, which rules of one's own call; its arguments are no public types."""


@pytest.mark.parametrize("package", PACKAGES)
def test_every_public_name_is_used(package: str) -> None:
    nodes = list(ast.walk(ast.parse(SCRIPT.read_text())))
    used = {node.id for node in nodes if isinstance(node, ast.Name)}
    used |= {node.attr for node in nodes if isinstance(node, ast.Attribute)}
    assert set(importlib.import_module(package).__all__) - used - INSIDE == set()


def test_it_runs(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, str(SCRIPT)], cwd=tmp_path, env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True,
        text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
