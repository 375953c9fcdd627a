"""FlashQLA (https://github.com/QwenLM/FlashQLA): the gated delta rule in TileLang, for Hopper and newer."""

from __future__ import annotations

import importlib
import importlib.util
from typing import Any

import torch

from ..cases import Case, Result
from .peer import Prepared, in_passes

WIDTH = 128
"""The only K and V that its kernels have."""


def why_not(case: Case, device: str) -> str | None:
    if torch.device(device).type != "cuda":
        return "runs on a GPU only"
    if importlib.util.find_spec("flash_qla") is None:
        return "FlashQLA is not installed"
    if case.rule.name != "gated_delta_rule":
        return "has the gated delta rule only"
    if case.op == "decode":
        return "has no decode"
    if case.dtype not in (torch.bfloat16, torch.float16):
        return "takes bfloat16 and float16 only"
    if (case.shape.K, case.shape.V) != (WIDTH, WIDTH):
        return f"takes K = V = {WIDTH} only"
    return None


def prepare(case: Case, inputs: dict[str, Any], threads: int) -> Prepared:
    function = importlib.import_module("flash_qla").chunk_gated_delta_rule

    def forward(x: dict[str, Any]) -> Result:
        o, state = function(
            x["q"], x["k"], x["v"], x["g"], x["beta"],
            initial_state=x["initial_state"], output_final_state=True, cu_seqlens=x.get("cu_seqlens"),
        )  # fmt: skip
        return o, state

    return in_passes(case, inputs, forward)
