"""PyTorch citizenship: opcheck, torch.compile without breaks, autocast, checkpointing, threads, overhead."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

import sleepkern
from sleepkern import rules
from sleepkern.rules import Rule
from sleepkern.testing import TOLERANCE, Shape, call, make_inputs, relative_error, to_float64
from sleepkern.testing.tolerances import SAME_SUMS

SHAPE = Shape(B=2, T=20, H=1, HV=2, K=8, V=8)


def operands(rule: Rule, **options: Any) -> list[Tensor | None]:
    x = make_inputs(rule, SHAPE, **options)
    return [x[n] for n in ("q", "k", "v", "g", "beta", "initial_state", "cu_seqlens")]


@pytest.mark.parametrize("backend", ["cpu", "chunked"])
def test_opcheck(rule: Rule, backend: str) -> None:
    tensors = [t if t is None else t.requires_grad_() for t in operands(rule)]
    for outputs, tol in ((True, None), (False, None), (True, 1e-3)):
        arguments = [tensors[0] if outputs else None, *tensors[1:]]
        options = (rule.name, backend, 0.3, True, 3 if tol else 1, tol, "auto")
        torch.library.opcheck(torch.ops.sleepkern.ingest.default, (*arguments, *options))
    plain = [t if t is None else t.detach() for t in tensors]
    for places in ((), (torch.arange(len(plain[1])),)):
        torch.library.opcheck(torch.ops.sleepkern.step.default, (*plain, rule.name, backend, 0.3, True, *places))


@pytest.mark.parametrize("dynamic", [False, True])
def test_compile_whole_graph_with_gradients(rule: Rule, dynamic: bool) -> None:
    torch.compiler.reset()

    def model(x: dict[str, Any]) -> Tensor:
        o, S = call(rule, {**x, "v": x["v"] * 2}, use_qk_l2norm_in_kernel=True)
        assert S is not None
        return o.square().sum() + S.sum()

    compiled = torch.compile(model, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    for T in (20, 33):
        x = make_inputs(rule, Shape(T=T, K=8, V=8), seed=T)
        leaves = [{n: t if t is None else t.clone().requires_grad_() for n, t in x.items()} for _ in range(2)]
        for run, y in zip((model, compiled), leaves, strict=True):
            run(y).backward()
        for name, t in leaves[0].items():
            assert t is None or relative_error(leaves[1][name].grad, t.grad) < SAME_SUMS, name


def test_compile_step_and_replay() -> None:
    x = make_inputs(rules.KDA, Shape(T=2, K=8, V=8))

    def decode(q: Tensor, k: Tensor, v: Tensor, g: Tensor, b: Tensor, S: Tensor) -> Tensor:
        o, S = sleepkern.recurrent_step(q, k, v, g, b, S, rule=rules.KDA)
        r = sleepkern.sleep_ingest(k, v, g, b, passes=3, initial_state=S, rule=rules.KDA)
        return o.sum() + r.final_state.sum()

    names = ("q", "k", "v", "g", "beta", "initial_state")
    ours, theirs = [x[n].clone() for n in names], [x[n].clone() for n in names]
    compiled = torch.compile(decode, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(*ours), decode(*theirs))
    torch.testing.assert_close(ours[5], theirs[5])
    assert not torch.equal(ours[5], x["initial_state"])


def test_autocast_casts_queries_keys_values_only() -> None:
    x = make_inputs(rules.GATED_DELTA_RULE, SHAPE)
    x["k"] = x["k"].bfloat16()  # as a norm in float32 beside a projection in bfloat16 gives
    with torch.autocast("cpu", torch.bfloat16):
        o, S = call(rules.GATED_DELTA_RULE, x)
        chunked, _ = call(rules.GATED_DELTA_RULE, x, backend="chunked")
    assert o.dtype == torch.bfloat16 and S is not None and S.dtype == torch.float32
    exact = call(rules.GATED_DELTA_RULE, {**x, "k": x["k"].float()})[0]
    assert (
        relative_error(o, exact) < TOLERANCE[torch.bfloat16]
        and relative_error(chunked, exact) < TOLERANCE[torch.bfloat16]
    )


def test_autocast_leaves_float64_alone() -> None:
    """As torch's own does."""
    x = to_float64(make_inputs(rules.GATED_DELTA_RULE, SHAPE))
    exact, _ = call(rules.GATED_DELTA_RULE, x)
    with torch.autocast("cpu", torch.bfloat16):
        o, S = call(rules.GATED_DELTA_RULE, x)
    assert o.dtype == torch.float64 and torch.equal(o, exact) and S is not None and S.dtype == torch.float64


def test_gradient_checkpointing() -> None:
    x = make_inputs(rules.GATED_DELTA_RULE, SHAPE)
    grads = []
    for wrap in (False, True):
        v = x["v"].clone().requires_grad_()

        def run(v: Tensor) -> Tensor:
            return call(rules.GATED_DELTA_RULE, {**x, "v": v})[0].square().sum()

        (checkpoint(run, v, use_reentrant=False) if wrap else run(v)).backward()
        grads.append(v.grad)
    assert torch.equal(grads[0], grads[1])


def test_only_what_is_needed_gets_a_gradient() -> None:
    x = make_inputs(rules.GATED_DELTA_RULE, SHAPE)
    x["beta"] = x["beta"].requires_grad_()
    o, S = call(rules.GATED_DELTA_RULE, x)
    assert S is not None
    S.sum().backward()
    assert x["beta"].grad is not None and x["v"].grad is None


def test_step_records_gradients_when_asked() -> None:
    x = make_inputs(rules.GATED_DELTA_RULE, Shape(T=1))
    v = x["v"].clone().requires_grad_()
    state = x["initial_state"].clone()
    o, after = sleepkern.recurrent_step(x["q"], x["k"], v, x["g"], x["beta"], state)
    assert after is state and after.requires_grad
    (o.sum() + after.sum()).backward()
    assert v.grad is not None and bool((v.grad != 0).any())


def test_under_fake_tensors(rule: Rule) -> None:
    with torch._subclasses.FakeTensorMode() as mode:
        x = {n: t if t is None else mode.from_tensor(t) for n, t in make_inputs(rule, SHAPE).items()}
        o, S = call(rule, x)
    assert o.shape == (2, 20, 2, 8) and S is not None and S.shape == (2, 2, 8, 8)


@pytest.mark.parametrize("backend", [None, "chunked", "reference"])
def test_on_meta_tensors(rule: Rule, backend: str | None) -> None:
    for grad in (False, True):
        x = {n: t if t is None else t.to("meta").requires_grad_(grad) for n, t in make_inputs(rule, SHAPE).items()}
        o, S = call(rule, x, backend)
        assert o.is_meta and o.shape == (2, 20, 2, 8) and S is not None and S.is_meta and S.shape == (2, 2, 8, 8)
        assert o.requires_grad == grad


def test_calls_from_several_threads_agree(rule: Rule) -> None:
    x = make_inputs(rule, Shape(T=200, K=32, V=32))
    expected, _ = call(rule, x)
    results: list[Tensor] = []
    workers = [threading.Thread(target=lambda: results.append(call(rule, x)[0])) for _ in range(4)]
    for w in workers:
        w.start()
    for w in workers:
        w.join()
    assert len(results) == 4 and all(torch.equal(r, expected) for r in results)


@pytest.mark.alone
def test_call_overhead() -> None:
    """A plain call costs what some 7 of torch's own additions cost, a decode step 5, the long way 32.

    As ratios, taken in turns, they do not depend on how fast the machine is; on a busy one they swing by a third. In a
    process of its own, because torch.compile's hooks, once in use, slow every Python call.
    """
    command = [sys.executable, "-m", "tests.ops.overhead"]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=Path(__file__).resolve().parents[2])
    best = json.loads(done.stdout)
    assert best["step"] / best["add"] < 8, best
    assert best["call"] / best["add"] < 12, best
    assert best["packed"] / best["add"] < 48, best
