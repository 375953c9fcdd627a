"""The launches of the mixer's own operators: one a call, and one sum of partial sums for the gradients of weights.
The first call of its kind goes through Triton, later ones repeat its launch (held_launches.py).

Nothing here waits for the device, so all of it can be captured in a CUDA graph where `cu_seqlens` is on the device.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from ... import settings
from ...addresses import check_memory, mark_written
from ...problems.mixer import check_upstream
from ...problems.recurrence import check_offsets
from ..native.views import in_rows, on_device_of
from . import held_launches
from .gated_rms_norm import (
    NormDims,
    NormFlags,
    NormGradients,
    NormInputs,
    NormSizes,
    gated_norm_backward_kernel,
    gated_norm_kernel,
)
from .held_launches import Recording
from .plan import padded
from .short_convolution import (
    ConvolutionDims,
    ConvolutionFlags,
    ConvolutionGradients,
    ConvolutionInputs,
    ConvolutionSizes,
    convolve_backward_kernel,
    convolve_kernel,
    convolve_step_kernel,
)

CHANNELS = 128
"""Channels of a program of the convolution: a row of it is 256 bytes of bfloat16, two whole cache lines."""
SHORT = 32
"""Sequences of at most so many tokens take tiles of at most so many rows, so that fewer of them are empty."""
USUAL = 4
"""The width of the convolutions of all models that `patch` knows."""
STEP = 256
"""Channels of a program of the step: 128 threads and two channels each."""
ELEMENTS = 2048
"""Elements of a tile of the norm for four warps: 16 a thread, which leaves 8 such programs a multiprocessor."""
PARTS = 1024
"""Programs of the norm's backward, some 8 a multiprocessor. They do not depend on the device, nor do sums then."""


class Call(NamedTuple):
    """What a launch of the convolution needs: groups of arguments, slots of tokens, the number of sequences."""

    inputs: ConvolutionInputs
    sizes: ConvolutionSizes
    dims: ConvolutionDims
    flags: ConvolutionFlags
    slots: int


def launch(kernel: Any, programs: int, warps: int, *arguments: Any) -> None:
    """Launch `programs` programs of a kernel on the current device; later launches of the same repeat the first.

    arguments: all that the kernel has, in its order: tensors, values, and tuples of them; the first tensor is x.
    """
    tensors: list[Tensor | None] = []
    values: list[Any] = []
    for one in arguments:
        for value in one if isinstance(one, tuple) else (one,):
            (tensors if value is None or isinstance(value, Tensor) else values).append(value)
    like = tensors[0]
    assert like is not None

    def launches(recording: Recording, aliases: Sequence[Any]) -> None:
        left = iter(aliases)
        own = [type(one)(*_with(one, left)) if isinstance(one, tuple) else _with((one,), left)[0] for one in arguments]
        named = dict(zip(kernel.arg_names, own, strict=True))
        recording.launch(kernel, (programs,), named, {"num_warps": warps})

    held_launches.run((kernel.__name__, programs, warps, *values), tensors, launches, like)


def _with(group: tuple[Any, ...], tensors: Iterator[Any]) -> list[Any]:
    """The values of a group, the next of the tensors in the place of each of its own."""
    return [next(tensors) if value is None or isinstance(value, Tensor) else value for value in group]


def convolve(
    x: Tensor, weight: Tensor, bias: Tensor | None, past: Tensor | None, cu_seqlens: Tensor | None, silu: bool
) -> tuple[Tensor, Tensor]:
    """y [B,T,D] and the last W - 1 inputs [n,W-1,D].

    Raises:
        ValueError: memory that was freed, or cu_seqlens on the CPU that do not start at 0, fall, or do not end at T.
    """
    call = _convolution(x, weight, bias, past, cu_seqlens, silu, False, False)
    y = x.new_empty(x.shape)
    last = x.new_empty((call.sizes.sequences, weight.shape[1] - 1, x.shape[2]))
    if y.numel() or last.numel():
        with on_device_of(x):
            launch(convolve_kernel, _programs(call), 4, call.inputs, y, last, call.sizes, call.dims, call.flags)
    return y, last


def convolve_backward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    past: Tensor | None,
    cu_seqlens: Tensor | None,
    silu: bool,
    dy: Tensor | None,
    dlast: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x, weight, bias and past; empty for a bias or past that is None.

    Raises:
        TypeError, ValueError: dy or dlast differs from the result that it belongs to; the errors of `convolve`.
    """
    call = _convolution(x, weight, bias, past, cu_seqlens, silu, True, dlast is not None)
    D, W = weight.shape
    check_upstream("dy", dy, x, x.shape)
    check_upstream("dlast", dlast, x, (call.sizes.sequences, W - 1, D))
    rows, stride = in_rows(torch.zeros_like(x) if dy is None else dy, D)
    dx, dpast = x.new_empty(x.shape), x.new_empty(0 if past is None else past.shape)
    sums = x.new_empty((call.slots, W + 1, D), dtype=torch.float32)
    if sums.numel():
        ends = None if dlast is None else dlast.contiguous()
        grads = ConvolutionGradients(rows, ends, dx, None if past is None else dpast, sums, stride)
        with on_device_of(x):
            launch(convolve_backward_kernel, _programs(call), 4, call.inputs, grads, call.sizes, call.dims, call.flags)
    total = sums[:, : W if bias is None else W + 1].sum(0)
    dbias = total.new_empty(0) if bias is None else total[W].to(bias.dtype)
    return dx, total[:W].t().to(weight.dtype).contiguous(), dbias, dpast


def convolve_step(x: Tensor, state: Tensor, weight: Tensor, bias: Tensor | None, silu: bool) -> Tensor:
    """y [B,D]; the state [B,D,W] is updated in place."""
    B, D = x.shape
    y = x.new_empty((B, D))
    if not y.numel():
        return y
    rows, stride = in_rows(x[:, None], D)
    weight, bias = weight.contiguous(), None if bias is None else bias.contiguous()
    mark_written(state)
    channels = min(STEP, padded(D))
    with on_device_of(x):
        launch(
            convolve_step_kernel, B * triton.cdiv(D, channels), 4, rows, stride, state, weight, bias, y, D,
            weight.shape[1], channels, silu, bias is not None,
        )  # fmt: skip
    return y


def gated_norm(x: Tensor, gate: Tensor, weight: Tensor, eps: float, silu: bool, gate_first: bool) -> Tensor:
    """y of the shape [B,T,H,V] or [B,T,V] of x.

    Raises:
        ValueError: memory that was freed.
    """
    y = x.new_empty(x.shape)
    if y.numel():
        inputs, sizes, dims, tiles, warps = _norm(x, gate, weight, eps)
        with on_device_of(x):
            flags = NormFlags(silu, gate_first)
            launch(gated_norm_kernel, tiles * dims.GROUPS, warps, inputs, y, sizes, dims, flags)
    return y


def gated_norm_backward(
    x: Tensor, gate: Tensor, weight: Tensor, eps: float, silu: bool, gate_first: bool, dy: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x, gate and weight.

    Raises:
        TypeError, ValueError: dy differs from the result that it belongs to; the error of `gated_norm`.
    """
    check_upstream("dy", dy, x, x.shape)
    dx, dgate = x.new_empty(x.shape), gate.new_empty(gate.shape)
    if not x.numel():
        return dx, dgate, torch.zeros_like(weight)
    inputs, sizes, dims, _, warps = _norm(x, gate, weight, eps)
    rows, stride = in_rows(dy, dims.GROUPS * dims.INNER * dims.V)
    sums = x.new_empty((sizes.parts, *weight.shape), dtype=torch.float32)
    grads = NormGradients(rows, dx, dgate, sums, stride)
    with on_device_of(x):
        flags = NormFlags(silu, gate_first)
        launch(gated_norm_backward_kernel, sizes.parts * dims.GROUPS, warps, inputs, grads, sizes, dims, flags)
    return dx, dgate, sums.sum(0).to(weight.dtype)


def convolution_tile(D: int, W: int, T: int, size: int, backward: bool) -> ConvolutionDims:
    """How the convolution is cut, for elements of `size` bytes.

    A run of 8 rows loads (8 + W - 1) / 8 rows for each of its own and computes z as often. A thread of the forward
    loads 16 bytes of bfloat16 or float32 at once, as much as one instruction can. One of the backward has four
    channels, of wide convolutions two, because the tiles of inputs, dz and sums of more do not fit into its registers;
    64 channels and 8 runs a program keep its partial sums at one for 64 tokens.
    """
    channels, runs = min(CHANNELS, padded(D)), 8 if size == 2 and not backward else 4
    if backward and channels == CHANNELS and W > USUAL:
        return ConvolutionDims(D, W, 4, 8, CHANNELS // 2)
    if T <= SHORT:
        return ConvolutionDims(D, W, 4 if backward else runs // 2, 8, channels)
    if backward and channels == CHANNELS:
        return ConvolutionDims(D, W, 8, 8, CHANNELS // 2)
    return ConvolutionDims(D, W, runs, 8, channels)


def norm_tile(GROUPS: int, INNER: int, V: int) -> tuple[NormDims, int]:
    """How the norm is cut, and the number of warps: 16 elements a thread, and whole rows."""
    width = padded(V)
    return NormDims(GROUPS, INNER, V, max(1, ELEMENTS // width), width), max(4, width // 512)


def _convolution(
    x: Tensor, weight: Tensor, bias: Tensor | None, past: Tensor | None, cu_seqlens: Tensor | None, silu: bool,
    backward: bool, has_dlast: bool,
) -> Call:  # fmt: skip
    check_memory(("x", "weight", "bias", "past", "cu_seqlens"), (x, weight, bias, past, cu_seqlens))
    B, T, D = x.shape
    W = weight.shape[1]
    offsets = cu_seqlens if cu_seqlens is None else _offsets(cu_seqlens, x)
    sequences = B if offsets is None else len(offsets) - 1
    rows, stride = in_rows(x, D)
    dims = convolution_tile(D, W, T if offsets is None else T // max(sequences, 1), x.element_size(), backward)
    before = W - 1 if backward and past is not None else 0
    tile = dims.N * dims.R
    slots = B * max(triton.cdiv(T + before, tile), 1)
    if offsets is not None:
        slots = (T + sequences * before) // tile + sequences
    inputs = ConvolutionInputs(
        rows,
        weight.contiguous(),
        None if bias is None else bias.contiguous(),
        None if past is None else past.contiguous(),
        offsets,
        stride,
    )
    flags = ConvolutionFlags(silu, bias is not None, past is not None, offsets is not None, has_dlast)
    return Call(inputs, ConvolutionSizes(T, sequences), dims, flags, slots)


def _offsets(cu_seqlens: Tensor, x: Tensor) -> Tensor:
    """cu_seqlens on the device of x. Values are checked where that waits for no device, or where a switch says so."""
    if (not cu_seqlens.is_cuda or settings.DEBUG) and not cu_seqlens.is_meta:
        check_offsets(cu_seqlens.tolist(), x.shape[1])
    return cu_seqlens.to(x.device, non_blocking=True).contiguous()


def _programs(call: Call) -> int:
    return call.slots * int(triton.cdiv(call.dims.D, call.dims.BD))


def _norm(x: Tensor, gate: Tensor, weight: Tensor, eps: float) -> tuple[NormInputs, NormSizes, NormDims, int, int]:
    """Groups of arguments, tiles of rows a group of heads, warps."""
    check_memory(("x", "gate", "weight"), (x, gate, weight))
    V, heads = x.shape[-1], x.shape[2] if x.ndim == 4 else 1
    tokens = x.shape[0] * x.shape[1]
    dims, warps = norm_tile(heads, 1, V) if weight.ndim == 2 else norm_tile(1, heads, V)
    (x, x_stride), (gate, gate_stride) = in_rows(x, heads * V), in_rows(gate, heads * V)
    inputs = NormInputs(x, gate, weight.contiguous(), x_stride, gate_stride)
    tiles = triton.cdiv(tokens * dims.INNER, dims.BR)
    return inputs, NormSizes(tokens, min(tiles, max(1, PARTS // dims.GROUPS)), eps), dims, tiles, warps
