"""The calls of a mixer's own operators: the short convolution, its step, and the gated RMS norm.

This file alone rejects what these operators are called with.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..addresses import check_memory, check_writable, check_written
from ..eager import forward_mode, native_on_cpu, unrecorded, untraced
from .blocks import KERNEL_TYPES
from .recurrence import check_dense, check_flag, check_packing, finite

Types = tuple[torch.dtype, ...]


class ConvolutionProblem(NamedTuple):
    """One call of `short_convolution` with x [B,T,D] and weight [D,W].

    device  the device type of x
    types   the types of x, weight, and those of bias and past that are given
    width   W
    silu    whether y is silu(z), else z
    """

    device: str
    types: Types
    width: int
    silu: bool


class ConvolutionStepProblem(NamedTuple):
    """One call of `short_convolution_step` with x [B,D], weight [D,W] and a state [B,D,W].

    device, types, width, silu  the same as in ConvolutionProblem, with the state in the place of past
    in_place  whether a kernel can update the state where it is stored: it is contiguous and of the type of x
    refusal   the sentence why only torch's operators can run the step, None where kernels may
    """

    device: str
    types: Types
    width: int
    silu: bool
    in_place: bool
    refusal: str | None


class GatedNormProblem(NamedTuple):
    """One call of `gated_rms_norm`.

    device      the device type of x
    types       the types of x, gate and weight
    eps         the number that is added to the mean of squares
    silu        whether the gate passes silu, else sigmoid
    gate_first  whether the gate is applied before the norm
    V           the number of elements that share a norm
    """

    device: str
    types: Types
    eps: float
    silu: bool
    gate_first: bool
    V: int


MixerProblem = ConvolutionProblem | ConvolutionStepProblem | GatedNormProblem


def check_convolution(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    past: Tensor | None,
    activation: str | None,
    cu_seqlens: Tensor | None,
) -> ConvolutionProblem:
    """Check all that can be told before the call runs; the kernels check the values of cu_seqlens.

    Raises:
        TypeError: an argument that is not a tensor, or of a wrong type.
        ValueError: a shape, layout, device, activation or memory that does not fit.
    """
    _check_floats(x, weight=weight, bias=bias, past=past)
    check_convolution_sizes(x, weight, bias, past, activation, cu_seqlens)
    if untraced(x, weight, bias, past, cu_seqlens):
        check_memory(("x", "weight", "bias", "past", "cu_seqlens"), (x, weight, bias, past, cu_seqlens))
    types = _types(x, weight, bias, None if past is None else x)  # past takes the type of x before any kernel runs
    return ConvolutionProblem(x.device.type, types, weight.shape[1], activation == "silu")


def check_convolution_sizes(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    past: Tensor | None,
    activation: str | None,
    cu_seqlens: Tensor | None,
) -> None:
    """Check shapes and options of tensors of floats.

    Raises:
        TypeError, ValueError: names the argument.
    """
    if x.ndim != 3:
        raise ValueError(f"x: got shape {list(x.shape)}; expected [B,T,D]")
    B, _, D = x.shape
    _check_weights(D, weight, bias, activation)
    if cu_seqlens is not None:
        check_packing(cu_seqlens, B)
        if cu_seqlens.device.type != "cpu" and cu_seqlens.device != x.device:
            raise ValueError(f"cu_seqlens: got device {cu_seqlens.device}; expected {x.device}, where x is")
    n = B if cu_seqlens is None else len(cu_seqlens) - 1
    if past is not None and past.shape != (n, weight.shape[1] - 1, D):
        raise ValueError(f"past: got {list(past.shape)}; expected [n,W-1,D] = {[n, weight.shape[1] - 1, D]}")


def check_step(
    x: Tensor, state: Tensor, weight: Tensor, bias: Tensor | None, activation: str | None
) -> ConvolutionStepProblem:
    """Check all of a step, which updates the state in place.

    Raises:
        TypeError: an argument that is not a tensor of floats.
        ValueError: a shape, layout, device or activation that does not fit, a state that overlaps itself or another
            argument, or memory that was freed.
    """
    if state is None:
        check_dense("state", state)
    _check_floats(x, weight=weight, bias=bias, state=state)
    check_step_operands(x, state, weight, bias, activation, untraced(x, state, weight, bias))
    if x.is_cpu:
        readable = native_on_cpu(KERNEL_TYPES, x, state, weight, bias)
    else:
        readable = unrecorded(x, state, weight, bias) and not forward_mode()
    return ConvolutionStepProblem(
        x.device.type,
        _types(x, state, weight, bias),
        weight.shape[1],
        activation == "silu",
        state.dtype == x.dtype and state.is_contiguous(),
        None if readable else "torch's dispatcher has to see the call: a graph, gradient, transform or negated tensor",
    )


def check_step_operands(
    x: Tensor, state: Tensor, weight: Tensor, bias: Tensor | None, activation: str | None, addressed: bool
) -> None:
    """Check shapes, options and, where they are `addressed` at a place in memory, addresses of tensors of floats.

    Raises:
        ValueError: a shape or option that does not fit, memory that was freed, or a state that overlaps itself or
            another argument.
    """
    if x.ndim != 2:
        raise ValueError(f"x: got shape {list(x.shape)}; expected [B,D]")
    B, D = x.shape
    _check_weights(D, weight, bias, activation)
    W = weight.shape[1]
    if state.shape != (B, D, W):
        raise ValueError(f"state: got {list(state.shape)}; expected [B,D,W] = {[B, D, W]}")
    if addressed:
        check_memory(("x", "weight", "bias", "state"), (x, weight, bias, state))
        if not state.is_meta:
            check_written("state", state, ("x", "weight", "bias"), (x, weight, bias))
    elif not torch.compiler.is_compiling():
        check_writable("state", state)


def check_step_tokens(
    x: Tensor,
    state: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    activation: str | None,
    indices: Tensor | None,
    states_out: Tensor | None,
    out_indices: Tensor | None,
    most: int,
) -> None:
    """Check types, shapes, devices and options of a step of T tokens x [B,T,D], on states [B,D,W] or a pool of them.

    Raises:
        TypeError, ValueError: names the argument.
    """
    _check_floats(x, weight=weight, bias=bias, state=state)
    if x.ndim != 3:
        raise ValueError(f"x: got shape {list(x.shape)}; expected [B,D] or [B,T,D]")
    B, T, D = x.shape
    _check_weights(D, weight, bias, activation)
    each = (D, weight.shape[1])
    rows = B if indices is None else state.shape[0] if state.ndim else 0
    if state.shape != (rows, *each):
        raise ValueError(f"state: got {list(state.shape)}; expected {['B' if indices is None else 'n', *each]}")
    for name, t, shape in (("state_indices", indices, (B,)), ("states_out_indices", out_indices, (B, T))):
        if t is not None:
            check_dense(name, t)
            if t.dtype not in (torch.int32, torch.int64) or t.shape != shape or t.device != x.device:
                got, expected = f"{t.dtype} {list(t.shape)} on {t.device}", f"{list(shape)} on {x.device}"
                raise ValueError(f"{name}: got {got}; expected int32 or int64 {expected}")
    if states_out is None:
        if out_indices is not None:
            raise ValueError("states_out: got None; expected the pool that states_out_indices name rows of")
        return
    _check_float("states_out", states_out, x)
    rows = states_out.shape[0] if states_out.ndim else 0
    size = (B, T, *each) if out_indices is None else (rows, *each)
    if states_out.shape != size or states_out.dtype != state.dtype:
        got = f"{states_out.dtype} {list(states_out.shape)}"
        raise ValueError(f"states_out: got {got}; expected {state.dtype} {list(size)}")
    if most < T:
        raise ValueError(f"states_out: got T = {T} tokens; expected at most {most}")


def check_gated_norm(
    x: Tensor, gate: Tensor, weight: Tensor, eps: float, activation: str, gate_first: bool
) -> GatedNormProblem:
    """Check all of a gated norm.

    Raises:
        TypeError: an argument that is not a tensor of floats, eps no number, gate_first no bool.
        ValueError: a shape, layout, device, eps, activation or memory that does not fit.
    """
    _check_floats(x, gate=gate, weight=weight)
    if untraced(x, gate, weight):
        check_memory(("x", "gate", "weight"), (x, gate, weight))
    eps = check_gated_norm_sizes(x, gate, weight, eps, activation, gate_first)
    return GatedNormProblem(x.device.type, _types(x, gate, weight), eps, activation == "silu", gate_first, x.shape[-1])


def check_gated_norm_sizes(
    x: Tensor, gate: Tensor, weight: Tensor, eps: float, activation: str, gate_first: bool
) -> float:
    """Check shapes and options of tensors of floats, and return eps as a float of Python.

    Raises:
        TypeError, ValueError: names the argument.
    """
    eps = finite("eps", eps)
    check_flag("gate_first", gate_first)
    if x.ndim not in (2, 3, 4) or x.shape != gate.shape:
        raise ValueError(f"gate: got {list(gate.shape)}, x {list(x.shape)}; expected both [B,T,H,V], [B,T,V] or [T,V]")
    each, every = x.shape[-1:], x.shape[2:] or x.shape[-1:]
    if weight.shape not in (each, every):
        raise ValueError(f"weight: got {list(weight.shape)}; expected {list(each)} or {list(every)}")
    if activation not in ("silu", "sigmoid"):
        raise ValueError(f"activation: got {activation!r}; expected 'silu' or 'sigmoid'")
    return eps


def check_kernel_types(**tensors: Tensor | None) -> None:
    """Refuse a type that no kernel of the mixer reads.

    Raises:
        TypeError: names the argument.
    """
    for name, t in tensors.items():
        if t is not None and t.dtype not in KERNEL_TYPES:
            raise TypeError(f"{name}: got {t.dtype}; expected one of {', '.join(map(str, KERNEL_TYPES))}")


def check_convolution_operands(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    past: Tensor | None,
    cu_seqlens: Tensor | None,
    silu: bool,
    widest: int,
) -> None:
    """Check what the operators `sleepkern::convolve` and `convolve_backward` are called with, which anybody may call.

    widest is the largest W that the kernel has.

    Raises:
        TypeError, ValueError: names the argument.
    """
    _check_floats(x, weight=weight, bias=bias, past=past)
    check_convolution_sizes(x, weight, bias, past, "silu" if silu else None, cu_seqlens)
    check_kernel_types(x=x, weight=weight, bias=bias, past=past)
    if past is not None and past.dtype != x.dtype:
        raise TypeError(f"past: got {past.dtype}; expected {x.dtype}, the type of x")
    if weight.shape[1] > widest:
        raise ValueError(f"weight: got W = {weight.shape[1]}; expected at most {widest}")


def check_gated_norm_operands(x: Tensor, gate: Tensor, weight: Tensor, eps: float) -> None:
    """Check what the operators `sleepkern::gated_norm` and `gated_norm_backward` are called with.

    Raises:
        TypeError, ValueError: names the argument.
    """
    _check_floats(x, gate=gate, weight=weight)
    check_kernel_types(x=x, gate=gate, weight=weight)
    if x.ndim == 2:
        raise ValueError(f"gate: got {list(gate.shape)}, x {list(x.shape)}; expected both [B,T,H,V] or [B,T,V]")
    check_gated_norm_sizes(x, gate, weight, eps, "silu", False)


def check_upstream(name: str, t: Tensor | None, x: Tensor, shape: Sequence[int]) -> None:
    """Refuse a gradient from above that differs in shape or type from the result that it belongs to.

    Raises:
        TypeError, ValueError: names the argument.
    """
    if t is None:
        return
    _check_float(name, t, x)
    if t.shape != torch.Size(shape) or t.dtype != x.dtype:
        raise ValueError(f"{name}: got {t.dtype} {list(t.shape)}; expected {x.dtype} {list(shape)}")
    check_memory((name,), (t,))


def _check_floats(x: Tensor, **others: Tensor | None) -> None:
    """Refuse tensors that are not floats on the device of x; only bias and past may be absent."""
    _check_float("x", x, x)
    for name, t in others.items():
        if t is not None or name not in ("bias", "past"):
            _check_float(name, t, x)


def _check_float(name: str, given: object, x: Tensor) -> None:
    t = check_dense(name, given)
    if not t.is_floating_point():
        raise TypeError(f"{name}: got {t.dtype}; expected floats")
    if t.device != x.device:
        raise ValueError(f"{name}: got device {t.device}; expected {x.device}, where x is")


def _check_weights(D: int, weight: Tensor, bias: Tensor | None, activation: str | None) -> None:
    if weight.ndim != 2 or weight.shape[0] != D or weight.shape[1] == 0:
        raise ValueError(f"weight: got {list(weight.shape)}; expected [D,W] with D = {D} and W of at least 1")
    if bias is not None and bias.shape != (D,):
        raise ValueError(f"bias: got {list(bias.shape)}; expected [D] = {[D]}")
    if activation not in ("silu", None):
        raise ValueError(f"activation: got {activation!r}; expected 'silu' or None")


def _types(*tensors: Tensor | None) -> Types:
    return tuple(t.dtype for t in tensors if t is not None)
