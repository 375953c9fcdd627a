"""torch's default type and device are the caller's business: no result depends on them, nor where it is written."""

from __future__ import annotations

import ast
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.backends import HERE
from torch import Tensor

import sleepkern
from sleepkern import rules
from sleepkern.nn import SleepLM, gated_rms_norm, short_convolution, short_convolution_step
from sleepkern.rules import Rule
from sleepkern.sleep import blocks as stack
from sleepkern.testing import Shape, call, make_inputs

Results = list[Tensor]
MAKERS = {"empty", "zeros", "ones", "full", "eye", "arange", "linspace", "tensor"}
PACKAGE = Path(sleepkern.__file__).parent
NATIVE = [*(PACKAGE / "backends").rglob("*.py"), *(PACKAGE / "nn").rglob("*.py")]


@pytest.fixture(params=[torch.bfloat16, torch.float64, "meta"], ids=str)
def foreign(request: pytest.FixtureRequest) -> Callable[[Callable[[], Results]], Results]:
    """Runs something under other defaults."""

    def run(work: Callable[[], Results]) -> Results:
        kind = request.param
        (torch.set_default_device if kind == "meta" else torch.set_default_dtype)(kind)
        try:
            return work()
        finally:
            torch.set_default_dtype(torch.float32)
            torch.set_default_device(None)

    return run


def same(ours: Results, expected: Results) -> None:
    assert len(ours) == len(expected) > 0
    for number, (a, b) in enumerate(zip(ours, expected, strict=True)):
        assert (a.dtype, a.device, a.shape) == (b.dtype, b.device, b.shape), number
        assert torch.equal(a, b), number


def differentiated(outputs: Results, leaves: list[Tensor]) -> Results:
    """Outputs, and the gradients of the sum of their squares."""
    loss = outputs[0].square().sum()
    for y in outputs[1:]:
        loss = loss + y.square().sum()
    return [*(y.detach() for y in outputs), *torch.autograd.grad(loss, leaves)]


def leaves_of(x: dict[str, Any]) -> tuple[dict[str, Any], list[Tensor]]:
    leaves = {n: t.requires_grad_() for n, t in x.items() if isinstance(t, Tensor) and t.is_floating_point()}
    return {**x, **leaves}, list(leaves.values())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("feedback", ["raw", "reinject"])
def test_sleep_blocks(foreign: Any, feedback: Any, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    model = SleepLM(50, width=64, heads=2, blocks=4, window=64)
    blocks, h = model.to(dtype).blocks(), torch.randn(3, 40, 64).to(dtype)

    @torch.no_grad()
    def work() -> Results:
        assert stack.why_not(h, blocks) is None
        stack.forget_packed(blocks)
        first = stack.sleep_blocks(h, blocks, passes=3, feedback=feedback)
        second = stack.sleep_blocks(h, blocks, first.states, passes=2)
        return [t for out in (first, second) for t in (out.h, out.changes, *(t for s in out.states for t in s))]

    same(foreign(work), work())


@pytest.mark.parametrize("backend", HERE)
@pytest.mark.parametrize("initial_state", [False, True])
def test_every_rule(foreign: Any, rule: Rule, backend: str, initial_state: bool) -> None:
    x, leaves = leaves_of(make_inputs(rule, Shape(B=2, T=70, H=1, HV=2, K=16, V=16), initial_state=initial_state))

    def work() -> Results:
        with torch.no_grad():
            plain = call(rule, x, backend)
        o, S = call(rule, x, backend)
        assert S is not None and plain[1] is not None
        return [plain[0], plain[1], *differentiated([o, S], leaves)]

    same(foreign(work), work())


@pytest.mark.parametrize(
    "options", [{"method": "affine"}, {"method": "wy"}, {"tol": 1e-3}, {"method": "repeat"}], ids=str
)
@pytest.mark.parametrize("outputs", [False, True])
def test_replay(foreign: Any, options: dict[str, Any], outputs: bool) -> None:
    x, leaves = leaves_of(make_inputs(rules.GATED_DELTA_RULE, Shape(T=512, H=1, HV=2, K=16, V=16)))
    if not outputs:
        leaves = [t for t in leaves if t is not x["q"]]
        x["q"] = None

    def work() -> Results:
        out = sleepkern.sleep_ingest(**x, passes=8, **options)
        more = [t for t in (out.residual, out.passes) if isinstance(t, Tensor)]
        return differentiated([t for t in (out.output, out.final_state) if t is not None], leaves) + more

    same(foreign(work), work())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("bare", [False, True])
def test_short_convolution(foreign: Any, dtype: torch.dtype, bare: bool) -> None:
    torch.manual_seed(0)
    x, weight, bias, past = (torch.randn(*size).to(dtype) for size in ((2, 300, 96), (96, 4), (96,), (2, 3, 96)))
    leaves = [t.requires_grad_() for t in ((x, weight) if bare else (x, weight, bias, past))]
    extra = {} if bare else {"bias": bias, "past": past}

    def work() -> Results:
        with torch.no_grad():
            state = x[:, :4].transpose(1, 2).contiguous()
            plain = [*short_convolution(x, weight, **extra), short_convolution_step(x[:, 4], state, weight), state]
        return plain + differentiated(list(short_convolution(x, weight, **extra)), leaves)

    same(foreign(work), work())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_gated_rms_norm(foreign: Any, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    leaves = [torch.randn(*size).to(dtype).requires_grad_() for size in ((2, 300, 4, 32), (2, 300, 4, 32), (32,))]

    def work() -> Results:
        with torch.no_grad():
            plain = gated_rms_norm(*leaves)
        return [plain, *differentiated([gated_rms_norm(*leaves)], leaves)]

    same(foreign(work), work())


@pytest.mark.parametrize("path", NATIVE, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_what_native_code_may_get_says_its_type_and_device(path: Path) -> None:
    calls = [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Call)]
    parameters = {id(c.args[0]) for c in calls if ast.unparse(c.func) == "nn.Parameter"}  # the caller's defaults
    for made in calls:
        module, _, name = ast.unparse(made.func).rpartition(".")
        if module == "torch" and name in MAKERS and id(made) not in parameters:
            said = {keyword.arg for keyword in made.keywords}
            assert None in said or {"dtype", "device"} <= said, f"line {made.lineno}: {ast.unparse(made)}"
