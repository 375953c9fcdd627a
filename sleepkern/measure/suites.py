"""The suites of the bench table on a CPU, and the choice of a suite; those of a GPU are in gpu_cases.py."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from typing import Any

import torch

from ..rules import DELTA_RULE, GATED_DELTA_RULE, GLA, KDA, SIMPLE_GLA, Rule
from ..testing import Shape
from . import block_cases as stacks
from . import gpu_cases
from .cases import AnyCase, Case, Op
from .model_cases import ModelCase


def _cases(op: Op, *tokens: int, rule: Rule = GATED_DELTA_RULE, H: int = 16, K: int = 128, V: int =
128,
           **options: Any) -> tuple[Case, ...]:  # fmt: skip
    return tuple(Case(op, rule, Shape(T=T, H=H, HV=H, K=K, V=V), **options) for T in tokens)


_BOTH: tuple[Op, ...] = ("forward", "train")
_RULES = (GATED_DELTA_RULE, KDA, DELTA_RULE, SIMPLE_GLA, GLA)

SUITES: dict[str, tuple[AnyCase, ...]] = {
    "forward": _cases("forward", 512, 2048, 8192),
    "heads": _cases("forward", 2048, K=64, V=64) + _cases("forward", 2048, K=96, V=256),
    "types": _cases("forward", 2048, dtype=torch.bfloat16),
    "rules": sum((_cases("forward", 2048, rule=rule) for rule in _RULES[1:]), ()),
    "decode": _cases("decode", 1, 4, 16) + _cases("decode", 1, rule=KDA) + _cases("decode", 1, cached=True),
    "ingest": (
        _cases("ingest", 64, 512, passes=4)
        + _cases("ingest", 64, 512, 2048, passes=16)
        + _cases("ingest", 64, 512, passes=16, method="wy")
    ),
    "train": sum((_cases("train", 2048, rule=rule) for rule in (GATED_DELTA_RULE, KDA)), ()),
    "tiny": tuple(
        Case(op, GATED_DELTA_RULE, Shape(B=B, T=T, H=4, HV=4, K=64, V=64))
        for op in _BOTH
        for B, T in ((6, 1024), (256, 24), (256, 17))
    ),
    "threads": (
        _cases("forward", 2048, threads=2) + _cases("forward", 2048, H=1, threads=2) + _cases("train", 2048, threads=2)
    ),
    "model": (ModelCase("read", 2048), ModelCase("generate", 2048)),
    "blocks": stacks.CASES,
}
"""Suites of `bench`. H = 16 and K = V = 128 are the heads of Qwen3-Next, Kimi-Linear and OLMo-
Hybrid."""

QUICK: dict[str, tuple[AnyCase, ...]] = {
    "forward": _cases("forward", 512, 2048),
    "heads": _cases("forward", 1024, K=64, V=64) + _cases("forward", 512, K=96, V=256),
    "types": _cases("forward", 1024, dtype=torch.bfloat16),
    "rules": sum((_cases("forward", 256, rule=rule) for rule in _RULES[1:]), ()),
    "decode": _cases("decode", 1),
    "ingest": _cases("ingest", 64, passes=4),
    "train": _cases("train", 512),
    "tiny": (Case("train", GATED_DELTA_RULE, Shape(B=64, T=24, H=4, HV=4, K=64, V=64)),),
    "threads": _cases("forward", 2048, threads=2),
    "model": (ModelCase("read", 512), ModelCase("generate", 512)),
    "blocks": stacks.QUICK,
}
"""The same suites, shortened for `demo`."""


def select(suite: str, quick: bool, device: str = "cpu", names: Sequence[str] = ()) -> tuple[AnyCase, ...]:
    """Cases of a suite, or of all; those of a model only where transformers is installed.

    Args:
        suite: all, or the name of a suite.
        quick: the shortened suites.
        device: cpu or cuda.
        names: only cases whose name contains one of these texts; all cases where there is none.

    Raises:
        ValueError: an unknown suite, or of a model without transformers, or a text that no case's name contains.
    """
    suites = QUICK if quick else SUITES
    if torch.device(device).type == "cuda":
        suites = gpu_cases.QUICK if quick else gpu_cases.SUITES
    if suite != "all" and suite not in suites:
        raise ValueError(f"suite: got {suite!r}; expected all or one of {', '.join(suites)}")
    chosen = sum(suites.values(), ()) if suite == "all" else suites[suite]
    if importlib.util.find_spec("transformers") is None:
        chosen = tuple(case for case in chosen if not isinstance(case, ModelCase))
        if not chosen:
            raise ValueError(f"suite: got {suite!r}, for which transformers is not installed")
    for text in names:
        if not any(text in case.name for case in chosen):
            raise ValueError(f"case: got {text!r}; expected a part of a case's name, such as {chosen[0].name!r}")
    return tuple(case for case in chosen if not names or any(text in case.name for text in names))
