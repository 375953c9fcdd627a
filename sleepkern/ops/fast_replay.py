"""The fast path of a replay on a GPU: a plain call goes to the CUDA kernels at once, past the four steps.

A call is plain if the steps would hand it to the `cuda` backend unchanged: tensors on the current device that fit each
other, read in place, not packed, with finished gates; all passes, by the method that the plan takes; nothing recorded,
traced, cast or debugged. The first call of a problem takes the steps, and its plan is remembered. For later ones the
native module recognises a plain call from the tensors themselves (csrc/bindings/cuda_fast_replay.cpp).
"""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import backends, settings
from ..backends.cuda import planned_replay
from ..backends.cuda import recurrence as cuda
from ..backends.interface import RecurrenceBackend
from ..backends.native.module import _C
from ..eager import any_autocast as _autocast
from ..eager import dispatch_modes as _modes
from ..eager import forward_mode as _forward_mode
from ..eager import raw_stream as _raw_stream
from ..eager import transform_stack as _transforms
from ..problems.recurrence import Problem
from ..rules import Rule
from . import fast_path
from .call import SleepResult

MOST = 1024
"""Plans that are remembered; the oldest goes first."""
_plans: dict[Hashable, Known] = {}
# These are names of this module because each dot on the way to a function costs half of what the function does.
_compiling = torch.compiler.is_compiling
_grad = torch.is_grad_enabled
_empty_like = torch.empty_like
_precision = torch.get_float32_matmul_precision


class Known(NamedTuple):
    """A problem that the `cuda` backend was chosen for, as long as the backends are these."""

    problem: Problem
    plan: planned_replay.PlannedReplay
    order: Any


def key_of(
    rule: Rule,
    k: Tensor,
    v: Tensor,
    q: Tensor | None,
    passes: int,
    tol: float | None,
    method: str,
    cu_seqlens: Tensor | None,
    backend: str | None,
    scale: float | None,
    normalize: bool,
) -> Hashable | None:
    """Everything that the plan follows from; None for a call that is not plain."""
    if _compiling() or type(k) is not Tensor or type(v) is not Tensor or not fast_path._usable:
        return None
    index = fast_path._decoding_gpu(k)
    if index is None or tol is not None or cu_seqlens is not None or type(method) is not str or method != "auto":
        return None
    # An option of another type than the usual one may equal it (1 == True) and be refused.
    if type(passes) is not int or type(normalize) is not bool or (scale is not None and type(scale) is not float):
        return None
    if backend is not None and type(backend) is not str:
        return None
    if settings.DEBUG or _modes() != 0 or _transforms() is not None or _autocast() or _forward_mode():
        return None
    options = (id(rule), passes, q is None, scale, normalize, backend, settings.BACKEND, _precision(), index)
    return (*options, k.shape, v.shape, k.dtype)


def run(
    key: Hashable | None,
    q: Tensor | None,
    k: Tensor,
    v: Tensor,
    g: Tensor | None,
    beta: Tensor | None,
    state: Tensor | None,
) -> SleepResult | None:
    """The result of a plain call whose plan is remembered, None for any other."""
    known = None if key is None else _plans.get(key)
    if known is None or known.order is not backends.BACKENDS:
        return None
    if not _C.ordinary(_grad(), k if q is None else q, k, v, g, beta, state):
        return None
    problem, plan = known.problem, known.plan
    final = k.new_empty(plan.state, dtype=torch.float32)
    o = None if q is None else _empty_like(v, memory_format=torch.contiguous_format)
    stream = 0 if _raw_stream is None else _raw_stream(k.get_device())
    if not planned_replay.try_fast_replay(plan, problem, q, k, v, g, beta, state, o, final, stream):
        return None
    return SleepResult(final, o, problem.passes, None, plan.method)


def remember(key: Hashable | None, problem: Problem, engine: RecurrenceBackend) -> None:
    """Keep the plan of a call that took the steps."""
    if key is None or engine is not cuda or problem.passes == 1:
        return
    if len(_plans) >= MOST:
        _plans.pop(next(iter(_plans)), None)
    _plans[key] = Known(problem, planned_replay.replay_of(problem), backends.BACKENDS)
