"""Who looks at a call beside torch's kernels: autograd, a graph capture, a mode, a transform, a subclass."""

from __future__ import annotations

from collections.abc import Callable, Container, Iterable

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn import Parameter
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

__all__ = [
    "any_autocast", "assert_async", "dispatch_modes", "forward_mode", "functorch", "increment_version",
    "is_traceable_wrapper_subclass", "native_on_cpu", "plain", "raw_stream", "refuse_tangents", "tangents_matter",
    "transform_stack", "unrecorded", "untraced",
]  # fmt: skip

# The private names of torch that this package uses (tests/repo/test_private_names.py).
functorch = torch._C._functorch
transform_stack = functorch.peek_interpreter_stack
"""The innermost transform of torch.func at work, or None."""
dispatch_modes: Callable[[], int] = torch._C._len_torch_dispatch_stack
"""The number of dispatch modes at work."""
any_autocast: Callable[[], bool] = torch._C._is_any_autocast_enabled
"""Tells whether autocast is on for any device."""
raw_stream: Callable[[int], int] | None = getattr(torch._C, "_cuda_getCurrentRawStream", None)
"""The handle of a GPU's current stream by the index of the device; None in a torch without CUDA."""
increment_version: Callable[[Iterable[Tensor]], None] = torch._C._increment_version
"""Count a write to each of these tensors, as torch does for its own operators."""
assert_async: Callable[[Tensor, str], None] = torch._assert_async
"""Raise with a message where a tensor of one element is 0, without a wait for its device."""


def forward_mode() -> bool:
    """Tells whether a level of forward mode is open."""
    return bool(forward_ad._current_level >= 0)


def tangents_matter() -> bool:
    """Tells whether forward mode is open and enabled, so that tensors may carry tangents."""
    return forward_mode() and torch._C._is_fwd_grad_enabled()


def untraced(*tensors: Tensor | None) -> bool:
    """Nobody but torch's kernels looks at an operator on these: no graph capture, mode, transform or subclass."""
    if torch.compiler.is_compiling() or dispatch_modes() != 0:
        return False
    if transform_stack() is not None:
        return False
    for t in tensors:
        if t is None:
            continue
        if type(t) is not Tensor and type(t) is not Parameter:
            return False
    return True


def plain(*tensors: Tensor | None) -> bool:
    """Nobody looks at the operator but autograd, and memory holds the values and not their opposites."""
    return untraced(*tensors) and not any(t.is_neg() for t in tensors if t is not None)


def unrecorded(*tensors: Tensor | None) -> bool:
    """Nobody looks at the operator, torch's dispatcher included, which alone knows of gradients and negative bits.

    Passing it by way of Python costs more than the rest of a call.
    """
    if not untraced(*tensors):
        return False
    grad = torch.is_grad_enabled()
    for t in tensors:
        if t is None:
            continue
        if t.is_neg() or (grad and t.requires_grad):
            return False
    return True


def native_on_cpu(types: Container[torch.dtype], *tensors: Tensor | None) -> bool:
    """Tells whether native code may read these tensors: unrecorded, on the CPU, at strides, of one of the types.

    The answer is no for an argument that is not a tensor.
    """
    if torch.compiler.is_compiling() or dispatch_modes() != 0:
        return False
    if transform_stack() is not None or forward_ad._current_level >= 0:
        return False
    grad = torch.is_grad_enabled()
    for t in tensors:  # one loop, because a second one costs as much as a small kernel
        if t is None:
            continue
        if (type(t) is not Tensor and type(t) is not Parameter) or not t.is_cpu or t.dtype not in types:
            return False
        if t.is_neg() or (grad and t.requires_grad) or t.layout is not torch.strided:
            return False
    return True


def refuse_tangents(*tensors: Tensor | None) -> None:
    """Operators would drop what forward mode carries beside tensors, and say nothing.

    Raises:
        NotImplementedError: one of these has a tangent.
    """
    if not tangents_matter():
        return
    if any(t is not None and t.is_floating_point() and forward_ad.unpack_dual(t).tangent is not None for t in tensors):
        raise NotImplementedError("sleepkern has derivatives in reverse mode only: got a tangent of forward mode")
