"""transformers: the torch functions its models fall back to."""

from __future__ import annotations

import importlib
import importlib.util
import inspect
from collections.abc import Callable
from typing import Any

import torch

from ..cases import Case, Result
from .peer import Prepared, in_passes


def why_not(case: Case, device: str) -> str | None:
    if importlib.util.find_spec("transformers") is None:
        return "transformers is not installed"
    if case.rule.name == "gla":
        return "transformers has no model with this rule"
    if case.rule.name == "simple_gla" and case.op == "decode":
        return "Mamba-2's step in transformers has another interface"
    if case.rule.name == "kda" and case.shape.H != case.shape.HV:
        return "transformers' function wants as many key as value heads"
    return None


def prepare(case: Case, inputs: dict[str, Any], threads: int) -> Prepared:
    if case.rule.name == "simple_gla":
        return in_passes(case, inputs, _mamba2)
    if case.rule.name == "kda":
        functions = ("chunk_kimi_delta_attention", "recurrent_kimi_delta_attention")
        module = "kimi_linear.modeling_kimi_linear"
    else:
        functions = ("torch_chunk_gated_delta_rule", "torch_recurrent_gated_delta_rule")
        module = "qwen3_next.modeling_qwen3_next"
    function = _torch_function(module, functions[case.op == "decode"])

    def forward(x: dict[str, Any]) -> Result:
        g = torch.zeros_like(x["beta"]) if x["g"] is None else x["g"]
        result: Result = function(
            x["q"],
            x["k"],
            x["v"],
            g=g,
            beta=x["beta"],
            initial_state=x["initial_state"],
            output_final_state=True,
        )
        return result

    return in_passes(case, inputs, forward)


def _mamba2(x: dict[str, Any]) -> Result:
    """Mamba-2's scan with dt = 1 and A = g: x = beta v, B = k, C = scaled q, its state [B,HV,V,K];
    chunk as in its configuration."""
    scan = _torch_function("mamba2.modeling_mamba2", "mamba2_chunk_scan")
    value = x["v"] * x["beta"][..., None]
    query = x["q"] * x["q"].shape[-1] ** -0.5
    state = x["initial_state"].transpose(-1, -2)
    o, final = scan(
        value, torch.ones_like(x["g"]), x["g"], x["k"], query, chunk_size=256,
        initial_states=state, return_final_states=True,
    )  # fmt: skip
    return o.to(x["v"].dtype), final.transpose(-1, -2)


def _torch_function(module: str, name: str) -> Callable[..., Any]:
    """The torch function itself: the module's attribute may be wrapped to call fla, or patched to
    call sleepkern."""
    family = importlib.import_module(f"transformers.models.{module}")
    function: Callable[..., Any] = inspect.unwrap(getattr(family, name))
    if function.__module__ != family.__name__:
        raise RuntimeError(f"{name} of {family.__name__} is patched; undo the patch before measuring")
    return function
