"""Calls whose gates are raw projections: their inputs, and the same call with gates made here, from the formulas."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from sleepkern.rules import Rule
from sleepkern.testing import Shape, make_inputs

OPTIONS = ("use_gate_in_kernel", "A_log", "dt_bias", "lower_bound", "use_beta_sigmoid_in_kernel", "allow_neg_eigval")


def raw_inputs(
    rule: Rule,
    shape: Shape,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    lower_bound: float | None = None,
    allow_neg_eigval: bool = False,
    rate: tuple[float, float] = (0.01, 1.0),
    gate_dtype: torch.dtype | None = None,
    spread: float = 2.0,
    correlation: float = 0.0,
) -> dict[str, Any]:
    """The arguments of a rule's function with raw gates; exp(A_log) is drawn from the range `rate`."""
    x = make_inputs(rule, shape, dtype, seed, correlation=correlation)
    generator = torch.Generator().manual_seed(seed + 1)

    def normal(*size: int) -> Tensor:
        return torch.randn(size, generator=generator)

    gate_dtype = gate_dtype or dtype
    parameters = torch.float64 if dtype == torch.float64 else torch.float32
    x |= {"use_beta_sigmoid_in_kernel": True, "allow_neg_eigval": allow_neg_eigval}
    x["beta"] = (spread * normal(*x["v"].shape[:3])).to(gate_dtype)
    if rule.gate == "none":
        return x
    width = (shape.K,) if rule.gate == "channel" else ()
    x["g"] = (spread * normal(*x["v"].shape[:3], *width)).to(gate_dtype)
    low, high = rate
    x["A_log"] = (low + (high - low) * torch.rand(shape.HV, generator=generator)).log().to(parameters)
    x["dt_bias"] = normal(shape.HV, *width).to(parameters)
    return x | {"use_gate_in_kernel": True, "lower_bound": lower_bound}


def with_made_gates(x: dict[str, Any]) -> dict[str, Any]:
    """The same call with its gates made, in the type of its tensors."""
    made = dict(x)
    options = (
        "use_gate_in_kernel",
        "A_log",
        "dt_bias",
        "use_beta_sigmoid_in_kernel",
        "allow_neg_eigval",
        "lower_bound",
    )
    use_gate, A_log, dt_bias, use_sigmoid, doubled, lower_bound = (made.pop(name, None) for name in options)
    if use_gate:
        raw = made["g"] + (0 if dt_bias is None else dt_bias.reshape(made["g"].shape[2:]))
        rate = 1 if A_log is None else A_log.exp().reshape(-1, *(1,) * (raw.dim() - 3))
        softplus = raw.clamp_min(0) + torch.log1p(torch.exp(-raw.abs()))
        made["g"] = -rate * softplus if lower_bound is None else lower_bound / (1 + torch.exp(-rate * raw))
    if use_sigmoid:
        made["beta"] = (2 if doubled else 1) / (1 + torch.exp(-made["beta"]))
    return made
