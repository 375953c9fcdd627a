"""The gated RMS norm after a mixer's recurrence.

    y = w r x act(gate), r = (mean x^2 + eps)^-1/2        gate first (Mamba-2): y = w u r(u), u = x act(gate)

On the CPU one C++ pass over memory forward and one backward (csrc/cpu/mixer/gated_norm.h); elsewhere torch's operators.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..addresses import check_memory
from ..backends.native.module import _C
from ..backends.native.views import array, rows
from ..backends.torch_common import differentiable
from ..eager import refuse_tangents, untraced
from ..problems.recurrence import check_flag, finite
from . import native

_PARTS = 32
"""Of the tokens, each with a sum of its own for the gradient of the weight, whatever the number of threads."""
_library = torch.library.Library("sleepkern", "FRAGMENT")
_INPUTS = "Tensor x, Tensor gate, Tensor weight, float eps, bool silu, bool gate_first"
_library.define(f"gated_norm({_INPUTS}) -> Tensor")
_library.define(f"gated_norm_backward({_INPUTS}, Tensor dy) -> (Tensor, Tensor, Tensor)")


def gated_rms_norm(
    x: Tensor, gate: Tensor, weight: Tensor, eps: float = 1e-6, activation: str = "silu", gate_first: bool = False
) -> Tensor:
    """Normalise over the last dimension, in float32 whatever the types.

    Args:
        x, gate: [B,T,H,V], [B,T,V] or [T,V]; heads side by side are read in place.
        weight: [V], or [H,V].
        eps: added to the mean of squares.
        activation: of the gate, "silu" or "sigmoid".
        gate_first: whether the gate is applied before the norm.

    Returns:
        The same shape, in x's type. Differentiable in x, gate and weight.

    Raises:
        TypeError: an argument is not a tensor of floats, eps no number, gate_first no bool.
        ValueError: a shape, layout, device, eps or activation that does not fit.
    """
    direct = x is not None and gate is not None and weight is not None and native.direct(x, gate, weight)
    if not direct:
        _check_tensors(x, gate, weight)
    if not direct and untraced(x, gate, weight):
        check_memory(("x", "gate", "weight"), (x, gate, weight))
    eps = finite("eps", eps)
    check_flag("gate_first", gate_first)
    if x.ndim == 2 and gate.ndim == 2:
        return gated_rms_norm(x[None], gate[None], weight, eps, activation, gate_first)[0]
    _check_shapes(x, gate, weight)
    if activation not in ("silu", "sigmoid"):
        raise ValueError(f"activation: got {activation!r}; expected 'silu' or 'sigmoid'")
    silu = activation == "silu"
    if not direct and not native.usable(x, gate, weight):
        return _by_torch(x, gate, weight, eps, silu, gate_first)
    if direct:
        return _gated_norm(x, gate, weight, eps, silu, gate_first)
    refuse_tangents(x, gate, weight)
    return torch.ops.sleepkern.gated_norm.default(x, gate, weight, eps, silu, gate_first)  # type: ignore[no-any-return]


def _check_tensors(x: Tensor, gate: Tensor, weight: Tensor) -> None:
    for name, t in (("x", x), ("gate", gate), ("weight", weight)):
        native.check_floats(name, t, x)


def _check_shapes(x: Tensor, gate: Tensor, weight: Tensor) -> None:
    if x.ndim not in (3, 4) or x.shape != gate.shape:
        raise ValueError(f"gate: got {list(gate.shape)}, x {list(x.shape)}; expected both [B,T,H,V], [B,T,V] or [T,V]")
    if weight.shape not in (x.shape[-1:], x.shape[2:]):
        raise ValueError(f"weight: got {list(weight.shape)}; expected {list(x.shape[-1:])} or {list(x.shape[2:])}")


class GatedRMSNorm(nn.Module):
    """`gated_rms_norm` with a weight of its own, norm first, silu."""

    def __init__(self, width: int, eps: float = 1e-6) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x: Tensor, gate: Tensor) -> Tensor:
        """x, gate [B,T,H,width] to the same."""
        return gated_rms_norm(x, gate, self.weight, self.eps)


def _arguments(
    x: Tensor, gate: Tensor, weight: Tensor, eps: float, silu: bool, gate_first: bool
) -> tuple[tuple[object, ...], int, int, list[Tensor | None]]:
    """What both entry points of _C take first, tokens, numbers of a token, and what must live meanwhile."""
    check_memory(("x", "gate", "weight"), (x, gate, weight))
    V, heads = x.shape[-1], x.shape[2] if x.ndim == 4 else 1
    tokens = x.shape[0] * x.shape[1]
    (x_alive, x_view), (gate_alive, gate_view) = rows(x, heads * V), rows(gate, heads * V)
    weight_alive, weights = array(weight)
    arguments = (tokens, heads, V, silu, gate_first, eps, x_view, gate_view, weights, weight.ndim == 2)
    return arguments, tokens, heads * V, [x_alive, gate_alive, weight_alive]


def _gated_norm(x: Tensor, gate: Tensor, weight: Tensor, eps: float, silu: bool, gate_first: bool) -> Tensor:
    arguments, _, _, _alive = _arguments(x, gate, weight, eps, silu, gate_first)
    y = x.new_empty(x.shape)
    if y.numel():
        _C.gated_norm(*arguments, y.data_ptr())
    return y


def _checked_gated_norm(x: Tensor, gate: Tensor, weight: Tensor, eps: float, silu: bool, gate_first: bool) -> Tensor:
    """The operator, which anybody may call."""
    _check_operands(x, gate, weight, eps)
    return _gated_norm(x, gate, weight, eps, silu, gate_first)


def _check_operands(x: Tensor, gate: Tensor, weight: Tensor, eps: float) -> None:
    _check_tensors(x, gate, weight)
    native.check_kernel(x=x, gate=gate, weight=weight)
    finite("eps", eps)
    _check_shapes(x, gate, weight)


def _gated_norm_fake(x: Tensor, *rest: Any) -> Tensor:
    return x.new_empty(x.shape)


def _gated_norm_backward(
    x: Tensor, gate: Tensor, weight: Tensor, eps: float, silu: bool, gate_first: bool, dy: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    _check_operands(x, gate, weight, eps)
    native.check_upstream("dy", dy, x, x.shape)
    arguments, tokens, width, _alive = _arguments(x, gate, weight, eps, silu, gate_first)
    dy, view = rows(dy, width)  # type: ignore[assignment]
    dx, dgate = x.new_empty(x.shape), gate.new_empty(gate.shape)
    parts = max(1, min(_PARTS, tokens))
    dweight = weight.new_empty((parts, *weight.shape), dtype=torch.float32)
    if not x.numel():
        return dx, dgate, torch.zeros_like(weight)
    _C.gated_norm_backward(*arguments, view, dx.data_ptr(), dgate.data_ptr(), parts, dweight.data_ptr())
    return dx, dgate, dweight.sum(0).to(weight.dtype)


def _gated_norm_backward_fake(x: Tensor, gate: Tensor, weight: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    return x.new_empty(x.shape), gate.new_empty(gate.shape), weight.new_empty(weight.shape)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    ctx.save_for_backward(*inputs[:3])
    ctx.options = inputs[3:]


def _differentiate(ctx: Any, dy: Tensor) -> tuple[Any, ...]:
    if torch.is_grad_enabled():
        grads = differentiable(lambda *t: (_by_torch(*t, *ctx.options),), ctx.saved_tensors, (dy,))
        return (*grads, None, None, None)
    return (*torch.ops.sleepkern.gated_norm_backward.default(*ctx.saved_tensors, *ctx.options, dy), None, None, None)


def _by_torch(x: Tensor, gate: Tensor, weight: Tensor, eps: float, silu: bool, gate_first: bool) -> Tensor:
    dtype = torch.promote_types(x.dtype, torch.float32)
    a = (F.silu if silu else torch.sigmoid)(gate.to(dtype))
    u = x.to(dtype)
    if gate_first:
        return (_normalised(u * a, eps) * weight).to(x.dtype)
    return (_normalised(u, eps) * weight * a).to(x.dtype)


def _normalised(x: Tensor, eps: float) -> Tensor:
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)


_library.impl("gated_norm", _checked_gated_norm, "CPU")
_library.impl("gated_norm_backward", _gated_norm_backward, "CPU")
torch.library.register_fake("sleepkern::gated_norm", _gated_norm_fake, lib=_library)
torch.library.register_fake("sleepkern::gated_norm_backward", _gated_norm_backward_fake, lib=_library)
torch.library.register_autograd("sleepkern::gated_norm", _differentiate, setup_context=_save, lib=_library)
