"""Steps 2 and 3 of a call, CHECK and CHOOSE, remembered: calls of equal tensors on a GPU take the same answer.

What `check` and `choose` say follows from the shapes, types and devices of the tensors, the options, and which backends
there are. To compare these with an earlier call takes a fifth of the time. Values and addresses are not remembered.
"""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any

import torch
from torch import Tensor

from .. import backends, settings, transforms
from ..backends.interface import RecurrenceBackend
from ..backends.native.views import on_device_of
from ..dispatch import choose, torch_form
from ..problems.recurrence import Problem, Tensors, check
from ..rules import Rule

DEVICES: tuple[str, ...] = ("cuda",)
"""The types of device whose calls are remembered. On a CPU a plain call takes the fast path."""
MOST = 4096
_known: dict[Hashable, tuple[Problem, RecurrenceBackend]] = {}
_order: tuple[RecurrenceBackend, ...] = ()
"""The order of backends that the answers hold for."""


def check_and_choose(
    rule: Rule,
    x: Tensors,
    scale: float | None,
    normalize: bool,
    backend: str | None,
    passes: int = 1,
    tol: float | None = None,
    method: str = "auto",
    outputs: bool = True,
    state_name: str = "initial_state",
    state_every: int | None = None,
) -> tuple[Problem, RecurrenceBackend]:
    """The problem and the backend that computes it, or torch's operators where a transform wants their rules.

    Args:
        backend: as for `choose`; the others as for `check`.

    Raises:
        TypeError, ValueError: as `check` and `choose`.
    """
    replay = (passes, tol, method, outputs, state_name, state_every)
    key = _key(rule, x, scale, normalize, backend, replay) if _device(x.k) in DEVICES else None
    found = None if key is None else _known.get(key)
    if found is None:
        problem = check(rule, x, scale, normalize, passes, tol, method, outputs, state_name, state_every)
        found = problem, engine_for(problem, x, backend)
        if key is not None:
            if len(_known) >= MOST:
                _known.pop(next(iter(_known)), None)
            _known[key] = found
    return found


def engine_for(problem: Problem, x: Tensors, backend: str | None) -> RecurrenceBackend:
    """The backend that computes: the one that is chosen, or torch's operators where a transform wants their rules."""
    if x.k.is_cuda:
        with on_device_of(x.k):
            engine = choose(problem, backend)
    else:  # entering nothing costs as much as choosing
        engine = choose(problem, backend)
    return torch_form(problem, engine) if transforms.differentiating() else engine


def _key(
    rule: Rule, x: Tensors, scale: float | None, normalize: bool, backend: str | None, replay: tuple[Any, ...]
) -> Hashable:
    """Everything that the answer follows from; None for a call that is not remembered.

    An option of another type than the usual one may equal it (1 == True) and be refused, so it has no key.
    """
    global _order
    if torch.compiler.is_compiling() or transforms.active() or type(normalize) is not bool:
        return None
    if scale is not None and type(scale) is not float:
        return None
    passes, tol, method, _, _, state_every = replay
    if state_every is not None and type(state_every) is not int:
        return None
    if type(passes) is not int or type(method) is not str or (tol is not None and type(tol) is not float):
        return None
    if backends.BACKENDS is not _order:
        _known.clear()
        _order = backends.BACKENDS
    # The identity of the rule, because rules compare slowly; the answer keeps the rule alive.
    key: list[Any] = [
        id(rule),
        scale,
        normalize,
        backend,
        settings.BACKEND,
        replay,
        torch.get_float32_matmul_precision(),
    ]
    for t in x:
        if t is None:
            key.append(None)
        elif isinstance(t, Tensor):
            key += (t.shape, t.dtype, t.device, t.layout)
        else:
            return None
    return tuple(key)


def _device(k: object) -> str:
    return k.device.type if isinstance(k, Tensor) else ""
