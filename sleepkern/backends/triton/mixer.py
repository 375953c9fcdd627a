"""The mixer's own operators in Triton: the short convolution, its step and the gated RMS norm, forward and backward.

The kernels are in short_convolution.py and gated_rms_norm.py, their launches in mixer_launch.py.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ... import settings
from ...problems.blocks import KERNEL_TYPES
from ...problems.mixer import ConvolutionProblem, ConvolutionStepProblem, GatedNormProblem, MixerProblem
from . import why_not_on

NAME = "triton"
SUPPORTS = frozenset({ConvolutionProblem, ConvolutionStepProblem, GatedNormProblem})
RECORDED = False
WIDEST = 8
"""The largest W of a convolution. The kernels are unrolled over W and keep R + 2 W tiles in registers."""
LONGEST_ROW = 8192
"""The largest V of a norm. A program holds a whole row in registers, 16 elements a thread."""


def why_not(problem: MixerProblem) -> str | None:
    """None, or the sentence why the Triton kernels cannot run the problem."""
    reason = why_not_on(problem.device)
    if reason is not None:
        return reason
    if problem.device != "cuda" and not interprets():
        return "Triton's interpreter runs operators of a mixer where SLEEPKERN_BACKEND=triton requests it"
    for dtype in problem.types:
        if dtype not in KERNEL_TYPES:
            return f"no kernel for {dtype}"
    if isinstance(problem, GatedNormProblem):
        return f"norms of at most V = {LONGEST_ROW}, got {problem.V}" if problem.V > LONGEST_ROW else None
    if problem.width > WIDEST:
        return f"convolutions of at most W = {WIDEST}, got {problem.width}"
    if isinstance(problem, ConvolutionProblem):
        return None
    if not problem.in_place:
        return "the state is not contiguous or not of the type of x"
    return problem.refusal


def kernel(problem: MixerProblem) -> str:
    """One line on the code that runs."""
    return "Triton, one launch"


def interprets() -> bool:
    """Tells whether operators on CPU tensors go to Triton's interpreter: in a process for tests that requests it.

    An operator of torch knows the device of its tensors and no backend, so the request must be the process's.
    """
    return settings.BACKEND == NAME and why_not_on("cpu") is None


def convolve(
    x: Tensor, weight: Tensor, bias: Tensor | None, past: Tensor | None, cu_seqlens: Tensor | None, silu: bool
) -> tuple[Tensor, Tensor]:
    """y [B,T,D] and the last W - 1 inputs [n,W-1,D]."""
    result: tuple[Tensor, Tensor] = _launch().convolve(x, weight, bias, past, cu_seqlens, silu)
    return result


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
    grads: tuple[Tensor, Tensor, Tensor, Tensor] = _launch().convolve_backward(
        x, weight, bias, past, cu_seqlens, silu, dy, dlast
    )
    return grads


def convolve_step(x: Tensor, state: Tensor, weight: Tensor, bias: Tensor | None, silu: bool) -> Tensor:
    """y [B,D]; the state [B,D,W] is updated in place."""
    y: Tensor = _launch().convolve_step(x, state, weight, bias, silu)
    return y


def gated_norm(x: Tensor, gate: Tensor, weight: Tensor, eps: float, silu: bool, gate_first: bool) -> Tensor:
    """y of the shape [B,T,H,V] or [B,T,V] of x."""
    y: Tensor = _launch().gated_norm(x, gate, weight, eps, silu, gate_first)
    return y


def gated_norm_backward(
    x: Tensor, gate: Tensor, weight: Tensor, eps: float, silu: bool, gate_first: bool, dy: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x, gate and weight.

    Raises:
        TypeError, ValueError: dy differs from the result that it belongs to.
    """
    grads: tuple[Tensor, Tensor, Tensor] = _launch().gated_norm_backward(x, gate, weight, eps, silu, gate_first, dy)
    return grads


def _launch() -> Any:
    """The kernels, imported on the first call: the package needs no Triton to be imported."""
    from . import mixer_launch

    return mixer_launch
