"""Tensors as the native module takes them, for the mixers' own kernels."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import settings
from ..backends import cpu
from ..backends.tensors import in_rows, refuse_tangents

_C = cpu._C
TYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
ABSENT = (0, 0, 0)


def usable(*tensors: Tensor | None) -> bool:
    """Whether these are all there and of a kind that the C++ kernels read, and no other backend is asked for."""
    if _C is None or settings.BACKEND not in (None, cpu.NAME):
        return False
    return all(t is None or (t.device.type == "cpu" and t.dtype in TYPES) for t in tensors)


def unrecorded(*tensors: Tensor | None) -> bool:
    """Nobody looks at the operator: no gradient, graph capture, subclass, mode or transform.

    Raises:
        NotImplementedError: a tangent of forward mode, which operators would drop.
    """
    if torch.compiler.is_compiling():
        return False
    refuse_tangents(*tensors)
    if torch._C._len_torch_dispatch_stack() != 0:
        return False
    if torch._C._functorch.peek_interpreter_stack() is not None:
        return False
    grad = torch.is_grad_enabled()
    return all(
        t is None or (type(t) in (Tensor, torch.nn.Parameter) and not (grad and t.requires_grad)) for t in tensors
    )


def rows(t: Tensor | None, width: int) -> tuple[Tensor | None, tuple[int, int, int]]:
    """Tokens of `width` numbers: (address, distance of two tokens, type), and what keeps it alive."""
    if t is None:
        return None, ABSENT
    t, stride = in_rows(t, width)
    return t, (t.data_ptr(), stride, TYPES[t.dtype])


def array(t: Tensor | None) -> tuple[Tensor | None, tuple[int, int]]:
    """Numbers side by side: (address, type), and what keeps it alive."""
    if t is None:
        return None, (0, 0)
    t = t.contiguous()
    return t, (t.data_ptr(), TYPES[t.dtype])


def address(t: Tensor | None) -> int:
    """Of the first number, 0 for None."""
    return 0 if t is None else t.data_ptr()
