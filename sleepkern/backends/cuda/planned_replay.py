"""A replay by the CUDA kernels past the checks in Python: what is found out about a problem once, and the launch."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

from ...problems.recurrence import Problem
from ..native.module import _C
from ..native.views import address
from . import recurrence as cuda


class PlannedReplay(NamedTuple):
    """What `try_fast_replay` launches: how `_C` describes it, the shape of the state, and the method."""

    call: Any
    state: tuple[int, ...]
    method: str
    single_chunk: bool
    keeps_before_last: bool


def replay_of(problem: Problem) -> PlannedReplay:
    """Describe a replay that `why_not` accepts."""
    p, plan = problem, cuda._plan(problem)
    assert plan is not None
    state = (p.sequences, p.HV, p.K, p.V)
    return PlannedReplay(
        cuda._replay_call(p, plan), state, plan.method, plan.single_chunk, plan.method == "affine" and p.output
    )


def try_fast_replay(planned: PlannedReplay, problem: Problem, *tensors: Any) -> bool:
    """Launch a replay whose tensors say that it is plain, False for any other (csrc/bindings/cuda_fast_replay.cpp).

    tensors: q, k, v, g, beta, initial state, o and final state, and the stream after them; q and o are None together.
    """
    *given, stream = tensors
    if planned.single_chunk:
        return _C.try_fast_replay(planned.call, *given, 0, 0, 0, 0, 0, stream)  # type: ignore[call-arg]
    k, final = given[1], given[7]
    before_last = torch.empty_like(final) if planned.keeps_before_last else None
    scratch = cuda._chunk_factors(problem, k)
    addresses = [address(t) for t in (before_last, *scratch)]
    return _C.try_fast_replay(planned.call, *given, *addresses, stream)  # type: ignore[call-arg]
