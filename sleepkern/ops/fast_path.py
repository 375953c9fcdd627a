"""The fast path: a plain call on the CPU, or a plain decode on a GPU, goes to the kernel at once, past the four steps.

A call is plain if the steps would hand it to the `cpu` backend unchanged: tensors on the CPU that fit each other, of at
most 32 bits, read in place; one pass, not packed; nothing recorded, traced, cast or debugged. The native module
recognises a plain call from the tensors themselves, by torch's DLPack exchange table (torch 2.10 and later), which
costs a tenth of what the checks cost in Python. Every other call, and every error, takes the four steps.

A decode on a GPU is plain if the steps would hand it to the `cuda` backend unchanged: the same, on the current device,
of at most eight tokens with finished gates, where no backend is named and `cuda` comes before others that take GPUs.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn import Parameter

from .. import backends, settings
from ..addresses import mark_written
from ..backends.cpu import recurrence as cpu
from ..backends.cuda import recurrence as cuda
from ..backends.interface import NamesDevices, RecurrenceBackend
from ..backends.native.module import _C, GATE_CODES
from ..eager import any_autocast as _autocast
from ..eager import dispatch_modes as _modes
from ..eager import raw_stream as _raw_stream
from ..eager import transform_stack as _transforms
from ..problems.gates import RawGates
from ..rules import RULES, Rule

_api = getattr(Tensor, "__dlpack_c_exchange_api__", None)
_usable = (
    _C is not None
    and _api is not None
    and bool(_C.use_exchange_api(_api))
    and bool(_C.use_tensor_class(Tensor, Parameter))
)
# These are names of this module because each dot on the way to a function costs half of what the function does.
_compiling = torch.compiler.is_compiling
_grad = torch.is_grad_enabled
_inference = torch.is_inference_mode_enabled
_empty_like = torch.empty_like
_current_device = torch.cuda.current_device

_RULES = {id(rule): rule for rule in RULES.values() if rule in cpu.SUPPORTS}
"""The rules of the fast path by identity: a call with an equal rule takes the four steps, so no call compares rules."""
_order: tuple[RecurrenceBackend, ...] = ()
_names: tuple[str | None, ...] = ()
"""The order of backends, and the values of `backend` that mean `cpu` in this order; None means no choice."""
_cuda_first = False
"""Tells whether `cuda` is the first backend in this order that may take a GPU's tensors."""
_decoding: dict[int, bool] = {}
"""Tells whether the decode kernel runs on a GPU, by its index."""


def forward(
    rule: Rule,
    x: tuple[Tensor | None, ...],
    scale: float | None,
    normalize: bool,
    backend: str | None,
    gates: RawGates | None = None,
) -> tuple[Tensor, Tensor] | None:
    """Return (o, final state) of a plain call, None for any other. x: the fields of Tensors."""
    q, k, v, g, beta, state, cu_seqlens = x
    if cu_seqlens is not None or not _open(rule, q, k, v, g, beta, state, scale, normalize, backend, gates):
        return None
    assert k is not None and v is not None
    try:
        B, _, _, K = k.shape
        _, _, HV, V = v.shape
        o = _empty_like(v, memory_format=torch.contiguous_format)
        final = v.new_empty((B, HV, K, V), dtype=torch.float32)
    except (ValueError, RuntimeError):  # of other dimensions; of a layout or type that has no such thing
        return None
    return (o, final) if _run(rule, scale, normalize, gates, q, k, v, g, beta, state, o, final) else None


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
    gates: RawGates | None = None,
) -> Tensor | None:
    """Return o of a plain call that updates `state` in place, None for any other."""
    if state is None or not _open(rule, q, k, v, g, beta, state, scale, normalize, backend, gates):
        return None
    if not state.is_contiguous() or (state.is_inference() and not _inference()):
        return None
    try:
        o = _empty_like(v, memory_format=torch.contiguous_format)
    except RuntimeError:
        return None
    if not _run(rule, scale, normalize, gates, q, k, v, g, beta, state, o, state):
        if gates is not None or backend is not None:
            return None
        if not _decode_on_gpu(rule, scale, normalize, q, k, v, g, beta, state, o):
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
    gates: RawGates | None,
) -> bool:
    if not _usable or settings.DEBUG or id(rule) not in _RULES:
        return False
    if backends.BACKENDS is not _order and not _read_order():
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
    if gates is None:
        return _C.ordinary(_grad(), q, k, v, g, beta, state)
    return _C.ordinary(_grad(), q, k, v, g, beta, state, gates.A_log, gates.dt_bias)


def _read_order() -> bool:
    """Find out which plain calls on the CPU go to `cpu`: those that name it, and those that name no backend if `cpu` is
    the first that takes CPU tensors.

    False while torch compiles a graph, which takes no plain call and records every variable that is written.
    """
    global _order, _names, _cuda_first
    if torch.compiler.is_compiling():
        return False
    order = backends.BACKENDS
    named = next((b for b in order if b.NAME == cpu.NAME), None) is cpu
    first = next((b for b in order if not _never_on_the_cpu(b)), None) is cpu
    _names = (*((cpu.NAME,) if named else ()), *((None,) if first else ()))
    _cuda_first = next((b for b in order if b is not cpu), None) is cuda
    _order = order
    return True


def _never_on_the_cpu(backend: RecurrenceBackend) -> bool:
    """True if a backend refuses every call on the CPU; any other backend may take a plain call."""
    return isinstance(backend, NamesDevices) and backend.why_not_on("cpu") is not None


def _run(rule: Rule, scale: float | None, normalize: bool, gates: RawGates | None, *tensors: Tensor | None) -> bool:
    """tensors: q, k, v, g, beta, state, o, final state."""
    unscaled = math.nan if scale is None else scale
    if gates is None:
        return _C.try_fast_path(GATE_CODES[rule.gate], rule.delta, normalize, unscaled, *tensors)
    A_log, dt_bias, lower_bound, decay, beta_scale = gates
    given = (*tensors, A_log, dt_bias, decay, lower_bound or 0.0, beta_scale)
    return _C.try_fast_path(GATE_CODES[rule.gate], rule.delta, normalize, unscaled, *given)


def _decode_on_gpu(rule: Rule, scale: float | None, normalize: bool, *tensors: Tensor | None) -> bool:
    """Launch a plain decode; tensors: q, k, v, g, beta, state, o."""
    index = _decoding_gpu(tensors[1])
    if index is None or settings.BACKEND is not None or not _cuda_first:
        return False
    unscaled, stream = math.nan if scale is None else scale, 0 if _raw_stream is None else _raw_stream(index)
    codes = (GATE_CODES[rule.gate], rule.delta, normalize, unscaled)
    return cuda.try_fast_decode(*codes, *tensors, cuda.DECODE_LIMIT, stream)


def _decoding_gpu(t: Tensor | None) -> int | None:
    """The index of a tensor's GPU, if it is the current device and the decode kernel runs there."""
    if t is None or (index := t.get_device()) < 0 or index != _current_device():
        return None
    found = _decoding.get(index)
    if found is None:
        found = _decoding[index] = cuda.why_not_on("cuda") is None
    return index if found else None


_read_order()  # compiled graphs guard on the values they find here
