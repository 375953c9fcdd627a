"""Every backend x rule x type x shape class x variant against the float64 reference, forward and
all gradients.

The reference runs on the same inputs, rounded to the type under test, so an error is the kernel's
own. Errors are relative in norm and must stay within `testing.TOLERANCE`. Under strong decay the
gradient of beta may be one token's sum of v . dv / beta; there its error is taken relative to
those terms.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..backends import BACKENDS
from ..dispatch import Explanation, backend_named
from ..ops import recurrence as ops
from ..rules import RULES, Rule
from .inputs import AWKWARD_SHAPES, Shape, call, make_inputs, to_float64, type_name
from .tolerances import TOLERANCE

Progress = Callable[[str, int, int], None]
"""Called with (what is running, how many are done, how many there are)."""

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
PASSES = 3
TF32_TOLERANCE = 2e-3
_GRADIENTS = ("q", "k", "v", "g", "beta", "initial_state")

VARIANTS: dict[str, dict[str, Any]] = {
    "slow decay": {},
    "no decay": {"decay": "zero"},
    "strong decay": {"decay": "strong"},
    "extreme decay": {"decay": "extreme"},
    "mixed decay": {"decay": "mixed"},
    "beta to 2": {"beta_max": 2.0},
    "correlated keys": {"correlation": 0.9},
    "no initial state": {"initial_state": False},
}
"""Options of testing.make_inputs. The first is tried on every shape class, the others on VARIED."""

VARIED = ("T=65", "K=V=128", "grouped", "packed")
QUICK_SHAPES = ("one token", "T=17", "T=65", "K=V=128", "K=5 V=3", "grouped", "packed")
QUICK_VARIANTS = ("strong decay", "beta to 2")
QUICK_VARIED = ("T=65",)
STEPPED = ("one token", "T=15")
SLEPT = ("T=17", "T=65", "grouped", "packed")


@dataclass(frozen=True)
class Row:
    """One comparison.

    op       rule (forward and gradients), step (recurrent_step) or sleep (sleep_ingest, PASSES
             passes)
    errors   relative error of each result: o, state, dq, dk, dv, dg, dbeta, dinitial_state
    refused  the backend's reason, when it does not do this problem; then there are no errors
    """

    backend: str
    rule: str
    dtype: str
    op: str
    shape: str
    variant: str
    tolerance: float
    errors: dict[str, float] = field(default_factory=dict)
    refused: str | None = None

    @property
    def worst(self) -> float:
        """Largest error; 0 when refused."""
        return max(self.errors.values(), default=0.0)

    @property
    def passed(self) -> bool:
        """Every error within the tolerance (NaN is not)."""
        return all(error <= self.tolerance for error in self.errors.values())


@dataclass(frozen=True)
class Trial:
    """What is compared, on each backend in turn."""

    op: str
    rule: Rule
    dtype: torch.dtype
    shape: str
    size: Shape
    variant: str


def verify(
    backends: Sequence[str] | None = None,
    rules: Sequence[str] | None = None,
    dtypes: Sequence[torch.dtype] | None = None,
    quick: bool = False,
    device: str = "cpu",
    progress: Progress | None = None,
    shapes: Sequence[str | Shape] | None = None,
    tf32: bool = False,
) -> list[Row]:
    """Compare every backend with the float64 reference; one row per comparison, red ones have
    `passed` False.

    Args:
        backends, rules: names, default all. dtypes: default float32, bfloat16, float16.
        quick: fewer shapes and variants (about 20 seconds instead of minutes).
        device: where the backends run; the reference always runs on the CPU.
        progress: called with (text, done, total).
        shapes: names in testing.AWKWARD_SHAPES, default all (or a choice of them when quick), or shapes of your own,
            which are tried with every operation and variant.
        tf32: let float32 products round to tf32, as torch.set_float32_matmul_precision("high") does, and ask for
            TF32_TOLERANCE of them.

    Raises:
        ValueError: an unknown backend, rule or shape.
    """
    names = [b.NAME for b in BACKENDS] if backends is None else list(backends)
    for name in names:
        backend_named(name)
    chosen = [_known("rules", name, RULES) for name in (rules or RULES)]
    classes = _classes(shapes or (QUICK_SHAPES if quick else tuple(AWKWARD_SHAPES)))
    trials = [
        Trial(op, rule, dtype, shape, classes[shape], variant)
        for rule in chosen
        for dtype in dtypes or DTYPES
        for op, shape, variant in _plan(classes, quick)
        if variant_applies(rule, variant)
    ]
    rows = []
    for done, trial in enumerate(trials):
        if progress is not None:
            progress(f"{trial.rule.name} {type_name(trial.dtype)}", done, len(trials))
        with products("high" if tf32 else torch.get_float32_matmul_precision()):
            rows += _compare(trial, names, device, tf32)
    if progress is not None:
        progress("verified", len(trials), len(trials))
    return rows


@contextmanager
def products(precision: str) -> Iterator[None]:
    """How torch multiplies float32 matrices, and sleepkern's kernels on a GPU with it."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(precision)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def variant_applies(rule: Rule, variant: str) -> bool:
    """Tells whether the variant is another problem than the first one: decay needs a gate."""
    return "decay" not in VARIANTS[variant] or rule.gate != "none"


def _known(argument: str, name: str, table: dict[str, Any]) -> Any:
    if name not in table:
        raise ValueError(f"{argument}: got {name!r}; expected one of {', '.join(table)}")
    return table[name]


def _classes(shapes: Sequence[str | Shape]) -> dict[str, Shape]:
    """The shapes by name; one of the caller's own is named by its sizes."""
    found = {}
    for shape in shapes:
        if isinstance(shape, str):
            found[shape] = _known("shapes", shape, AWKWARD_SHAPES)
        else:
            name = f"B={shape.B} T={shape.T} H={shape.H} HV={shape.HV} K={shape.K} V={shape.V}"
            found[name if shape.lengths is None else f"{name} lengths={shape.lengths}"] = shape
    return found


def _plan(classes: Iterable[str], quick: bool) -> Iterator[tuple[str, str, str]]:
    """(op, shape class, variant) of every trial."""
    first, *others = VARIANTS
    for shape in classes:
        yield "rule", shape, first
        own = shape not in AWKWARD_SHAPES
        if own or shape in (QUICK_VARIED if quick else VARIED):
            for variant in QUICK_VARIANTS if quick else others:
                yield "rule", shape, variant
        if own or shape in STEPPED:
            yield "step", shape, first
        if own or shape in (QUICK_VARIED if quick else SLEPT):
            yield "sleep", shape, first


def _compare(trial: Trial, backends: list[str], device: str, tf32: bool = False) -> list[Row]:
    rounded = tf32 and trial.dtype == torch.float32
    inputs = make_inputs(trial.rule, trial.size, trial.dtype, device=device, **VARIANTS[trial.variant])
    upstream = _upstream(inputs, trial.size)
    expected = None
    rows = []
    for backend in backends:
        row = Row(
            backend, trial.rule.name, "tf32" if rounded else type_name(trial.dtype), trial.op, trial.shape,
            trial.variant, TF32_TOLERANCE if rounded else TOLERANCE[trial.dtype],
            refused=_explain(trial, inputs).reasons[backend],
        )  # fmt: skip
        if row.refused is None:
            if expected is None:
                exact = to_float64(upstream)
                expected = _results(trial, to_float64(inputs), exact, "reference")
            row.errors.update(_errors(trial, _results(trial, inputs, upstream, backend), expected, inputs))
        rows.append(row)
    return rows


def _explain(trial: Trial, inputs: dict[str, Any]) -> Explanation:
    passes = PASSES if trial.op == "sleep" else 1
    return ops.explain(trial.rule, **inputs, passes=passes)


def _upstream(inputs: dict[str, Any], shape: Shape) -> dict[str, Tensor]:
    """Gradients that come from above: of the outputs, in the type of v, and of the final state."""
    generator = torch.Generator().manual_seed(1)
    v = inputs["v"]
    size = (shape.sequences, shape.HV, shape.K, shape.V)
    return {
        "o": torch.randn(v.shape, generator=generator).to(v.device, v.dtype),
        "state": torch.randn(size, generator=generator).to(v.device),
    }


def _results(trial: Trial, inputs: dict[str, Any], upstream: dict[str, Tensor], backend: str) -> dict[str, Tensor]:
    """All results of a trial by one backend, by name."""
    if trial.op == "step":
        q, k, v, g, beta, state, _ = inputs.values()
        stepped = ops.recurrent_step(q, k, v, g, beta, state.clone(), rule=trial.rule, backend=backend)
        return dict(zip(("o", "state"), stepped, strict=True))
    leaves = {n: inputs[n].detach().requires_grad_() for n in _GRADIENTS if inputs[n] is not None}
    x = {**inputs, **leaves}
    o: Tensor | None
    final: Tensor | None
    if trial.op == "sleep":
        slept = ops.sleep_ingest(**x, passes=PASSES, rule=trial.rule, backend=backend)
        o, final = slept.output, slept.final_state
    else:
        o, final = call(trial.rule, x, backend=backend)
    assert o is not None
    assert final is not None
    results = {"o": o, "state": final}
    grads = torch.autograd.grad([o, final], list(leaves.values()), [upstream["o"], upstream["state"]])
    return results | {f"d{name}": grad for name, grad in zip(leaves, grads, strict=True)}


def _errors(
    trial: Trial, actual: dict[str, Tensor], expected: dict[str, Tensor], inputs: dict[str, Any]
) -> dict[str, float]:
    cancels = VARIANTS[trial.variant].get("decay") in ("strong", "extreme")
    terms = _terms(inputs, expected) if cancels and "dbeta" in expected else {}
    return {name: _error(actual[name], exact, terms.get(name, 0.0)) for name, exact in expected.items()}


def _terms(inputs: dict[str, Any], expected: dict[str, Tensor]) -> dict[str, float]:
    """Norm of the terms whose sum is dbeta."""
    v = inputs["v"].double().cpu() * expected["dv"]
    return {"dbeta": float((v / inputs["beta"].double().cpu()[..., None].clamp_min(SMALLEST)).norm())}


SMALLEST = 1e-30
"""Norm below which a result counts as zero: gradients through exp(-20 T) leave the range of
float32."""


def _error(actual: Tensor, exact: Tensor, floor: float) -> float:
    """|actual - exact| over the larger of |exact|, floor and SMALLEST; infinite for NaN."""
    difference = float((actual.detach().double().cpu() - exact.detach()).norm())
    scale = max(float(exact.detach().norm()), floor, SMALLEST)
    return float("inf") if math.isnan(difference) else difference / scale
