"""The worst inputs that a search found, kept: they stay within what is allowed; and the search finds what is not."""

from __future__ import annotations

import pytest
import torch

from tests.hardening.worst_errors import errors, run_trial

KEPT = {
    ("gated_delta_rule", "float32"): (1030, 1015),
    ("gated_delta_rule", "bfloat16"): (1076,),
    ("gated_delta_rule", "float16"): (1062,),
    ("delta_rule", "float32"): (1066, 1051),
    ("delta_rule", "bfloat16"): (1037,),
    ("delta_rule", "float16"): (1038,),
    ("kda", "float32"): (1048, 1063),
    ("kda", "bfloat16"): (1094,),
    ("kda", "float16"): (1035,),
    ("simple_gla", "float32"): (1024, 1099),
    ("simple_gla", "bfloat16"): (1010,),
    ("simple_gla", "float16"): (1101,),
    ("gla", "float32"): (1087, 1102),
    ("gla", "bfloat16"): (1073,),
    ("gla", "float16"): (1074,),
}
"""Seeds of `python -m tests.hardening.worst_errors`."""


@pytest.mark.parametrize(("rule_name", "type_name"), KEPT)
def test_kept_seeds(rule_name: str, type_name: str) -> None:
    for seed in KEPT[rule_name, type_name]:
        beyond = [found for found in run_trial(rule_name, type_name, seed) if found.share > 1]
        assert not beyond, beyond


def test_errors_are_seen() -> None:
    truth = {"o": torch.ones(4).double(), "dk": torch.ones(4).double(), "dq": 1e-6 * torch.ones(4).double()}
    assert errors({n: 1.01 * t for n, t in truth.items()}, truth)["o"] == pytest.approx(0.01, rel=1e-3)
    assert errors({n: 2 * t for n, t in truth.items()}, truth)["dq"] == pytest.approx(1e-3, rel=1e-2)
    assert errors({**truth, "dk": truth["dk"] * float("nan")}, truth)["dk"] == float("inf")
