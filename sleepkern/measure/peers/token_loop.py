"""The token loop: sleepkern's reference backend in the type of the inputs."""

from __future__ import annotations

from typing import Any

from ..cases import Case, run
from .peer import Prepared


def prepare(case: Case, inputs: dict[str, Any], threads: int) -> Prepared:
    return lambda: run(case, inputs, backend="reference")
