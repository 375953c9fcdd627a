"""Tensors as compiled code takes them: addresses, strides and type codes, on the right device and stream."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

from ...eager import raw_stream
from .module import TYPE_CODES

Rows = tuple[int, int, int]
"""Address, distance of two tokens in elements, type code."""
ABSENT: Rows = (0, 0, 0)
Array = tuple[int, int]
"""Address, type code."""
_HERE = nullcontext()


def on_device_of(t: Tensor) -> AbstractContextManager[object]:
    """The device of a tensor as the current one, which plans are made for and to which launches go.

    Entering a device costs more than comparing it. A graph that is being compiled has one device, and fakes have none.
    """
    if torch.compiler.is_compiling():
        return nullcontext()
    if not t.is_cuda or not torch.cuda.is_initialized():
        return _HERE
    return _HERE if t.device.index == torch.cuda.current_device() else torch.cuda.device(t.device)


def stream_of(t: Tensor) -> int:
    """Handle of the current stream of a tensor's GPU, 0 on a CPU."""
    if not t.is_cuda:
        return 0
    # An object for the stream takes longer to make than a small launch.
    return torch.cuda.current_stream(t.device).cuda_stream if raw_stream is None else raw_stream(t.get_device())


def address(t: Tensor | None) -> int:
    """The address of the first element, 0 for None."""
    return 0 if t is None else t.data_ptr()


def rows(t: Tensor | None, width: int) -> tuple[Tensor | None, Rows]:
    """Tokens of `width` numbers as _C takes them, and the tensor that must live while it reads them.

    A type that _C does not read, such as that of float64 gates, is converted to float32.
    """
    if t is None:
        return None, ABSENT
    if t.dtype not in TYPE_CODES:
        t = t.float()
    if t.is_contiguous():  # the most frequent answer of in_rows
        return t, (t.data_ptr(), width, TYPE_CODES[t.dtype])
    t, stride = in_rows(t, width)
    return t, (t.data_ptr(), stride, TYPE_CODES[t.dtype])


def array(t: Tensor | None) -> tuple[Tensor | None, Array]:
    """Numbers side by side: (address, type code), and the tensor that must live while _C reads them."""
    if t is None:
        return None, (0, 0)
    t = t.contiguous()
    return t, (t.data_ptr(), TYPE_CODES[t.dtype])


def contiguous_heads(states: Tensor) -> bool:
    """Tells whether the [K,V] of each head of some states is contiguous."""
    K, V = states.shape[-2:]
    return (V == 1 or states.stride(-1) == 1) and (K == 1 or states.stride(-2) == V)


def in_rows(t: Tensor, width: int) -> tuple[Tensor, int]:
    """A tensor of tokens of `width` numbers, and how many numbers one token lies behind the other.

    Read in place where all tokens lie one row stride apart, also inside a wider projection; else copied.
    """
    if t.is_contiguous():
        return t, width
    if not _evenly_spaced(t):
        t = t.contiguous()
    return t, t.stride(1) if t.shape[1] > 1 else t.stride(0)


def _evenly_spaced(t: Tensor) -> bool:
    stride, inner = t.stride(), 1
    for size, step in zip(reversed(t.shape[2:]), reversed(stride[2:]), strict=True):
        if size != 1 and step != inner:
            return False
        inner *= size
    return t.shape[0] == 1 or t.shape[1] == 1 or stride[0] == t.shape[1] * stride[1]
