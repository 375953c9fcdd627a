"""ggml, in float32 on the CPU; its graph is in ggml_graph.py."""

from __future__ import annotations

import importlib.util
from typing import Any

import torch

from ..cases import Case
from .peer import Prepared


def why_not(case: Case, device: str) -> str | None:
    if importlib.util.find_spec("ggml") is None:
        return "ggml-python is not installed"
    if torch.device(device).type != "cpu" or case.dtype != torch.float32:
        return "its op runs on the CPU in float32"
    if not case.rule.delta:
        return "its op has the delta rule"
    if case.op == "train":
        return "its op has no gradient"
    if case.shape.K != case.shape.V:
        return "its op wants K = V"
    return None


def prepare(case: Case, inputs: dict[str, Any], threads: int) -> Prepared:
    from . import ggml_graph

    return ggml_graph.prepare(case, inputs, threads)
