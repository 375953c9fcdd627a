"""A Qwen3-Next-shaped model, patched and stock: pytest benchmarks/ --benchmark-only -k model"""

import pytest

from sleepkern.measure import model_cases as models
from sleepkern.measure.suites import SUITES

pytest.importorskip("transformers")


@pytest.mark.parametrize("side", ["patched", "stock"])
@pytest.mark.parametrize("case", SUITES["model"], ids=lambda case: case.name)
def test_model(benchmark, rounds, case, side):
    with models.quiet_transformers():
        patched, stock = models.calls(models.hybrid_model(), case)
        benchmark.extra_info.update(tokens=case.timed_tokens)
        call = patched if side == "patched" else stock
        benchmark.pedantic(call, rounds=rounds(call), warmup_rounds=1)
