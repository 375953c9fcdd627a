"""The express lane: a plain call on the CPU goes to the kernel at once, past the four steps of a call.

Plain is a call that the steps would hand to the `cpu` backend unchanged: tensors on the CPU that fit each other, of at
most 32 bits, read in place; one pass, not packed; nothing recorded, traced, cast or debugged. The native module
recognises it from the tensors themselves, by torch's DLPack exchange table (torch 2.10 and later), which costs a tenth
of what the checks cost in Python. Everything else, and every error, takes the long way.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.autograd import forward_ad

from .. import backends, settings
from ..addresses import mark_written
from ..backends.cpu import recurrence as cpu
from ..backends.interface import Backend
from ..backends.native.module import _C, GATE_CODES
from ..rules import RULES, Rule

_api = getattr(Tensor, "__dlpack_c_exchange_api__", None)
_usable = _C is not None and _api is not None and bool(_C.use_exchange_api(_api)) and bool(_C.use_tensor_class(Tensor))
# Names of this module, because each dot on the way to a function costs half of what the function does.
_compiling = torch.compiler.is_compiling
_modes = torch._C._len_torch_dispatch_stack
_transforms = torch._C._functorch.peek_interpreter_stack
_autocast = torch._C._is_any_autocast_enabled
_grad = torch.is_grad_enabled
_inference = torch.is_inference_mode_enabled
_empty_like = torch.empty_like

_ROWS = {id(rule): rule for rule in RULES.values() if rule in cpu.SUPPORTS}
"""The rules of the lane: rows themselves, not what equals them, so that a plain call need not compare."""
_order: tuple[Backend, ...] = ()
_names: tuple[str | None, ...] = ()
"""The order of backends, and what a call may ask for that is `cpu` in this order; None is to ask for nothing."""


def forward(
    rule: Rule, x: tuple[Tensor | None, ...], scale: float | None, normalize: bool, backend: str | None
) -> tuple[Tensor, Tensor] | None:
    """(readouts, final state) of a plain call, None for any other. x: the fields of Tensors."""
    q, k, v, g, beta, state, cu_seqlens = x
    if cu_seqlens is not None or not _open(rule, q, k, v, g, beta, state, scale, normalize, backend):
        return None
    assert k is not None and v is not None
    try:
        B, _, _, K = k.shape
        _, _, HV, V = v.shape
        o = _empty_like(v, memory_format=torch.contiguous_format)
        final = v.new_empty((B, HV, K, V), dtype=torch.float32)
    except (ValueError, RuntimeError):  # of other dimensions; of a layout or type that has no such thing
        return None
    return (o, final) if _run(rule, scale, normalize, q, k, v, g, beta, state, o, final) else None


def step(
    rule: Rule,
    q: Tensor | None,
    k: Tensor,
    v: Tensor,
    g: Tensor | None,
    beta: Tensor | None,
    state: Tensor,
    scale: float | None,
    normalize: bool,
    backend: str | None,
) -> Tensor | None:
    """Readouts of a plain call that updates `state` in place, None for any other."""
    if state is None or not _open(rule, q, k, v, g, beta, state, scale, normalize, backend):
        return None
    if not state.is_contiguous() or (state.is_inference() and not _inference()):
        return None
    try:
        o = _empty_like(v, memory_format=torch.contiguous_format)
    except RuntimeError:
        return None
    if not _run(rule, scale, normalize, q, k, v, g, beta, state, o, state):
        return None
    mark_written(state)
    return o


def _open(
    rule: Rule,
    q: Tensor | None,
    k: Tensor | None,
    v: Tensor | None,
    g: Tensor | None,
    beta: Tensor | None,
    state: Tensor | None,
    scale: float | None,
    normalize: bool,
    backend: str | None,
) -> bool:
    if not _usable or settings.DEBUG or id(rule) not in _ROWS:
        return False
    if backends.BACKENDS is not _order and not _look_at_order():
        return False
    if (settings.BACKEND if backend is None else backend) not in _names:
        return False
    if (
        type(normalize) is not bool
        or (scale is not None and (type(scale) is not float or not abs(scale) < math.inf))
        or _compiling()
        or _modes() != 0
        or _transforms() is not None
        or _autocast()
        or forward_ad._current_level >= 0
    ):
        return False
    return _C.ordinary(_grad(), q, k, v, g, beta, state)  # type: ignore[no-any-return]


def _look_at_order() -> bool:
    """Make out which plain calls on the CPU are `cpu`'s: the one of that name, and the first that takes CPU tensors.

    Not in a graph that is being made, which takes no plain call and should write nothing down; then False.
    """
    global _order, _names
    if torch.compiler.is_compiling():
        return False
    order = backends.BACKENDS
    named = next((b for b in order if b.NAME == cpu.NAME), None) is cpu
    first = next((b for b in order if not _never_on_the_cpu(b)), None) is cpu
    _names = (*((cpu.NAME,) if named else ()), *((None,) if first else ()))
    _order = order
    return True


def _never_on_the_cpu(backend: Backend) -> bool:
    """Whether a backend says so for all its calls; one that does not may want a plain call."""
    why_not_on = getattr(backend, "why_not_on", None)
    return why_not_on is not None and why_not_on("cpu") is not None


def _run(rule: Rule, scale: float | None, normalize: bool, *tensors: Tensor | None) -> bool:
    """tensors: q, k, v, g, beta, state, o, final state."""
    unscaled = math.nan if scale is None else scale
    return _C.express(GATE_CODES[rule.gate], rule.delta, normalize, unscaled, *tensors)  # type: ignore[no-any-return]


_look_at_order()  # compiled graphs hold on to what they saw here
