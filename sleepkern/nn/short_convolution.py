"""The short causal convolution before a mixer's recurrence.

    z_t = bias + sum_j w_{W-1-j} x_{t-j}, j < W;   y_t = silu(z_t) or z_t      each channel for itself

On the CPU one C++ pass over memory forward and one backward (csrc/cpu/mixer/convolution.h); elsewhere torch's
operators.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..addresses import check_memory, check_writable, check_written, mark_written
from ..backends.native.module import _C
from ..backends.native.views import address, array, rows
from ..backends.torch_common import differentiable
from ..eager import refuse_tangents, untraced
from ..problems.recurrence import check_offsets, check_packing
from ..transforms import offsets_of
from . import native

_library = torch.library.Library("sleepkern", "FRAGMENT")
_INPUTS = "Tensor x, Tensor weight, Tensor? bias, Tensor? past, Tensor? cu_seqlens, bool silu"
_library.define(f"convolve({_INPUTS}) -> (Tensor, Tensor)")
_library.define(f"convolve_backward({_INPUTS}, Tensor? dy, Tensor? dlast) -> (Tensor, Tensor, Tensor, Tensor)")


def short_convolution(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    past: Tensor | None = None,
    activation: str | None = "silu",
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Convolve tokens with the W - 1 before each, those of its own sequence only.

    Args:
        x: [B,T,D] of any float type; channels side by side are read in place.
        weight: [D,W], the token's own last, as torch's conv1d has it.
        bias: [D].
        past: [n,W-1,D] inputs before the first token of each of the n sequences, default zeros.
        activation: "silu" or None.
        cu_seqlens: [n+1] where packed sequences start and end, with B = 1; default one sequence a row.

    Returns:
        y [B,T,D] in x's type, and the last W - 1 inputs [n,W-1,D], `past` of a call that goes on. Differentiable in
        x, weight, bias and past.

    Raises:
        TypeError: an argument is not a tensor, not of floats, or cu_seqlens of another type than int32 or int64.
        ValueError: a shape, layout, device, activation or cu_seqlens that does not fit.
    """
    direct = x is not None and weight is not None and native.direct(x, weight, bias, past)
    direct = direct and (cu_seqlens is None or untraced(cu_seqlens))
    if not direct:
        _check_tensors(x, weight, bias, past=past)
    _check(x, weight, bias, past, activation, cu_seqlens)
    direct = direct and weight.shape[1] <= _C.convolution_limit
    if not direct and untraced(x, weight, bias, past, cu_seqlens):
        check_memory(("x", "weight", "bias", "past", "cu_seqlens"), (x, weight, bias, past, cu_seqlens))
    silu = activation == "silu"
    past = past if past is None else past.to(x.dtype)
    if not (direct or native.usable(x, weight, bias, past)) or weight.shape[1] > _C.convolution_limit:
        return _by_torch(x, weight, bias, past, cu_seqlens, silu)
    if direct:
        return _convolve(x, weight, bias, past, cu_seqlens, silu)
    refuse_tangents(x, weight, bias, past)
    y, last = torch.ops.sleepkern.convolve.default(x, weight, bias, past, cu_seqlens, silu)
    return y, last


def short_convolution_step(
    x: Tensor, state: Tensor, weight: Tensor, bias: Tensor | None = None, activation: str | None = "silu"
) -> Tensor:
    """One token after those that the state holds; the state moves on in place. Not differentiable.

    Args:
        x: [B,D].
        state: [B,D,W] last W inputs of each channel, the newest last.
        weight, bias, activation: as above.

    Returns:
        y [B,D] in x's type.

    Raises:
        TypeError: an argument is not a tensor, or not of floats.
        ValueError: a shape, layout, device or activation that does not fit, or a state that overlaps itself or another
            argument.
    """
    missing = x is None or weight is None or state is None
    direct = not missing and native.direct(x, weight, bias, state)
    if not direct:
        _check_tensors(x, weight, bias, state=state)
    if x.ndim != 2:
        raise ValueError(f"x: got shape {list(x.shape)}; expected [B,D]")
    _check_weights(x.shape[1], weight, bias, activation)
    B, D, W = (*x.shape, weight.shape[1])
    if state.shape != (B, D, W):
        raise ValueError(f"state: got {list(state.shape)}; expected [B,D,W] = {[B, D, W]}")
    silu = activation == "silu"
    if direct or untraced(x, state, weight, bias):
        check_memory(("x", "weight", "bias", "state"), (x, weight, bias, state))
        if not state.is_meta:
            check_written("state", state, ("x", "weight", "bias"), (x, weight, bias))
    elif not torch.compiler.is_compiling():
        check_writable("state", state)
    if not direct and native.usable(x, state, weight, bias):
        refuse_tangents(x, state, weight, bias)
    if not direct or not x.numel() or W > _C.convolution_limit or state.dtype != x.dtype or not state.is_contiguous():
        state.copy_(torch.cat([state[..., 1:], x[..., None].to(state.dtype)], dim=-1))
        z = (state.to(weight.dtype) * weight).sum(-1)
        z = z if bias is None else z + bias
        return (F.silu(z) if silu else z).to(x.dtype)
    x, view = rows(x[:, None], D)  # type: ignore[assignment]
    (_alive, weights), (_alive_too, biases) = array(weight), array(bias)
    y = x.new_empty((B, D))
    mark_written(state)
    _C.convolve_step(B, D, W, silu, view, weights, biases, state.data_ptr(), y.data_ptr())
    return y


class ShortConvolution(nn.Module):
    """`short_convolution` with weights of its own, silu, without bias.

    Args:
        channels: D.
        width: W, tokens that an output sees.
    """

    def __init__(self, channels: int, width: int = 4) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(channels, width))
        nn.init.normal_(self.weight, std=width**-0.5)

    def forward(self, x: Tensor, past: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """x [B,T,D] and the width - 1 inputs before it [B,width-1,D] to (y [B,T,D], the last width - 1 inputs)."""
        return short_convolution(x, self.weight, past=past)


def _check(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    past: Tensor | None,
    activation: str | None,
    cu_seqlens: Tensor | None,
) -> None:
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


def _check_tensors(x: Tensor, weight: Tensor, bias: Tensor | None, **more: Tensor | None) -> None:
    """Floats at strides on one device; only bias and past may be absent."""
    native.check_floats("x", x, x)
    native.check_floats("weight", weight, x)
    for name, t in (("bias", bias), *more.items()):
        if t is not None or name == "state":
            native.check_floats(name, t, x)


def _check_weights(D: int, weight: Tensor, bias: Tensor | None, activation: str | None) -> None:
    if weight.ndim != 2 or weight.shape[0] != D or weight.shape[1] == 0:
        raise ValueError(f"weight: got {list(weight.shape)}; expected [D,W] with D = {D} and W of at least 1")
    if bias is not None and bias.shape != (D,):
        raise ValueError(f"bias: got {list(bias.shape)}; expected [D] = {[D]}")
    if activation not in ("silu", None):
        raise ValueError(f"activation: got {activation!r}; expected 'silu' or None")


def _arguments(
    x: Tensor, weight: Tensor, bias: Tensor | None, past: Tensor | None, cu_seqlens: Tensor | None, silu: bool
) -> tuple[tuple[object, ...], int, list[Tensor | None]]:
    """What both entry points of _C take first, the number of sequences, and the tensors that must live meanwhile."""
    B, T, D = x.shape
    check_memory(("x", "weight", "bias", "past", "cu_seqlens"), (x, weight, bias, past, cu_seqlens))
    offsets = None if cu_seqlens is None else cu_seqlens.to("cpu", torch.int64).contiguous().resolve_neg()
    if offsets is not None:  # here, where values are at hand in a compiled graph, too
        check_offsets(offsets.tolist(), T)
    sequences = B if offsets is None else len(offsets) - 1
    tokens, view = rows(x, D)
    (weight_alive, weights), (bias_alive, biases) = array(weight), array(bias)
    past = past if past is None else past.contiguous()
    arguments = (
        sequences, T, D, weight.shape[1], address(offsets), silu, view, weights, biases, address(past),
    )  # fmt: skip
    return arguments, sequences, [offsets, tokens, weight_alive, bias_alive, past]


def _convolve(
    x: Tensor, weight: Tensor, bias: Tensor | None, past: Tensor | None, cu_seqlens: Tensor | None, silu: bool
) -> tuple[Tensor, Tensor]:
    arguments, sequences, _alive = _arguments(x, weight, bias, past, cu_seqlens, silu)
    y, last = x.new_empty(x.shape), x.new_empty((sequences, weight.shape[1] - 1, x.shape[2]))
    if y.numel() or last.numel():
        _C.convolve(*arguments, y.data_ptr(), last.data_ptr())
    return y, last


def _checked_convolve(
    x: Tensor, weight: Tensor, bias: Tensor | None, past: Tensor | None, cu_seqlens: Tensor | None, silu: bool
) -> tuple[Tensor, Tensor]:
    """The operator, which anybody may call."""
    _check_tensors(x, weight, bias, past=past)
    _check(x, weight, bias, past, "silu" if silu else None, cu_seqlens)
    _check_native(x, weight, bias, past)
    return _convolve(x, weight, bias, past, cu_seqlens, silu)


def _check_native(x: Tensor, weight: Tensor, bias: Tensor | None, past: Tensor | None) -> None:
    """What the operators ask beyond `short_convolution`, which takes torch's instead where C++ has no kernel."""
    native.check_kernel(x=x, weight=weight, bias=bias, past=past)
    if past is not None and past.dtype != x.dtype:
        raise TypeError(f"past: got {past.dtype}; expected {x.dtype}, the type of x")
    if weight.shape[1] > _C.convolution_limit:
        raise ValueError(f"weight: got W = {weight.shape[1]}; expected at most {_C.convolution_limit}")


def _convolve_fake(
    x: Tensor, weight: Tensor, bias: Tensor | None, past: Tensor | None, cu_seqlens: Tensor | None, silu: bool
) -> tuple[Tensor, Tensor]:
    sequences = x.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    return x.new_empty(x.shape), x.new_empty((sequences, weight.shape[1] - 1, x.shape[2]))


def _convolve_backward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    past: Tensor | None,
    cu_seqlens: Tensor | None,
    silu: bool,
    dy: Tensor | None,
    dlast: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    _check_tensors(x, weight, bias, past=past)
    _check(x, weight, bias, past, "silu" if silu else None, cu_seqlens)
    _check_native(x, weight, bias, past)
    arguments, sequences, _alive = _arguments(x, weight, bias, past, cu_seqlens, silu)
    native.check_upstream("dy", dy, x, x.shape)
    native.check_upstream("dlast", dlast, x, (sequences, weight.shape[1] - 1, x.shape[2]))
    dy, view = rows(torch.zeros_like(x) if dy is None else dy, x.shape[2])
    dlast = dlast if dlast is None else dlast.contiguous()
    dx, dpast = x.new_empty(x.shape), x.new_empty(0 if past is None else past.shape)
    dweight = weight.new_empty(weight.shape, dtype=torch.float32)
    dbias = x.new_empty(0 if bias is None else len(bias), dtype=torch.float32)
    if sequences and x.shape[2]:
        _C.convolve_backward(
            *arguments, view, address(dlast), dx.data_ptr(), 0 if past is None else dpast.data_ptr(),
            dweight.data_ptr(), 0 if bias is None else dbias.data_ptr(),
        )  # fmt: skip
    else:
        dweight, dbias = torch.zeros_like(dweight), torch.zeros_like(dbias)
    return dx, dweight.to(weight.dtype), dbias if bias is None else dbias.to(bias.dtype), dpast


def _convolve_backward_fake(
    x: Tensor, weight: Tensor, bias: Tensor | None, past: Tensor | None, *rest: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    dbias = x.new_empty(0, dtype=torch.float32) if bias is None else torch.empty_like(bias)
    dpast = x.new_empty(0 if past is None else past.shape)
    return x.new_empty(x.shape), weight.new_empty(weight.shape), dbias, dpast


def _save(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    # A copy of cu_seqlens: by numpy it may change before the backward, and torch would not see it.
    offsets = None if inputs[4] is None else inputs[4].clone()
    ctx.save_for_backward(*inputs[:4], offsets)
    ctx.silu = inputs[5]
    ctx.set_materialize_grads(False)


def _differentiate(ctx: Any, dy: Tensor | None, dlast: Tensor | None) -> tuple[Any, ...]:
    x, weight, bias, past, cu_seqlens = ctx.saved_tensors
    if dy is None and dlast is None:
        return (None,) * 6
    if torch.is_grad_enabled():

        def by_torch(x: Tensor, weight: Tensor, bias: Tensor | None, past: Tensor | None) -> tuple[Tensor, Tensor]:
            return _by_torch(x, weight, bias, past, cu_seqlens, ctx.silu)

        grads = differentiable(by_torch, (x, weight, bias, past), (dy, dlast))
        return (*grads, None, None)
    dx, dweight, dbias, dpast = torch.ops.sleepkern.convolve_backward.default(
        x, weight, bias, past, cu_seqlens, ctx.silu, dy, dlast
    )
    return dx, dweight, None if bias is None else dbias, None if past is None else dpast, None, None


def _by_torch(
    x: Tensor, weight: Tensor, bias: Tensor | None, past: Tensor | None, cu_seqlens: Tensor | None, silu: bool
) -> tuple[Tensor, Tensor]:
    if cu_seqlens is not None:
        ends = offsets_of(cu_seqlens)
        check_offsets(ends, x.shape[1])
        parts = [
            _by_torch(x[:, a:b], weight, bias, None if past is None else past[i : i + 1], None, silu)
            for i, (a, b) in enumerate(zip(ends, ends[1:], strict=False))
        ]
        return torch.cat([y for y, _ in parts], dim=1), torch.cat([last for _, last in parts])
    W, T = weight.shape[1], x.shape[1]
    if past is None:
        past = x.new_zeros(x.shape[0], W - 1, x.shape[2])
    full = torch.cat([past, x], dim=1)
    z = full[:, W - 1 :] * weight[:, W - 1]
    for j in range(1, W):
        z = torch.addcmul(z, full[:, W - 1 - j : W - 1 - j + T], weight[:, W - 1 - j])
    z = z if bias is None else z + bias
    return (F.silu(z) if silu else z).to(x.dtype), full[:, T:]


_library.impl("convolve", _checked_convolve, "CPU")
_library.impl("convolve_backward", _convolve_backward, "CPU")
torch.library.register_fake("sleepkern::convolve", _convolve_fake, lib=_library)
torch.library.register_fake("sleepkern::convolve_backward", _convolve_backward_fake, lib=_library)
torch.library.register_autograd("sleepkern::convolve", _differentiate, setup_context=_save, lib=_library)
