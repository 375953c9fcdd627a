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

from . import settings
from .autograd import unrecorded
from .backends import cpu
from .problem import Tensors
from .rules import Rule

_api = getattr(Tensor, "__dlpack_c_exchange_api__", None)
_usable = cpu._C is not None and _api is not None and bool(cpu._C.use_exchange_api(_api))


def forward(
    rule: Rule, x: Tensors, scale: float | None, normalize: bool, backend: str | None
) -> tuple[Tensor, Tensor] | None:
    """(readouts, final state) of a plain call, None for any other."""
    if not _open(x, backend) or x.k.dim() != 4 or x.v.dim() != 4:
        return None
    B, _, _, K = x.k.shape
    _, _, HV, V = x.v.shape
    o = torch.empty_like(x.v, memory_format=torch.contiguous_format)
    final = x.v.new_empty((B, HV, K, V), dtype=torch.float32)
    return (o, final) if _run(rule, x, scale, normalize, o, final) else None


def step(rule: Rule, x: Tensors, scale: float | None, normalize: bool, backend: str | None) -> Tensor | None:
    """Readouts of a plain call that updates x.state in place, None for any other."""
    if not _open(x, backend) or x.state is None:
        return None
    o = torch.empty_like(x.v, memory_format=torch.contiguous_format)
    return o if _run(rule, x, scale, normalize, o, x.state) else None


def _open(x: Tensors, backend: str | None) -> bool:
    if not _usable or settings.DEBUG or (backend or settings.BACKEND) not in (None, cpu.NAME):
        return False
    if x.cu_seqlens is not None or x.q is None:
        return False
    for t in x:
        if t is not None and type(t) is not Tensor:
            return False
    return unrecorded(x) and not torch.is_autocast_enabled("cpu") and forward_ad._current_level < 0


def _run(rule: Rule, x: Tensors, scale: float | None, normalize: bool, o: Tensor, final: Tensor) -> bool:
    q, k, v, g, beta, state, _ = x
    done: bool = cpu._C.express(
        cpu.GATES[rule.gate], rule.delta, normalize, math.nan if scale is None else scale,
        q, k, v, g, beta, state, o, final,
    )  # fmt: skip
    return done
