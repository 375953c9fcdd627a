"""bitsandbytes-cpu-fork as a peer: called as its function is named, and right where it is installed."""

import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest

import sleepkern
from sleepkern import rules
from sleepkern.measure.cases import Case, run
from sleepkern.measure.peers import PEERS, bitsandbytes
from sleepkern.testing import Shape, relative_error

FOLDER = Path(sys.prefix) / "peers"
"""The folder into which `make bench` installs the peer."""
CASES = (
    Case("forward", rules.GATED_DELTA_RULE, Shape(B=2, T=70, H=2, HV=2, K=32, V=48)),
    Case("forward", rules.DELTA_RULE, Shape(T=70, H=2, HV=2, K=32, V=32)),
    Case("decode", rules.GATED_DELTA_RULE, Shape(B=2, T=1, H=2, HV=2, K=32, V=32)),
    Case("ingest", rules.GATED_DELTA_RULE, Shape(B=2, T=20, H=2, HV=2, K=32, V=32), passes=3),
    Case("train", rules.GATED_DELTA_RULE, Shape(T=70, H=2, HV=2, K=32, V=32)),
)


def error(case):
    actual = bitsandbytes.prepare(case, case.inputs(), 1)()
    expected = run(case, case.inputs(), backend="reference")
    return max(relative_error(a, e) for a, e in zip(actual, expected, strict=True) if e is not None)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_it_is_called_as_its_function_is_named(monkeypatch, tmp_path, case):
    """A stand-in with its names, which computes by the reference; its threads are those of the case."""
    threads = []

    def function(q, k, v, beta=None, g=None, scale=None, initial_state=None, output_final_state=False):
        decay = {} if g is None else {"g": g}
        rule = sleepkern.delta_rule if g is None else sleepkern.gated_delta_rule
        options = {"initial_state": initial_state, "output_final_state": output_final_state, "backend": "reference"}
        return rule(q, k, v, beta=beta, scale=scale, **decay, **options)

    module = ModuleType("bitsandbytes.gdn_cpu")
    module.fused_recurrent_gated_delta_rule = function
    module.load_native = lambda: SimpleNamespace(omp_set_num_threads=threads.append)
    monkeypatch.setitem(sys.modules, "bitsandbytes", ModuleType("bitsandbytes"))
    monkeypatch.setitem(sys.modules, module.__name__, module)
    assert error(case) < 1e-5 and threads == [1]


def test_the_original_bitsandbytes_is_no_peer(monkeypatch, tmp_path):
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "bitsandbytes").mkdir()
    (tmp_path / "bitsandbytes" / "__init__.py").touch()
    assert bitsandbytes.why_not(CASES[0], "cpu") == "bitsandbytes-cpu-fork is not installed"
    (tmp_path / "bitsandbytes" / "gdn_cpu.py").touch()
    assert bitsandbytes.why_not(CASES[0], "cpu") is None and "bitsandbytes" not in sys.modules
    for rule, heads in ((rules.KDA, 2), (rules.GLA, 2), (rules.GATED_DELTA_RULE, 4)):
        assert bitsandbytes.why_not(Case("forward", rule, Shape(T=9, H=2, HV=heads, K=8, V=8)), "cpu") is not None
    assert "bitsandbytes" in [peer.name for peer in PEERS]


def test_it_agrees_with_the_reference():
    """In a process of its own: with it on the path transformers would find a bitsandbytes."""
    if not FOLDER.is_dir():
        pytest.skip(f"bitsandbytes-cpu-fork is not in {FOLDER}; `make bench` puts it there")
    tests = Path(__file__).resolve().parents[1]
    program = "from measure.test_bitsandbytes_peer import CASES, error; print(max(map(error, CASES)))"
    path = os.pathsep.join([str(FOLDER), str(tests), str(tests.parent)])
    environment = {**os.environ, "PYTHONPATH": path}
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert float(done.stdout.splitlines()[-1]) < 1e-5
