"""Sequences of one chunk: the stages of a direction fused into one launch.

A stage writes what the next stage reads to global memory, and a barrier of the program lies between them. Nothing else
differs from one launch a stage.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .chunk_backward import chunk_backward
from .chunk_factors import write_chunk_factors
from .state_pass import state_pass_columns
from .state_pass_backward import scan_chunks_backward


@triton.jit(do_not_specialize=["sizes"])
def single_chunk_kernel(
    inputs, factors, states, sizes, BK: tl.constexpr, BV: tl.constexpr, DIMS: tl.constexpr, FLAGS: tl.constexpr,
    HAS_STATE: tl.constexpr, REPLAY: tl.constexpr, HAS_FACTORS: tl.constexpr,
):  # fmt: skip
    """Stages 1 and 2 of one bh. Grid (sequences * HV,). HAS_FACTORS: stage 1 has something to write."""
    bh = tl.program_id(0)
    slot = bh // DIMS.HV
    begin = slot.to(tl.int64) * sizes.T
    if HAS_FACTORS:
        write_chunk_factors(
            inputs, factors, slot, begin, sizes.T, bh % DIMS.HV, sizes.scale, BK, BV, DIMS, FLAGS, False, False
        )  # fmt: skip
        tl.debug_barrier()
    for col in range(0, DIMS.V, BV):
        state_pass_columns(
            inputs, factors, states, sizes, begin, sizes.T, slot, bh, col,
            BV, DIMS, FLAGS, FLAGS.OUTPUT, False, HAS_STATE, REPLAY, False,
        )  # fmt: skip


@triton.jit(do_not_specialize=["sizes"])
def single_chunk_backward_kernel(
    inputs, factors, states, back, grads, sizes,
    BK: tl.constexpr, BV: tl.constexpr, DIMS: tl.constexpr, FLAGS: tl.constexpr,
    HAS_STATE: tl.constexpr, HAS_DSTATE: tl.constexpr, HAS_FACTORS: tl.constexpr, SUMS: tl.constexpr,
):  # fmt: skip
    """Stages 1 to 4 of one key head with its value heads. Grid (sequences * H,)."""
    H: tl.constexpr = DIMS.HV // DIMS.GROUP
    program = tl.program_id(0)
    slot = program // H
    key_head = program % H
    begin = slot.to(tl.int64) * sizes.T
    for member in range(DIMS.GROUP):
        head = key_head * DIMS.GROUP + member
        bh = slot * DIMS.HV + head
        if HAS_FACTORS:
            write_chunk_factors(
                inputs, factors, slot, begin, sizes.T, head, sizes.scale, BK, BV, DIMS, FLAGS, True, False
            )  # fmt: skip
            tl.debug_barrier()
        for col in range(0, DIMS.V, BV):
            state_pass_columns(
                inputs, factors, states, sizes, begin, sizes.T, slot, bh, col,
                BV, DIMS, FLAGS, False, True, HAS_STATE, False, False,
            )  # fmt: skip
            scan_chunks_backward(
                inputs, factors, back, begin, sizes.T, slot, bh, col, sizes.scale, BV, DIMS, FLAGS, HAS_DSTATE, False
            )  # fmt: skip
    tl.debug_barrier()
    chunk_backward(
        inputs, factors, states, back, grads, slot, begin, sizes.T, key_head, sizes.scale,
        BK, BV, DIMS, FLAGS, SUMS, False,
    )  # fmt: skip
