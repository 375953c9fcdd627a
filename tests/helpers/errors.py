"""One call by a backend and by the float64 reference, results and gradients side by side."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor

import sleepkern
from helpers.raw_gates import raw_inputs
from sleepkern.rules import Rule
from sleepkern.testing import Shape, call, make_inputs, relative_error, to_float64


def errors(
    rule: Rule,
    shape: Shape,
    dtype: torch.dtype = torch.float32,
    passes: int | None = None,
    outputs: bool = True,
    upstream: str = "both",
    normalize: bool = False,
    forget: bool = False,
    backend: str = "triton",
    method: str = "auto",
    tol: float | None = None,
    gradients: bool = True,
    **inputs: Any,
) -> dict[str, float]:
    """Relative errors of o, state and every gradient.

    passes: of sleep_ingest; None for the rule's own function. upstream: which gradients come from above, "o", "state"
    or "both". outputs False leaves q out. forget: one token decays by -inf. inputs: options of `make_inputs`, or with
    raw=True those of `raw_inputs`.
    """
    x, do, dstate = _drawn(rule, shape, dtype, outputs, upstream, normalize, forget, **inputs)
    options: dict[str, Any] = {"passes": passes, "normalize": normalize, "tol": tol, "gradients": gradients}
    actual = results(rule, x, backend, do, dstate, method=method, **options)
    drawn = (rule, shape, dtype, outputs, upstream, normalize, forget, *sorted(inputs.items()))
    expected = _expected(drawn, *options.items())
    assert actual.keys() == expected.keys()
    return {name: _error(actual[name], expected[name]) for name in expected}


def _drawn(
    rule: Rule,
    shape: Shape,
    dtype: torch.dtype,
    outputs: bool,
    upstream: str,
    normalize: bool,
    forget: bool,
    **inputs: Any,
) -> tuple[dict[str, Any], Tensor | None, Tensor | None]:
    """Inputs and the gradients from above."""
    draw = raw_inputs if inputs.pop("raw", False) else make_inputs
    x = draw(rule, shape, dtype, seed=3, **inputs)
    if normalize:
        x["q"], x["k"] = 3 * x["q"], 0.5 * x["k"]
    if forget:
        x["g"][:, shape.T // 2] = -torch.inf
    generator = torch.Generator().manual_seed(5)
    do = torch.randn(x["v"].shape, generator=generator).to(dtype) if upstream != "state" else None
    dstate = torch.randn(shape.sequences, shape.HV, shape.K, shape.V, generator=generator)
    if not outputs:
        x["q"], do = None, None
    return x, do, dstate if upstream != "o" else None


@cache
def _expected(drawn: tuple[Any, ...], *options: tuple[str, Any]) -> dict[str, Tensor]:
    """The reference's results, kept: it takes most of the time, and thread orders share it."""
    x, do, dstate = _drawn(*drawn[:7], **dict(drawn[7:]))
    return results(drawn[0], to_float64(x), "reference", do, dstate, **dict(options))


def _error(actual: Tensor, expected: Tensor) -> float:
    """relative_error, but for results too small for float32, such as gradients through exp(-200)."""
    if float(expected.norm()) < 1e-30:
        return 0.0 if float(actual.norm()) <= 1e-30 else float("inf")  # NaN is not <=
    return relative_error(actual, expected)


def results(
    rule: Rule,
    x: dict[str, Any],
    backend: str,
    do: Tensor | None,
    dstate: Tensor | None,
    passes: int | None = None,
    normalize: bool = False,
    method: str = "auto",
    tol: float | None = None,
    gradients: bool = True,
) -> dict[str, Tensor]:
    """o, state and the gradients of all tensors, by name; what no gradient reaches is left out."""
    leaves = {}
    if gradients:
        leaves = {n: t.detach().clone().requires_grad_() for n, t in x.items() if isinstance(t, Tensor) and n in NAMES}
    y = {**x, **leaves}
    if passes is None and x["q"] is not None:
        o, state = call(rule, y, backend, use_qk_l2norm_in_kernel=normalize)
    else:
        slept = sleepkern.sleep_ingest(
            **y,
            passes=passes or 1,
            rule=rule,
            backend=backend,
            use_qk_l2norm_in_kernel=normalize,
            method=method,
            tol=tol,
        )
        o, state = slept.output, slept.final_state
    assert state is not None
    pairs = [(t, d.to(t)) for t, d in ((o, do), (state, dstate)) if t is not None and d is not None]
    if gradients:
        torch.autograd.backward([t for t, _ in pairs], [d for _, d in pairs])
    made = {"o": o, "state": state, **{n: t.grad for n, t in leaves.items()}}
    return {name: t.detach() for name, t in made.items() if t is not None}


def gradients(rule: Rule, x: dict[str, Any], backend: str, do: Tensor, dstate: Tensor) -> dict[str, Tensor]:
    """The gradients of all tensors of a call with outputs, by name."""
    found = results(rule, x, backend, do, dstate)
    return {name: t for name, t in found.items() if name in NAMES}


NAMES = ("q", "k", "v", "g", "beta", "initial_state", "A_log", "dt_bias")
