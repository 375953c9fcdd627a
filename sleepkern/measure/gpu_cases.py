"""What is measured on a GPU, in bfloat16; each suite answers one question (docs/performance/how_we_measure.md)."""

from __future__ import annotations

import torch

from ..rules import DELTA_RULE, GATED_DELTA_RULE, GLA, KDA, SIMPLE_GLA, Rule
from ..testing import Shape
from .cases import AnyCase, Case, Op

SECONDS_PER_CASE = 9
"""Estimate of what a case takes when quick: compiling, checking, and 2 s of timing."""


def _case(
    op: Op, T: int, lanes: int = 32, K: int = 128, rule: Rule = GATED_DELTA_RULE, groups: int = 1, passes: int = 1
) -> Case:
    """lanes: B times HV, at most 32 heads each; groups: value heads of a key head."""
    HV = min(lanes, 32)
    shape = Shape(B=lanes // HV, T=T, H=HV // groups, HV=HV, K=K, V=K)
    return Case(op, rule, shape, torch.bfloat16, passes=passes)


_BOTH: tuple[Op, ...] = ("forward", "train")
_RULES = (KDA, DELTA_RULE, SIMPLE_GLA, GLA)

SUITES: dict[str, tuple[AnyCase, ...]] = {
    "forward": tuple(
        _case("forward", T, lanes, K) for K in (128, 64) for lanes in (32, 128) for T in (2048, 8192, 32768)
    ),
    "train": tuple(_case("train", T, lanes, K) for K in (128, 64) for lanes in (32, 128) for T in (2048, 8192)),
    "heads": tuple(_case(op, 8192, groups=groups) for groups in (16, 8) for op in _BOTH),
    "rules": tuple(_case(op, 8192, rule=rule) for rule in _RULES for op in _BOTH),
    "state": tuple(_case("ingest", 8192, lanes) for lanes in (32, 128)),
    "replay": tuple(
        _case("ingest", T, lanes, passes=passes)
        for T in (64, 512, 2048)
        for passes in (4, 8, 16)
        for lanes in (32, 128)
    )
    + tuple(_case("ingest", T, rule=KDA, passes=8) for T in (64, 512)),
    "decode": tuple(_case("decode", 1, lanes) for lanes in (16, 128, 1024)) + (_case("decode", 1, 128, rule=KDA),),
    "tiny": tuple(
        Case(op, GATED_DELTA_RULE, Shape(B=256, T=24, H=4, HV=4, K=64, V=64), torch.bfloat16) for op in _BOTH
    ),
}

QUICK: dict[str, tuple[AnyCase, ...]] = {
    "forward": tuple(_case("forward", T, lanes) for lanes, T in ((32, 2048), (32, 8192), (128, 8192), (32, 32768)))
    + (_case("forward", 8192, K=64),),
    "train": (_case("train", 8192), _case("train", 8192, K=64)),
    "heads": (_case("forward", 8192, groups=16), _case("forward", 8192, groups=8)),
    "rules": (
        _case("forward", 8192, rule=KDA),
        _case("train", 8192, rule=KDA),
        _case("forward", 8192, rule=SIMPLE_GLA),
    ),
    "state": (_case("ingest", 8192),),
    "replay": (_case("ingest", 64, passes=8), _case("ingest", 512, passes=8), _case("ingest", 2048, passes=16)),
    "decode": (_case("decode", 1, 16), _case("decode", 1, 1024)),
    "tiny": SUITES["tiny"],
}
"""The same questions in 20 cases, for `make gpu-check`: about three minutes."""
