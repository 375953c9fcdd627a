"""sleepkern itself under other settings and in other forms.

On the CPU: one thread, float32. On a GPU, for a replay: N calls, and all passes in one launch of Triton's. On a GPU,
for one pass: with outputs, and the chunk form by torch.compile.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from ...backends import chunked, triton
from ...problems.recurrence import Tensors
from ..cases import Case, Result, run
from .peer import Prepared, in_passes

COMPILED_TOKENS = 512
"""Tokens up to which the chunk form is compiled, for torch.compile unrolls it over chunks."""


def always(case: Case, device: str) -> str | None:
    return None


def prepare(case: Case, inputs: dict[str, Any], threads: int) -> Prepared:
    return lambda: run(case, inputs)


def in_float32(case: Case, inputs: dict[str, Any], threads: int) -> Prepared:
    wide = {n: x.float() if torch.is_tensor(x) and x.is_floating_point() else x for n, x in inputs.items()}
    return lambda: run(replace(case, dtype=torch.float32), wide)


def not_several_passes(case: Case, device: str) -> str | None:
    return None if case.op == "ingest" and case.passes > 1 else "one pass"


def pass_by_pass(case: Case, inputs: dict[str, Any], threads: int) -> Prepared:
    once = replace(case, passes=1)
    return in_passes(case, inputs, lambda x: run(once, x))


def not_for_triton(case: Case, device: str) -> str | None:
    reason = triton.why_not(case.problem(device))
    return reason or not_several_passes(case, device)


def by_triton(case: Case, inputs: dict[str, Any], threads: int) -> Prepared:
    return lambda: run(case, inputs, backend="triton")


def no_outputs_to_add(case: Case, device: str) -> str | None:
    return None if case.op == "ingest" and case.passes == 1 else "has outputs"


def with_outputs(case: Case, inputs: dict[str, Any], threads: int) -> Prepared:
    full = replace(case, op="forward")
    return lambda: (None, run(full, inputs)[1])


def not_to_compile(case: Case, device: str) -> str | None:
    if case.op != "forward" or case.shape.T > COMPILED_TOKENS:
        return f"unrolled over chunks, so only compiled for a forward of at most {COMPILED_TOKENS} tokens"
    return None


def by_compiler(case: Case, inputs: dict[str, Any], threads: int) -> Prepared:
    """The readable chunk form by torch.compile, for which it has to be called past the operator."""
    forward = torch.compile(chunked.forward)
    problem, tensors = case.problem(str(inputs["k"].device)), Tensors(*inputs.values())

    def compiled() -> Result:
        out = forward(problem, tensors)
        return out.o, out.state

    return compiled
