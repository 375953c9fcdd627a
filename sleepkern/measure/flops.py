"""Useful work of a call: floating point operations and bytes, from the shapes alone.

Counted is the chunk form with C = 32 rows, as the CPU kernels have it (a last chunk has fewer),
2 operations a multiply-add, triangles without the half that is zero. For a chunk of c rows, with
low = c (c - 1) / 2 pairs below the diagonal and tri = c (c + 1) / 2:

    M = K K^T                 2 K low        delta only, once per key head (*)
    (I+M)^-1 [b v, b k E]     2 (K + V) low  delta only
    W S                       2 c K V        delta only, every pass
    Kt^T Vn                   2 c K V        every pass
    P = Q K^T                 2 K tri        outputs, once per key head (*)
    Qe S, P Vn                2 c K V + 2 V tri   outputs

    (*) once per value head where the gate is per channel, which then cannot be taken out of the dot

Readouts are counted once, whatever the number of passes. Rules without delta have a closed form, so
further passes cost them nothing. Replay of the delta rules is counted as `wy` does it, though other
methods may need less. Every product of the forward has two in the backward, those of each pass too
(dVn = Kt lam, lam <- lam - W^T dVn, and dW, dKt from the state and lam), so a backward counts twice
its forward; what a kernel recomputes is not useful. Exponentials, scalings and normalisation are not
counted. For K = V = 128: 119 thousand operations a token and head.
"""

from __future__ import annotations

import torch

from ..backends.replay.costs import state_pass
from ..rules import Rule
from ..testing import Shape

CHUNK = 32


def forward_flops(rule: Rule, shape: Shape, passes: int = 1, outputs: bool = True) -> int:
    """Useful operations of a forward of `passes` passes."""
    lengths = shape.lengths if shape.lengths is not None else (shape.T,)
    total = 0
    for length in lengths:
        full, rest = divmod(length, CHUNK)
        total += full * _chunk(rule, shape, CHUNK, passes, outputs) + _chunk(rule, shape, rest, passes, outputs)
    return total if shape.lengths is not None else shape.B * total


def train_flops(rule: Rule, shape: Shape, passes: int = 1) -> int:
    """Useful operations of a forward of `passes` passes with its backward."""
    return 3 * forward_flops(rule, shape, passes)


def forward_bytes(rule: Rule, shape: Shape, dtype: torch.dtype, outputs: bool = True) -> int:
    """Bytes that must cross memory in a forward: each input read once, o and the state written
    once.

    q, k, v, o and beta in `dtype`; g and the state in float32.
    """
    rows, size = shape.B * shape.T, dtype.itemsize
    gate = {"none": 0, "head": 1, "channel": shape.K}[rule.gate] * shape.HV
    moved = rows * size * (shape.H * shape.K + shape.HV * shape.V + shape.HV) + rows * 4 * gate
    if outputs:
        moved += rows * size * (shape.H * shape.K + shape.HV * shape.V)
    return moved + 2 * 4 * shape.sequences * shape.HV * shape.K * shape.V


def train_bytes(rule: Rule, shape: Shape, dtype: torch.dtype, passes: int = 1) -> int:
    """Bytes that must cross memory in forward and backward: inputs read twice, o, do and every
    gradient moved once.

    The backward of a delta rule needs the states between passes, the last one first: each is written
    and read once, in float32. A closed form needs none.
    """
    between = (passes - 1) * shape.sequences * shape.HV * shape.K * shape.V if rule.delta else 0
    return 3 * forward_bytes(rule, shape, dtype) + 2 * 4 * between


def _chunk(rule: Rule, shape: Shape, c: int, passes: int, outputs: bool) -> int:
    K, V = shape.K, shape.V
    low, tri, product = c * (c - 1) // 2, c * (c + 1) // 2, 2 * c * K * V
    dots = shape.HV if rule.gate == "channel" else shape.H
    count = shape.HV * product
    if rule.delta:
        count = dots * 2 * K * low + shape.HV * (2 * (K + V) * low + passes * state_pass(c, K, V))
    if outputs:
        count += dots * 2 * K * tri + shape.HV * (product + 2 * V * tri)
    return count
