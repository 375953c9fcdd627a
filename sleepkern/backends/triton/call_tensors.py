"""The tensors of a call as its kernels read them: rows with one stride, and how gates are made."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ...problems.gates import RawGates
from ...problems.recurrence import Problem, Tensors
from ..native.views import in_rows


class GateForm(NamedTuple):
    """How the gates of a call are made in its kernels: Flags of these names."""

    RAW: bool = False
    BOUND: float = 0.0
    BETA_SCALE: float = 0.0


MADE = GateForm()


def gate_form(gates: RawGates | None) -> tuple[GateForm, tuple[Tensor | None, Tensor | None]]:
    """How gates are made, and A_log and dt_bias as kernels read them."""
    if gates is None:
        return MADE, (None, None)
    A_log, dt_bias = (None if t is None else t.float().contiguous() for t in gates[:2])
    return GateForm(gates.decay, gates.lower_bound or 0.0, gates.beta_scale), (A_log, dt_bias)


def parameter_gradients(
    gates: RawGates, of_rate: Tensor | None, of_bias: Tensor | None
) -> tuple[Tensor | None, Tensor | None]:
    """The gradients of A_log and dt_bias, None where there is no such tensor."""
    A_log, dt_bias = gates.A_log, gates.dt_bias
    dA_log = None if A_log is None or of_rate is None else of_rate.sum((0, 2), dtype=torch.float64).to(A_log.dtype)
    if dt_bias is None or of_bias is None:
        return dA_log, None
    return dA_log, of_bias.sum(0, dtype=torch.float64).to(dt_bias.dtype).reshape(dt_bias.shape)


def rows_of(problem: Problem, x: Tensors, output: bool) -> tuple[list[Tensor | None], tuple[int, ...]]:
    """q, k, v, g, beta and offsets as kernels read them, and the row strides of the first five; q only when output."""
    p = problem
    keys, values = p.H * p.K, p.HV * p.V
    widths = (keys, keys, values, p.HV * p.K if p.rule.gate == "channel" else p.HV, p.HV)
    tensors: list[Tensor | None] = []
    strides: list[int] = []
    for t, width in zip((x.q if output else None, *x[1:5]), widths, strict=True):
        stride = width
        if t is None:
            stride = 0
        elif t.dtype == torch.float64 or not t.is_contiguous():
            t, stride = in_rows(t.float() if t.dtype == torch.float64 else t, width)
        tensors.append(t)
        strides.append(stride)
    offsets = x.cu_seqlens
    if offsets is not None:
        offsets = offsets.to(x.k.device, non_blocking=True).contiguous()
    return [*tensors, offsets], tuple(strides)
