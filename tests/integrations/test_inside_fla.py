"""flash-linear-attention itself, in a process that sees it: its signatures, its functions and models with ours."""

from __future__ import annotations

import inspect
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from filelock import FileLock
from helpers.build import shared
from helpers.hf_models import CLOSE, build, tokens
from torch import Tensor

import sleepkern
from sleepkern.integrations import fla
from sleepkern.integrations.fla.calls import CHANGING, HARMLESS
from sleepkern.testing import relative_error

FOLDERS = {
    "gated_delta_rule": "gated_delta_rule", "gdn": "gated_delta_rule", "gdn_gate": "gated_delta_rule", "kda": "kda",
    "kda_gate": "kda", "delta_rule": "delta_rule", "simple_gla": "simple_gla", "gla": "gla", "retention": "retention",
    "lightning_attn": "lightning_attn", "linear_attn": "linear_attn",
}  # fmt: skip
"""Where fla has functions of these endings, the first that fits."""
FLA = Path(sys.prefix) / "fla"
"""Where `make` puts flash-linear-attention: beside the other packages, for with it stock models crash on a CPU."""


SIGNATURES = f"""
import importlib, inspect, pkgutil
result = {{}}
for name in {list(fla.FUNCTIONS)}:
    rule = next(r for r in {list(FOLDERS)} if name.endswith(r))
    folder = {FOLDERS}[rule]
    package = importlib.import_module(f"fla.ops.{{folder}}")
    modules = [package]
    for found in pkgutil.iter_modules(package.__path__):
        try:
            modules.append(importlib.import_module(f"fla.ops.{{folder}}.{{found.name}}"))
        except ImportError:
            assert found.name in ("parallel", "backends"), found.name
    for module in modules:
        if hasattr(module, name):
            function = inspect.unwrap(getattr(module, name))
            found = inspect.signature(function).parameters.values()
            result[name] = [p.name for p in found if not p.kind.name.startswith("VAR")]
"""
REGISTERED = """
import sleepkern.integrations.fla as kernels
from fla.ops.gated_delta_rule import chunk_gated_delta_rule
from fla.ops.kda import chunk_kda
from fla.ops.simple_gla import fused_recurrent_simple_gla
from sleepkern.rules import GATED_DELTA_RULE, KDA, SIMPLE_GLA
from sleepkern.testing import Shape, call, make_inputs, relative_error

cases = ((GATED_DELTA_RULE, chunk_gated_delta_rule), (KDA, chunk_kda), (SIMPLE_GLA, fused_recurrent_simple_gla))
result = []
for registered in (False, True):
    for rule, function in cases:
        x = make_inputs(rule, Shape(T=70))
        if not rule.delta:
            x["beta"] = None
        given = {n: x[n] for n in ("q", "k", "v", "g", "beta", "initial_state") if x[n] is not None}
        try:
            o = function(**given)[0]
        except Exception:
            assert not registered
        else:
            result.append(float(relative_error(o, call(rule, x, "reference")[0])))
    kernels.register()
"""
MODEL = """
from helpers.hf_models import build, tokens
from sleepkern.integrations.transformers import patch
model, ids = build("FAMILY"), tokens(1, 30)
with torch.no_grad():
    try:
        model(ids)
        crashed = False
    except Exception:
        crashed = True
    with patch("FAMILY"):
        result = [crashed, model(ids).logits.tolist()]
"""
CRASHING = ("qwen3_next", "kimi_linear")
PROGRAMS = {"signatures": SIGNATURES, "registered": REGISTERED, **{f: MODEL.replace("FAMILY", f) for f in CRASHING}}
"""Each leaves what it found in `result`."""
IN_FLA = """
import json, os, sys, traceback
from pathlib import Path
import fla, torch, transformers

torch.set_num_threads(1)
folder, programs = Path(sys.argv[1]), json.loads(sys.argv[2])
for name, program in programs.items():
    child = os.fork()
    if child == 0:
        scope = {"torch": torch}
        try:
            exec(program, scope)
            (folder / name).write_text(json.dumps(scope["result"]))
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stderr.flush()
            os._exit(0)
    os.waitpid(child, 0)
"""


@pytest.fixture(scope="module")
def in_fla(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Any]:
    """What a program finds in a process that sees flash-linear-attention.

    Importing that takes long: one process does so for all runs of the tests and all programs, which are its forks.
    """
    if not FLA.is_dir():
        pytest.skip(f"flash-linear-attention is not in {FLA}; `make` puts it there")
    tests = Path(__file__).resolve().parents[1]
    path = os.pathsep.join([str(FLA), str(tests), str(tests.parent)])
    folder = shared(tmp_path_factory) / "fla"
    with FileLock(f"{folder}.lock"):
        if not folder.exists():
            folder.mkdir()
            done = subprocess.run(
                [sys.executable, "-c", IN_FLA, str(folder), json.dumps(PROGRAMS)],
                env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True, check=False,
            )  # fmt: skip
            (folder / "errors").write_text(done.stdout + done.stderr)

    def found(name: str) -> Any:
        assert (folder / name).exists(), (folder / "errors").read_text()
        return json.loads((folder / name).read_text())

    return found


def test_every_argument_of_flas_is_taken(in_fla: Callable[[str], Any]) -> None:
    """By name, and by position where fla's come so: each is a parameter of ours, known as harmless, or refused."""
    found = in_fla("signatures")
    broken = {"parallel_delta_rule"}  # fla 0.6 cannot import its own
    assert set(found) | broken == set(fla.FUNCTIONS)
    for name, theirs in found.items():
        ours = inspect.signature(fla.FUNCTIONS[name]).parameters
        positional = [p.name for p in ours.values() if p.kind == p.POSITIONAL_OR_KEYWORD]
        common = [n for n in theirs if n in positional]
        assert common == positional[: len(common)] == theirs[: len(common)], name
        assert set(theirs) <= {*ours, *HARMLESS, *CHANGING}, name


def test_registered_with_fla(in_fla: Callable[[str], Any]) -> None:
    """fla's own functions run on a CPU, where without it they look for a driver."""
    errors = in_fla("registered")
    assert len(errors) == 3 and max(errors) <= CLOSE


@pytest.mark.parametrize("family", CRASHING)
def test_models_run_where_fla_makes_them_crash(family: str, in_fla: Callable[[str], Any]) -> None:
    crashed, logits = in_fla(family)
    with torch.no_grad():
        stock: Tensor = build(family)(tokens(1, 30)).logits
    assert crashed and relative_error(torch.tensor(logits), stock) < CLOSE
    assert sleepkern.patch is not None
