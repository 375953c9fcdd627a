"""Step 4 of a call of the mixer's own operators, RECORD: the operators of the native kernels as torch knows them.

    sleepkern::convolve    and sleepkern::convolve_backward     the short convolution and its gradients
    sleepkern::gated_norm  and sleepkern::gated_norm_backward   the gated RMS norm and its gradients

Each has a fake kernel, so that torch.compile sees shapes without running anything. Anybody may call an operator, so
each checks its arguments again. The gradients of gradients are those of the torch backend.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import transforms
from ..backends import torch_mixer
from ..backends.cpu import mixer as cpu_mixer
from ..backends.interface import MixerBackend
from ..backends.torch_common import differentiable
from ..backends.triton import mixer as triton_mixer
from ..dispatch import choose_mixer
from ..eager import refuse_tangents, unrecorded
from ..problems.mixer import (
    ConvolutionProblem,
    ConvolutionStepProblem,
    GatedNormProblem,
    check_convolution_operands,
    check_gated_norm_operands,
)

_CONVOLUTION = "Tensor x, Tensor weight, Tensor? bias, Tensor? past, Tensor? cu_seqlens, bool silu"
_NORM = "Tensor x, Tensor gate, Tensor weight, float eps, bool silu, bool gate_first"
_library = torch.library.Library("sleepkern", "FRAGMENT")
_library.define(f"convolve({_CONVOLUTION}) -> (Tensor, Tensor)")
_library.define(f"convolve_backward({_CONVOLUTION}, Tensor? dy, Tensor? dlast) -> (Tensor, Tensor, Tensor, Tensor)")
_library.define(f"gated_norm({_NORM}) -> Tensor")
_library.define(f"gated_norm_backward({_NORM}, Tensor dy) -> (Tensor, Tensor, Tensor)")


def convolve(
    problem: ConvolutionProblem,
    engine: MixerBackend,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    past: Tensor | None,
    cu_seqlens: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """y and the last inputs: by the operator unless torch records what the backend does, or nothing is to be recorded.

    Raises:
        NotImplementedError: a tangent of forward mode.
    """
    form = _torch_form(engine, x, weight, bias, past)
    if form is not None:
        return form.convolve(x, weight, bias, past, cu_seqlens, problem.silu)
    if unrecorded(x, weight, bias, past, cu_seqlens):
        return engine.convolve(x, weight, bias, past, cu_seqlens, problem.silu)
    y, last = torch.ops.sleepkern.convolve.default(x, weight, bias, past, cu_seqlens, problem.silu)
    return y, last


def convolve_step(
    problem: ConvolutionStepProblem,
    engine: MixerBackend,
    x: Tensor,
    state: Tensor,
    weight: Tensor,
    bias: Tensor | None,
) -> Tensor:
    """y; the state is updated in place. There is no operator: where torch looks on, `engine` is the torch backend.

    Raises:
        NotImplementedError: a tangent of forward mode where a kernel would run if torch did not look on.
    """
    if problem.refusal is not None and not choose_mixer(problem._replace(in_place=True, refusal=None)).RECORDED:
        refuse_tangents(x, state, weight, bias)
    return engine.convolve_step(x, state, weight, bias, problem.silu)


def gated_norm(problem: GatedNormProblem, engine: MixerBackend, x: Tensor, gate: Tensor, weight: Tensor) -> Tensor:
    """y: by the operator unless torch records what the backend does, or nothing is to be recorded.

    Raises:
        NotImplementedError: a tangent of forward mode.
    """
    form = _torch_form(engine, x, gate, weight)
    options = (problem.eps, problem.silu, problem.gate_first)
    if form is not None:
        return form.gated_norm(x, gate, weight, *options)
    if unrecorded(x, gate, weight):
        return engine.gated_norm(x, gate, weight, *options)
    return torch.ops.sleepkern.gated_norm.default(x, gate, weight, *options)  # type: ignore[no-any-return]


def _torch_form(engine: MixerBackend, *tensors: Tensor | None) -> MixerBackend | None:
    """The backend whose operators torch records, None where the operator of a native kernel is called.

    Transforms that differentiate want torch's own operators, which have all rules.
    """
    if engine.RECORDED:
        return engine
    if transforms.differentiating():
        if not transforms.reversing():
            refuse_tangents(*tensors)
        return torch_mixer
    refuse_tangents(*tensors)
    return None


def _kernels(x: Tensor) -> Any:
    """The backend whose kernels run an operator on the device of x."""
    return triton_mixer if x.is_cuda or triton_mixer.interprets() else cpu_mixer


def _convolve(
    x: Tensor, weight: Tensor, bias: Tensor | None, past: Tensor | None, cu_seqlens: Tensor | None, silu: bool
) -> tuple[Tensor, Tensor]:
    kernels = _kernels(x)
    check_convolution_operands(x, weight, bias, past, cu_seqlens, silu, kernels.WIDEST)
    return kernels.convolve(x, weight, bias, past, cu_seqlens, silu)  # type: ignore[no-any-return]


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
    kernels = _kernels(x)
    check_convolution_operands(x, weight, bias, past, cu_seqlens, silu, kernels.WIDEST)
    return kernels.convolve_backward(  # type: ignore[no-any-return]
        x, weight, bias, past, cu_seqlens, silu, dy, dlast
    )


def _convolve_backward_fake(
    x: Tensor, weight: Tensor, bias: Tensor | None, past: Tensor | None, *rest: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    dbias = x.new_empty(0, dtype=torch.float32) if bias is None else torch.empty_like(bias)
    dpast = x.new_empty(0 if past is None else past.shape)
    return x.new_empty(x.shape), weight.new_empty(weight.shape), dbias, dpast


def _save_convolution(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    # A copy of cu_seqlens: by numpy it may change before the backward, and torch would not see it.
    offsets = None if inputs[4] is None else inputs[4].clone()
    ctx.save_for_backward(*inputs[:4], offsets)
    ctx.silu = inputs[5]
    ctx.set_materialize_grads(False)


def _differentiate_convolution(ctx: Any, dy: Tensor | None, dlast: Tensor | None) -> tuple[Any, ...]:
    x, weight, bias, past, cu_seqlens = ctx.saved_tensors
    if dy is None and dlast is None:
        return (None,) * 6
    if torch.is_grad_enabled():

        def by_torch(x: Tensor, weight: Tensor, bias: Tensor | None, past: Tensor | None) -> tuple[Tensor, Tensor]:
            return torch_mixer.convolve(x, weight, bias, past, cu_seqlens, ctx.silu)

        grads = differentiable(by_torch, (x, weight, bias, past), (dy, dlast))
        return (*grads, None, None)
    dx, dweight, dbias, dpast = torch.ops.sleepkern.convolve_backward.default(
        x, weight, bias, past, cu_seqlens, ctx.silu, dy, dlast
    )
    return dx, dweight, None if bias is None else dbias, None if past is None else dpast, None, None


def _gated_norm(x: Tensor, gate: Tensor, weight: Tensor, eps: float, silu: bool, gate_first: bool) -> Tensor:
    check_gated_norm_operands(x, gate, weight, eps)
    return _kernels(x).gated_norm(  # type: ignore[no-any-return]
        x, gate, weight, eps, silu, gate_first
    )


def _gated_norm_fake(x: Tensor, *rest: Any) -> Tensor:
    return x.new_empty(x.shape)


def _gated_norm_backward(
    x: Tensor, gate: Tensor, weight: Tensor, eps: float, silu: bool, gate_first: bool, dy: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    check_gated_norm_operands(x, gate, weight, eps)
    return _kernels(x).gated_norm_backward(  # type: ignore[no-any-return]
        x, gate, weight, eps, silu, gate_first, dy
    )


def _gated_norm_backward_fake(x: Tensor, gate: Tensor, weight: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    return x.new_empty(x.shape), gate.new_empty(gate.shape), weight.new_empty(weight.shape)


def _save_norm(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    ctx.save_for_backward(*inputs[:3])
    ctx.options = inputs[3:]


def _differentiate_norm(ctx: Any, dy: Tensor) -> tuple[Any, ...]:
    if torch.is_grad_enabled():
        grads = differentiable(lambda *t: (torch_mixer.gated_norm(*t, *ctx.options),), ctx.saved_tensors, (dy,))
        return (*grads, None, None, None)
    return (*torch.ops.sleepkern.gated_norm_backward.default(*ctx.saved_tensors, *ctx.options, dy), None, None, None)


for _key in ("CPU", "CUDA"):
    _library.impl("convolve", _convolve, _key)
    _library.impl("convolve_backward", _convolve_backward, _key)
    _library.impl("gated_norm", _gated_norm, _key)
    _library.impl("gated_norm_backward", _gated_norm_backward, _key)
torch.library.register_fake("sleepkern::convolve", _convolve_fake, lib=_library)
torch.library.register_fake("sleepkern::convolve_backward", _convolve_backward_fake, lib=_library)
torch.library.register_fake("sleepkern::gated_norm", _gated_norm_fake, lib=_library)
torch.library.register_fake("sleepkern::gated_norm_backward", _gated_norm_backward_fake, lib=_library)
torch.library.register_autograd(
    "sleepkern::convolve", _differentiate_convolution, setup_context=_save_convolution, lib=_library
)
torch.library.register_autograd("sleepkern::gated_norm", _differentiate_norm, setup_context=_save_norm, lib=_library)
