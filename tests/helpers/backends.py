"""Which backends can run in this process; Triton's take a GPU, or an interpreter in a process of its own."""

from __future__ import annotations

from sleepkern import dispatch
from sleepkern.measure.cases import Case
from sleepkern.rules import GATED_DELTA_RULE
from sleepkern.testing import Shape

_reasons = dispatch.explain_problem(Case("forward", GATED_DELTA_RULE, Shape()).problem()).reasons

HERE = [name for name, reason in _reasons.items() if reason is None]
"""Names of the backends that do a plain problem on the CPU."""


def heeding(option: str) -> list[str]:
    """Names of those among them that declare an option of a problem."""
    return [name for name in HERE if option in dispatch.backend_named(name).OPTIONS]
