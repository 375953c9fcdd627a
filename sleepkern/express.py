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
from .backends import cpu
from .problem import Tensors
from .rules import Rule

_api = getattr(Tensor, "__dlpack_c_exchange_api__", None)
_usable = cpu._C is not None and _api is not None and bool(cpu._C.use_exchange_api(_api))


def forward(
    rule: Rule, x: Tensors, scale: float | None, normalize: bool, backend: str | None
) -> tuple[Tensor, Tensor] | None:
    """(readouts, final state) of a plain call, None for any other."""
    if not _open(x, scale, normalize, backend) or x.k.dim() != 4 or x.v.dim() != 4:
        return None
    B, _, _, K = x.k.shape
    _, _, HV, V = x.v.shape
    try:
        o = torch.empty_like(x.v, memory_format=torch.contiguous_format)
        final = x.v.new_empty((B, HV, K, V), dtype=torch.float32)
    except RuntimeError:  # of a layout or type that has no such thing
        return None
    return (o, final) if _run(rule, x, scale, normalize, o, final) else None


def step(rule: Rule, x: Tensors, scale: float | None, normalize: bool, backend: str | None) -> Tensor | None:
    """Readouts of a plain call that updates x.state in place, None for any other."""
    if not _open(x, scale, normalize, backend) or x.state is None:
        return None
    if x.state.is_inference() and not torch.is_inference_mode_enabled():
        return None
    try:
        o = torch.empty_like(x.v, memory_format=torch.contiguous_format)
    except RuntimeError:
        return None
    if not _run(rule, x, scale, normalize, o, x.state):
        return None
    torch._C._increment_version((x.state,))
    return o


def _open(x: Tensors, scale: float | None, normalize: bool, backend: str | None) -> bool:
    if not _usable or settings.DEBUG or (backend or settings.BACKEND) not in (None, cpu.NAME):
        return False
    if type(normalize) is not bool or not (scale is None or (type(scale) is float and abs(scale) < math.inf)):
        return False
    q, k, v, g, beta, state, cu_seqlens = x
    # Spelled out, because a loop would cost as much as all the questions.
    if (
        cu_seqlens is not None
        or type(q) is not Tensor
        or type(k) is not Tensor
        or type(v) is not Tensor
        or not (g is None or type(g) is Tensor)
        or not (beta is None or type(beta) is Tensor)
        or not (state is None or type(state) is Tensor)
        or torch.compiler.is_compiling()
        or torch._C._len_torch_dispatch_stack() != 0
        or torch._C._functorch.peek_interpreter_stack() is not None
        or torch._C._is_any_autocast_enabled()
        or forward_ad._current_level >= 0
    ):
        return False
    if torch.is_grad_enabled() and (
        q.requires_grad
        or k.requires_grad
        or v.requires_grad
        or (g is not None and g.requires_grad)
        or (beta is not None and beta.requires_grad)
        or (state is not None and state.requires_grad)
    ):
        return False
    # The negative bit is torch's own: memory holds the numbers' opposites.
    return not (
        q.is_neg()
        or k.is_neg()
        or v.is_neg()
        or (g is not None and g.is_neg())
        or (beta is not None and beta.is_neg())
        or (state is not None and state.is_neg())
    )


def _run(rule: Rule, x: Tensors, scale: float | None, normalize: bool, o: Tensor, final: Tensor) -> bool:
    q, k, v, g, beta, state, _ = x
    done: bool = cpu._C.express(
        cpu.GATES[rule.gate], rule.delta, normalize, math.nan if scale is None else scale,
        q, k, v, g, beta, state, o, final,
    )  # fmt: skip
    return done
