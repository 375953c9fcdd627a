"""The mixer's own operators in C++: one pass over memory forward and one backward (csrc/cpu/mixer).

All calls of the compiled module for them are in this file.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypedDict

import torch
from torch import Tensor

from ...addresses import check_memory, mark_written
from ...problems.mixer import ConvolutionProblem, ConvolutionStepProblem, GatedNormProblem, MixerProblem, check_upstream
from ...problems.recurrence import check_offsets
from ..native.module import _C, MISSING, TYPE_CODES
from ..native.views import Array, Rows, address, array, rows

NAME = "cpu"
SUPPORTS = frozenset({ConvolutionProblem, ConvolutionStepProblem, GatedNormProblem})
RECORDED = False
WIDEST: int = 0 if _C is None else _C.convolution_limit
"""The largest W of a convolution."""
_PARTS = 32
"""The tokens are cut in so many parts, each with its own sum for the gradient of the weight, so that the result does
not depend on the number of threads."""

_Alive = Sequence[Tensor | None]
"""Tensors that must live while the compiled module reads them."""


class _ConvolutionFields(TypedDict):
    """The fields that _C.convolve and _C.convolve_backward take; csrc/common/mixer_ops.h says what each is."""

    sequences: int
    T: int
    D: int
    W: int
    offsets: int
    silu: bool
    x: Rows
    weight: Array
    bias: Array
    past: int


class _NormFields(TypedDict):
    """The fields that _C.gated_norm and _C.gated_norm_backward take; csrc/common/mixer_ops.h says what each is."""

    tokens: int
    heads: int
    V: int
    silu: bool
    gate_first: bool
    eps: float
    x: Rows
    gate: Rows
    weight: Array
    weight_heads: bool


def why_not(problem: MixerProblem) -> str | None:
    """None, or the sentence why the C++ kernels cannot run the problem."""
    if _C is None:
        return MISSING
    if problem.device != "cpu":
        return f"the tensors are on {problem.device}"
    for dtype in problem.types:
        if dtype not in TYPE_CODES:
            return f"no kernel for {dtype}"
    if isinstance(problem, GatedNormProblem):
        return None
    if problem.width > WIDEST:
        return f"convolutions of at most W = {WIDEST}, got {problem.width}"
    if isinstance(problem, ConvolutionProblem):
        return None
    if not problem.in_place:
        return "the state is not contiguous or not of the type of x"
    return problem.refusal


def kernel(problem: MixerProblem) -> str:
    """One line on the code that runs."""
    return f"C++ ({_C.isa()})"


def convolve(
    x: Tensor, weight: Tensor, bias: Tensor | None, past: Tensor | None, cu_seqlens: Tensor | None, silu: bool
) -> tuple[Tensor, Tensor]:
    """y [B,T,D] and the last W - 1 inputs [n,W-1,D]."""
    fields, sequences, _alive = _convolution(x, weight, bias, past, cu_seqlens, silu)
    y, last = x.new_empty(x.shape), x.new_empty((sequences, weight.shape[1] - 1, x.shape[2]))
    if y.numel() or last.numel():
        _C.convolve(**fields, y=y.data_ptr(), last=last.data_ptr())
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
        TypeError, ValueError: dy or dlast differs from the result that it belongs to.
    """
    fields, sequences, _alive = _convolution(x, weight, bias, past, cu_seqlens, silu)
    check_upstream("dy", dy, x, x.shape)
    check_upstream("dlast", dlast, x, (sequences, weight.shape[1] - 1, x.shape[2]))
    dy, view = rows(torch.zeros_like(x) if dy is None else dy, x.shape[2])
    dlast = dlast if dlast is None else dlast.contiguous()
    dx, dpast = x.new_empty(x.shape), x.new_empty(0 if past is None else past.shape)
    dweight = weight.new_empty(weight.shape, dtype=torch.float32)
    dbias = x.new_empty(0 if bias is None else len(bias), dtype=torch.float32)
    if sequences and x.shape[2]:
        _C.convolve_backward(
            **fields,
            dy=view,
            dlast=address(dlast),
            dx=dx.data_ptr(),
            dpast=0 if past is None else dpast.data_ptr(),
            dweight=dweight.data_ptr(),
            dbias=0 if bias is None else dbias.data_ptr(),
        )
    else:
        dweight, dbias = torch.zeros_like(dweight), torch.zeros_like(dbias)
    return dx, dweight.to(weight.dtype), dbias if bias is None else dbias.to(bias.dtype), dpast


def convolve_step(x: Tensor, state: Tensor, weight: Tensor, bias: Tensor | None, silu: bool) -> Tensor:
    """y [B,D]; the state [B,D,W] is updated in place."""
    B, D = x.shape
    y = x.new_empty((B, D))
    if not B or not D:
        return y
    _alive, view = rows(x[:, None], D)
    (_weight_alive, weights), (_bias_alive, biases) = array(weight), array(bias)
    mark_written(state)
    W = weight.shape[1]
    _C.convolve_step(
        B=B, D=D, W=W, silu=silu, x=view, weight=weights, bias=biases, state=state.data_ptr(), y=y.data_ptr()
    )
    return y


def gated_norm(x: Tensor, gate: Tensor, weight: Tensor, eps: float, silu: bool, gate_first: bool) -> Tensor:
    """y of the shape [B,T,H,V] or [B,T,V] of x."""
    fields, _, _alive = _norm(x, gate, weight, eps, silu, gate_first)
    y = x.new_empty(x.shape)
    if y.numel():
        _C.gated_norm(**fields, y=y.data_ptr())
    return y


def gated_norm_backward(
    x: Tensor, gate: Tensor, weight: Tensor, eps: float, silu: bool, gate_first: bool, dy: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x, gate and weight.

    Raises:
        TypeError, ValueError: dy differs from the result that it belongs to.
    """
    check_upstream("dy", dy, x, x.shape)
    fields, width, _alive = _norm(x, gate, weight, eps, silu, gate_first)
    dy, view = rows(dy, width)  # type: ignore[assignment]
    dx, dgate = x.new_empty(x.shape), gate.new_empty(gate.shape)
    parts = max(1, min(_PARTS, fields["tokens"]))
    dweight = weight.new_empty((parts, *weight.shape), dtype=torch.float32)
    if not x.numel():
        return dx, dgate, torch.zeros_like(weight)
    _C.gated_norm_backward(
        **fields, dy=view, dx=dx.data_ptr(), dgate=dgate.data_ptr(), parts=parts, dweight=dweight.data_ptr()
    )
    return dx, dgate, dweight.sum(0).to(weight.dtype)


def _convolution(
    x: Tensor, weight: Tensor, bias: Tensor | None, past: Tensor | None, cu_seqlens: Tensor | None, silu: bool
) -> tuple[_ConvolutionFields, int, _Alive]:
    """The fields of a call, the number of sequences, and the tensors that must live while it runs."""
    B, T, D = x.shape
    check_memory(("x", "weight", "bias", "past", "cu_seqlens"), (x, weight, bias, past, cu_seqlens))
    offsets = None
    if cu_seqlens is not None:  # a copy, as in fields.py; a compiled graph, too, has values only here
        offsets = cu_seqlens.to("cpu", torch.int64, copy=True, memory_format=torch.contiguous_format).resolve_neg()
        check_offsets(offsets.tolist(), T)
    sequences = B if offsets is None else len(offsets) - 1
    tokens, view = rows(x, D)
    (weight_alive, weights), (bias_alive, biases) = array(weight), array(bias)
    past = past if past is None else past.contiguous()
    fields: _ConvolutionFields = {
        "sequences": sequences,
        "T": T,
        "D": D,
        "W": weight.shape[1],
        "offsets": address(offsets),
        "silu": silu,
        "x": view,
        "weight": weights,
        "bias": biases,
        "past": address(past),
    }
    return fields, sequences, [offsets, tokens, weight_alive, bias_alive, past]


def _norm(
    x: Tensor, gate: Tensor, weight: Tensor, eps: float, silu: bool, gate_first: bool
) -> tuple[_NormFields, int, _Alive]:
    """The fields of a call, the elements of a token, and the tensors that must live while it runs."""
    check_memory(("x", "gate", "weight"), (x, gate, weight))
    V, heads = x.shape[-1], x.shape[2] if x.ndim == 4 else 1
    tokens = x.shape[0] * x.shape[1]
    (x_alive, x_view), (gate_alive, gate_view) = rows(x, heads * V), rows(gate, heads * V)
    weight_alive, weights = array(weight)
    fields: _NormFields = {
        "tokens": tokens,
        "heads": heads,
        "V": V,
        "silu": silu,
        "gate_first": gate_first,
        "eps": eps,
        "x": x_view,
        "gate": gate_view,
        "weight": weights,
        "weight_heads": weight.ndim == 2,
    }
    return fields, heads * V, [x_alive, gate_alive, weight_alive]
