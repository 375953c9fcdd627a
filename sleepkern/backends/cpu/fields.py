"""The fields of a call of the recurrence, as sleepkern._C takes them."""

from __future__ import annotations

from typing import TypedDict

import torch
from torch import Tensor

from ...problems.gates import RawGates
from ...problems.recurrence import Problem, Tensors
from ..native.module import GATE_CODES, TYPE_CODES
from ..native.views import ABSENT, Array, Rows, address, array, rows


class Fields(TypedDict):
    """The fields that every entry point of _C takes: csrc/common/recurrence.h says what each is."""

    gate: int
    delta: bool
    normalize: bool
    scale: float
    sequences: int
    T: int
    H: int
    HV: int
    K: int
    V: int
    offsets: int
    q: Rows
    k: Rows
    v: Rows
    g: Rows
    beta: Rows
    state: int


def fields_of(
    problem: Problem, x: Tensors, state: Tensor | None, want_output: bool
) -> tuple[Fields, list[Tensor | None]]:
    """The fields of a call, and the tensors that must live while it runs."""
    H, HV, K, V = problem.H, problem.HV, problem.K, problem.V
    offsets = x.cu_seqlens
    if offsets is not None:  # a copy, which no other thread changes between the checks in C++ and the kernel
        offsets = offsets.to("cpu", torch.int64, copy=True, memory_format=torch.contiguous_format)
    q, q_view = rows(x.q, H * K) if want_output else (None, ABSENT)
    k, k_view = rows(x.k, H * K)
    v, v_view = rows(x.v, HV * V)
    g, g_view = rows(x.g, HV * K if problem.rule.gate == "channel" else HV)
    beta, beta_view = rows(x.beta, HV)
    fields: Fields = {
        "gate": GATE_CODES[problem.rule.gate],
        "delta": problem.rule.delta,
        "normalize": problem.normalize,
        "scale": problem.scale,
        "sequences": problem.sequences,
        "T": problem.T,
        "H": H,
        "HV": HV,
        "K": K,
        "V": V,
        "offsets": address(offsets),
        "q": q_view,
        "k": k_view,
        "v": v_view,
        "g": g_view,
        "beta": beta_view,
        "state": address(state),
    }
    return fields, [offsets, q, k, v, g, beta, state]


class GateFields(TypedDict):
    """The fields that say which gates are raw (RawGates of csrc/common/recurrence.h)."""

    raw_decay: bool
    lower_bound: float
    beta_scale: float
    A_log: Array
    dt_bias: Array


def gate_fields_of(gates: RawGates) -> tuple[GateFields, list[Tensor | None]]:
    """The fields of raw gates, and the tensors that must live while a call reads them."""
    narrow = [None if t is None or t.dtype in TYPE_CODES else t.float() for t in (gates.A_log, gates.dt_bias)]
    given = [t if n is None else n for t, n in zip((gates.A_log, gates.dt_bias), narrow, strict=True)]
    (A_log, A_log_view), (dt_bias, dt_bias_view) = (array(t) for t in given)
    fields: GateFields = {
        "raw_decay": gates.decay,
        "lower_bound": gates.lower_bound or 0.0,
        "beta_scale": gates.beta_scale,
        "A_log": A_log_view,
        "dt_bias": dt_bias_view,
    }
    return fields, [A_log, dt_bias]


def gate_type(t: Tensor | None) -> torch.dtype | None:
    """Type the kernel writes the gradient of a gate in: float32 for a float64 gate, which it reads as float32."""
    return None if t is None or t.dtype in TYPE_CODES else torch.float32
