"""flash-linear-attention's functions over ours; and ours inside the real one, in a process of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from hybrid_models import CLOSE, build, tokens
from torch import Tensor
from torch.nn import functional as F

import sleepkern
from sleepkern.integrations import fla
from sleepkern.rules import DELTA_RULE, GATED_DELTA_RULE, GLA, KDA, SIMPLE_GLA, Rule
from sleepkern.testing import Shape, call, make_inputs, relative_error, to_float64

SHAPE = Shape(B=2, T=70, H=2, HV=2, K=24, V=40)
NAMES = {
    GATED_DELTA_RULE: "gated_delta_rule", KDA: "kda", DELTA_RULE: "delta_rule", SIMPLE_GLA: "simple_gla", GLA: "gla",
}  # fmt: skip
FLA = Path(sys.prefix) / "fla"
"""Where `make` puts flash-linear-attention: beside the other packages, for with it stock models crash on a CPU."""


def inputs(rule: Rule) -> dict[str, Any]:
    x = make_inputs(rule, SHAPE)
    if not rule.delta:
        x["beta"] = None  # fla's have none
    return x


def named(rule: Rule, form: str, x: dict[str, Any]) -> dict[str, Any]:
    given = {name: x[name] for name in ("q", "k", "v", "g", "beta", "initial_state") if x[name] is not None}
    if rule is GLA and form == "fused_recurrent":
        given["gk"] = given.pop("g")
    return {**given, "output_final_state": True}


@pytest.mark.parametrize("form", ["chunk", "fused_recurrent"])
@pytest.mark.parametrize("rule", NAMES, ids=lambda r: r.name)
def test_functions_by_flas_names(rule: Rule, form: str) -> None:
    x = inputs(rule)
    o, state = getattr(fla, f"{form}_{NAMES[rule]}")(**named(rule, form, x), chunk_size=64, autotune_interval=8)
    expected_o, expected_state = call(rule, to_float64(x), "reference")
    assert relative_error(o, expected_o) <= CLOSE and relative_error(state, expected_state) <= CLOSE


@pytest.mark.parametrize("doubled", [True, False])
def test_gates_inside(doubled: bool) -> None:
    x, generator = inputs(GATED_DELTA_RULE), torch.Generator().manual_seed(2)
    raw, A_log, bias = (torch.randn(*size, generator=generator) for size in ((2, 70, 2), (2,), (2,)))
    logits = torch.randn(2, 70, 2, generator=generator)
    options = {"use_beta_sigmoid_in_kernel": True, "allow_neg_eigval": doubled, "use_qk_l2norm_in_kernel": True}
    gate = {"use_gate_in_kernel": True, "A_log": A_log, "dt_bias": bias}
    given = {**named(GATED_DELTA_RULE, "chunk", x), "g": raw, "beta": logits, **options, **gate}
    x["g"], x["beta"] = -A_log.exp() * F.softplus(raw + bias), (1 + doubled) * logits.sigmoid()
    expected, _ = call(GATED_DELTA_RULE, to_float64(x), "reference", use_qk_l2norm_in_kernel=True)
    for function in (fla.chunk_gated_delta_rule, fla.fused_recurrent_gated_delta_rule):
        assert relative_error(function(**given)[0], expected) <= CLOSE


@pytest.mark.parametrize("lower_bound", [None, -5.0])
def test_gates_of_channels_inside(lower_bound: float | None) -> None:
    x, generator = inputs(KDA), torch.Generator().manual_seed(2)
    raw, A_log, bias = (torch.randn(*size, generator=generator) for size in ((2, 70, 2, 24), (2,), (48,)))
    gate = {"use_gate_in_kernel": True, "A_log": A_log, "dt_bias": bias, "lower_bound": lower_bound}
    given = {**named(KDA, "chunk", x), "g": raw, **gate}
    shifted, rate = raw + bias.view(2, 24), A_log.exp()[:, None]
    x["g"] = -rate * F.softplus(shifted) if lower_bound is None else lower_bound * torch.sigmoid(rate * shifted)
    expected, _ = call(KDA, to_float64(x), "reference")
    for function in (fla.chunk_kda, fla.fused_recurrent_kda):
        assert relative_error(function(**given)[0], expected) <= CLOSE


def test_states_with_values_first() -> None:
    x = inputs(GATED_DELTA_RULE)
    given = named(GATED_DELTA_RULE, "chunk", x)
    o, state = fla.chunk_gated_delta_rule(**given)
    given["initial_state"] = given["initial_state"].transpose(-1, -2).contiguous()
    o_first, state_first = fla.chunk_gated_delta_rule(**given, state_v_first=True)
    assert torch.equal(o, o_first) and torch.equal(state, state_first.transpose(-1, -2))


def test_decay_by_head_and_channel_or_none() -> None:
    x = inputs(KDA)
    head = -0.1 * torch.rand(2, 70, 2)
    given = named(KDA, "chunk", x)
    gk = given.pop("g")
    expected, _ = call(KDA, to_float64({**x, "g": gk + head[..., None]}), "reference")
    assert relative_error(fla.fused_recurrent_gated_delta_rule(**given, g=head, gk=gk)[0], expected) <= CLOSE
    gamma = torch.tensor([-0.1, -0.5])
    x = inputs(SIMPLE_GLA)
    given = named(SIMPLE_GLA, "chunk", x)
    expected, _ = call(SIMPLE_GLA, to_float64({**x, "g": gamma.expand(2, 70, 2)}), "reference")
    del given["g"]
    assert relative_error(fla.chunk_simple_gla(**given, g_gamma=gamma)[0], expected) <= CLOSE
    none = fla.chunk_simple_gla(**given)[0]
    assert relative_error(none, fla.chunk_gla(**given)[0]) <= CLOSE


@pytest.mark.parametrize(("name", "value"), [("gv", torch.ones(1)), ("reverse", True), ("cp_context", object())])
def test_what_changes_the_result_is_refused(name: str, value: Any) -> None:
    x = inputs(GLA)
    with pytest.raises(ValueError, match=f"{name}: got .* expected None or False"):
        fla.fused_recurrent_gla(**{**named(GLA, "fused_recurrent", x), name: value})


def in_fla(code: str) -> Any:
    """What code leaves in `result`, in a process that sees flash-linear-attention."""
    if not FLA.is_dir():
        pytest.skip(f"flash-linear-attention is not in {FLA}; `make` puts it there")
    tests = Path(__file__).resolve().parent
    path = os.pathsep.join([str(FLA), str(tests), str(tests.parent)])
    program = f"import json, torch\n{code}\nprint('RESULT', json.dumps(result))"
    done = subprocess.run(
        [sys.executable, "-c", program], env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True,
        check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.split("RESULT")[1])


def test_every_argument_of_flas_is_taken() -> None:
    code = f"""
import importlib, inspect
result = {{}}
for rule in {list(NAMES.values())}:
    for form in ("chunk", "fused_recurrent"):
        name = f"{{form}}_{{rule}}"
        function = inspect.unwrap(getattr(importlib.import_module(f"fla.ops.{{rule}}"), name))
        result[name] = [p.name for p in inspect.signature(function).parameters.values() if p.kind.name != "VAR_KEYWORD"]
"""
    import inspect

    for name, theirs in in_fla(code).items():
        ours = inspect.signature(getattr(fla, name)).parameters
        positional = [p.name for p in ours.values() if p.kind == p.POSITIONAL_OR_KEYWORD]
        common = [n for n in theirs if n in positional]
        assert common == positional[: len(common)] == theirs[: len(common)], name
        inspect.signature(getattr(fla, name)).bind(**dict.fromkeys(theirs))


def test_registered_with_fla() -> None:
    """fla's own functions run on a CPU, where without it they look for a driver."""
    code = """
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
    errors = in_fla(code)
    assert len(errors) == 3 and max(errors) <= CLOSE


@pytest.mark.parametrize("family", ["qwen3_next", "kimi_linear"])
def test_models_run_where_fla_makes_them_crash(family: str) -> None:
    code = f"""
from hybrid_models import build, tokens
from sleepkern.integrations.transformers import patch
model, ids = build("{family}"), tokens(1, 30)
with torch.no_grad():
    try:
        model(ids)
        crashed = False
    except Exception:
        crashed = True
    with patch("{family}"):
        result = [crashed, model(ids).logits.tolist()]
"""
    crashed, logits = in_fla(code)
    with torch.no_grad():
        stock: Tensor = build(family)(tokens(1, 30)).logits
    assert crashed and relative_error(torch.tensor(logits), stock) < CLOSE
    assert sleepkern.patch is not None
