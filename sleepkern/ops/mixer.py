"""Step 1 of a call, PUBLIC: the operators of a mixer around its recurrence.

Each function ends in check, choose, record. A call that the C++ kernel can take as it is goes to it directly after the
checks of its sizes, because the other steps cost as much as the kernel.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

from torch import Tensor

from .. import backends, settings
from ..autograd import mixer as autograd_mixer
from ..backends.cpu import mixer as cpu_mixer
from ..backends.native.module import _C, TYPE_CODES
from ..dispatch import choose_mixer
from ..eager import native_on_cpu, untraced
from ..problems.mixer import (
    check_convolution,
    check_convolution_sizes,
    check_gated_norm,
    check_gated_norm_sizes,
    check_step,
    check_step_operands,
)
from . import branches
from .convolution_states import convolve_tokens


def short_convolution(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    past: Tensor | None = None,
    activation: str | None = "silu",
    cu_seqlens: Tensor | None = None,
    backend: str | None = None,
    parents: Tensor | Sequence[int] | None = None,
) -> tuple[Tensor, Tensor]:
    """Convolve each channel of the tokens with the W - 1 tokens before each, those of its own sequence only.

        z_t = bias + sum_j w_{W-1-j} x_{t-j}, j < W;   y_t = silu(z_t) or z_t

    Args:
        x: [B,T,D] of any float type; channels side by side are read in place.
        weight: [D,W], the token's own last, as torch's conv1d has it.
        bias: [D].
        past: [n,W-1,D] inputs before the first token of each of the n sequences, default zeros.
        activation: "silu" or None.
        cu_seqlens: [n+1] where packed sequences start and end, with B = 1; default one sequence a row.
        backend: "cpu", "triton" or "torch", default the first of these that can.
        parents: [n] integers, with cu_seqlens: segment i goes on from the inputs that segment parents[i] < i ended
            with, or for -1 from its row of `past`, which has one row for each -1, or from zeros.

    Returns:
        y [B,T,D] in x's type, and the last W - 1 inputs [n,W-1,D], `past` of a call that goes on. Differentiable in
        x, weight, bias and past.

    Raises:
        TypeError: an argument is not a tensor, not of floats, or cu_seqlens of another type than int32 or int64.
        ValueError: a shape, layout, device, activation or cu_seqlens that does not fit, or a backend that cannot do
            this call.
    """
    if parents is not None:
        check_convolution(x, weight, bias, None, activation, cu_seqlens)

        def run(x: Tensor, past: Tensor | None, offsets: Tensor) -> tuple[Tensor, Tensor]:
            return short_convolution(x, weight, bias, past, activation, offsets, backend)

        return branches.convolve(x, past, cu_seqlens, parents, run)
    if (
        x is not None
        and weight is not None
        and _direct(backend, x, weight, bias, past)
        and (cu_seqlens is None or untraced(cu_seqlens))
    ):
        check_convolution_sizes(x, weight, bias, past, activation, cu_seqlens)
        if weight.shape[1] <= cpu_mixer.WIDEST:
            past = past if past is None else past.to(x.dtype)
            return cpu_mixer.convolve(x, weight, bias, past, cu_seqlens, activation == "silu")
    problem = check_convolution(x, weight, bias, past, activation, cu_seqlens)
    past = past if past is None else past.to(x.dtype)
    return autograd_mixer.convolve(problem, choose_mixer(problem, backend), x, weight, bias, past, cu_seqlens)


def short_convolution_step(
    x: Tensor,
    state: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    activation: str | None = "silu",
    backend: str | None = None,
    state_indices: Tensor | None = None,
    states_out: Tensor | None = None,
    states_out_indices: Tensor | None = None,
) -> Tensor:
    """Convolve a token, or a few, with those that the state holds; the state moves on in place. Not differentiable.

    Args:
        x: [B,D] of any float type, or [B,T,D] for T tokens.
        state: [B,D,W] last W inputs of each channel, the newest last; or a pool [n,D,W], of which state_indices name B.
        weight: [D,W], the token's own last.
        bias: [D].
        activation: "silu" or None.
        backend: "cpu", "triton" or "torch", default the first of these that can.
        state_indices: [B] int32 or int64: row b goes on from state[state_indices[b]]. Each index may occur once; a
            negative one marks a padded row, whose outputs are 0.
        states_out: [B,T,D,W], or with states_out_indices a pool [rows,D,W], of the type of `state`: gets the state
            after each token, and `state` is only read. T is at most 16.
        states_out_indices: [B,T] int32 or int64: the state after token t of row b goes to row [b,t] of this; a negative
            one is not written. The pool may be `state` itself; `sleepkern.commit` then keeps what was accepted.

    Returns:
        y in the shape and type of x.

    Raises:
        TypeError: an argument is not a tensor, or not of floats.
        ValueError: a shape, layout, device or activation that does not fit, a state that overlaps itself or another
            argument, or a backend that cannot do this call.
    """
    more = (state_indices, states_out, states_out_indices)
    if any(t is not None for t in more) or (isinstance(x, Tensor) and x.ndim == 3):
        convolve = partial(short_convolution, weight=weight, bias=bias, activation=activation, backend=backend)
        return convolve_tokens(x, state, weight, bias, activation, *more, convolve)
    if x is not None and state is not None and weight is not None and _direct(backend, x, weight, bias, state):
        check_step_operands(x, state, weight, bias, activation, True)
        if weight.shape[1] <= cpu_mixer.WIDEST and state.dtype == x.dtype and state.is_contiguous():
            return cpu_mixer.convolve_step(x, state, weight, bias, activation == "silu")
    problem = check_step(x, state, weight, bias, activation)
    return autograd_mixer.convolve_step(problem, choose_mixer(problem, backend), x, state, weight, bias)


def gated_rms_norm(
    x: Tensor,
    gate: Tensor,
    weight: Tensor,
    eps: float = 1e-6,
    activation: str = "silu",
    gate_first: bool = False,
    backend: str | None = None,
) -> Tensor:
    """Normalise over the last dimension and multiply with a gate, in float32 whatever the types.

        y = w r x act(gate), r = (mean x^2 + eps)^-1/2        gate first (Mamba-2): y = w u r(u), u = x act(gate)

    Args:
        x, gate: [B,T,H,V], [B,T,V] or [T,V]; heads side by side are read in place.
        weight: [V], or [H,V].
        eps: added to the mean of squares.
        activation: of the gate, "silu" or "sigmoid".
        gate_first: whether the gate is applied before the norm.
        backend: "cpu", "triton" or "torch", default the first of these that can.

    Returns:
        The same shape, in x's type. Differentiable in x, gate and weight.

    Raises:
        TypeError: an argument is not a tensor of floats, eps no number, gate_first no bool.
        ValueError: a shape, layout, device, eps or activation that does not fit, or a backend that cannot do this call.
    """
    if x is not None and gate is not None and weight is not None and _direct(backend, x, gate, weight):
        eps = check_gated_norm_sizes(x, gate, weight, eps, activation, gate_first)
        if x.ndim == 2:
            return cpu_mixer.gated_norm(x[None], gate[None], weight, eps, activation == "silu", gate_first)[0]
        return cpu_mixer.gated_norm(x, gate, weight, eps, activation == "silu", gate_first)
    problem = check_gated_norm(x, gate, weight, eps, activation, gate_first)
    engine = choose_mixer(problem, backend)
    if x.ndim == 2:
        return autograd_mixer.gated_norm(problem, engine, x[None], gate[None], weight)[0]
    return autograd_mixer.gated_norm(problem, engine, x, gate, weight)


def _direct(backend: str | None, *tensors: Tensor | None) -> bool:
    """Tells whether a call with these tensors is the C++ backend's, and torch's dispatcher need not see it."""
    name = settings.BACKEND if backend is None else backend
    if _C is None or (name is not None and name != cpu_mixer.NAME) or backends.MIXER_BACKENDS[0] is not cpu_mixer:
        return False
    return native_on_cpu(TYPE_CODES, *tensors)
