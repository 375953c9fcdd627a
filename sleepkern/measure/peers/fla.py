"""flash-linear-attention, on a GPU."""

from __future__ import annotations

import importlib
import importlib.util
import os
from types import ModuleType
from typing import Any

import torch

from ..cases import Case, Result
from .peer import Prepared, in_passes


def why_not(case: Case, device: str) -> str | None:
    if torch.device(device).type != "cuda":
        return "runs on a GPU only"
    if importlib.util.find_spec("fla") is None:
        return "flash-linear-attention is not installed"
    if case.shape.H != case.shape.HV and case.rule.name != "gated_delta_rule":
        return "wants as many key as value heads"
    return None


def prepare(case: Case, inputs: dict[str, Any], threads: int) -> Prepared:
    form = "fused_recurrent" if case.op == "decode" else "chunk"
    os.environ.setdefault("FLA_FLASH_QLA", "0")  # its own kernels, also where FlashQLA is installed
    module: ModuleType = importlib.import_module(f"fla.ops.{case.rule.name}")
    function = getattr(module, f"{form}_{case.rule.name}")

    def forward(x: dict[str, Any]) -> Result:
        options: dict[str, Any] = {} if x["g"] is None else {"g": x["g"]}
        value = x["v"]
        if case.rule.delta:
            options["beta"] = x["beta"]
        else:
            value = value * x["beta"][..., None]
        if x.get("cu_seqlens") is not None:
            options["cu_seqlens"] = x["cu_seqlens"]
        if case.rule.name == "gla" and case.op == "decode":
            options["gk"] = options.pop("g")
        result = function(
            x["q"],
            x["k"],
            value,
            initial_state=x["initial_state"],
            output_final_state=True,
            **options,
        )
        return result[0], result[1]

    return in_passes(case, inputs, forward)
