"""A replay by Triton with chunk factors computed once, and one launch of the state pass for each pass."""

from __future__ import annotations

from typing import Any

import torch

from ...backends import triton
from ...backends.native.views import on_device_of
from ...problems.recurrence import Tensors
from ..cases import Case, Result
from .peer import Prepared


def prepare(case: Case, inputs: dict[str, Any], threads: int) -> Prepared:
    """The state after all passes of one launch each, with the chunk factors computed once.

    It is the baseline of kernels that keep a replay on chip.
    """
    from ...backends.triton.chunk_factors import chunk_factors_kernel  # imports Triton
    from ...backends.triton.common import States
    from ...backends.triton.launch import Job
    from ...backends.triton.state_pass import state_pass_kernel

    problem, x = case.problem(str(inputs["k"].device)), Tensors(*inputs.values())
    precision = triton.precision_of(problem)

    def relaunched() -> Result:
        p = problem._replace(passes=1)
        job = Job(p, x, False, precision, "forward")
        final = job.empty(p.sequences, p.HV, p.K, p.V, dtype=torch.float32)
        factors, tile = job.factors(save=False), job.plan.state_pass
        more = {"factors": factors, "REPLAY": False, "SAVE": False}
        with on_device_of(x.k):
            if job.has_factors:
                grid = (job.slots, p.HV)
                job.launch(chunk_factors_kernel, grid, job.plan.chunk_factors, **more)
            for done in range(problem.passes):
                state = final if done else x.state
                states = States(state, final, None, None, None)
                job.launch(
                    state_pass_kernel, job.columns(tile), tile, **more,
                    states=states, HAS_STATE=state is not None,
                )  # fmt: skip
        return None, final

    return relaunched
