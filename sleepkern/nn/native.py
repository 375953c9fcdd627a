"""Tensors as the native module takes them, for the mixers' own kernels."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.autograd import forward_ad

from .. import transforms
from ..addresses import check_memory
from ..backends.cpu import recurrence as cpu
from ..backends.native.module import _C, TYPE_CODES
from ..dispatch import asked_for
from ..eager import refuse_tangents, untraced
from ..problems.recurrence import check_dense


def usable(*tensors: Tensor | None) -> bool:
    """Whether the C++ kernels are there, read tensors of this kind, and neither another backend is asked for nor a
    transform differentiates, which wants torch's operators.

    Raises:
        ValueError: SLEEPKERN_BACKEND says a name that nobody knows.
        NotImplementedError: a tangent of forward mode alone.
    """
    if not asked_for(cpu.NAME) or _C is None:
        return False
    if transforms.differentiating():
        if not transforms.reversing():
            refuse_tangents(*tensors)
        return False
    return all(t is None or (t.device.type == "cpu" and t.dtype in TYPE_CODES) for t in tensors)


def direct(*tensors: Tensor | None) -> bool:
    """Whether C++ reads these as they are: usable, at strides, and nobody looks at the operator.

    Takes anything for a tensor, and says no to what is none.
    """
    if not asked_for(cpu.NAME) or _C is None or not untraced(*tensors):
        return False
    if forward_ad._current_level >= 0:
        return False
    grad = torch.is_grad_enabled()
    for t in tensors:
        if t is None:
            continue
        if not t.is_cpu or t.dtype not in TYPE_CODES or t.is_neg() or (grad and t.requires_grad):
            return False
        if t.layout is not torch.strided:
            return False
    return True


def check_floats(name: str, given: object, x: Tensor) -> None:
    """Refuse what is not a tensor of floats at strides where x is.

    Raises:
        TypeError, ValueError: names the argument.
    """
    t = check_dense(name, given)
    if not t.is_floating_point():
        raise TypeError(f"{name}: got {t.dtype}; expected floats")
    if t.device != x.device:
        raise ValueError(f"{name}: got device {t.device}; expected {x.device}, where x is")


def check_kernel(**tensors: Tensor | None) -> None:
    """Refuse what C++ has no kernel for.

    Raises:
        TypeError: names the argument.
    """
    for name, t in tensors.items():
        if t is not None and t.dtype not in TYPE_CODES:
            raise TypeError(f"{name}: got {t.dtype}; expected one of {', '.join(map(str, TYPE_CODES))}")


def check_upstream(name: str, t: Tensor | None, x: Tensor, shape: Sequence[int]) -> None:
    """Refuse a gradient from above that is not like the result it belongs to, of this shape and x's type.

    Raises:
        TypeError, ValueError: names the argument.
    """
    if t is None:
        return
    check_floats(name, t, x)
    if t.shape != torch.Size(shape) or t.dtype != x.dtype:
        raise ValueError(f"{name}: got {t.dtype} {list(t.shape)}; expected {x.dtype} {list(shape)}")
    check_memory((name,), (t,))
