"""Stage 3, the backward state pass: a scan of the state's gradient over the chunks, from the last to the first.

    dVn = P^T dO + Kt dS;   dS <- exp(G_C) dS + Qe^T dO - W^T dVn        (without delta: no W)

It mirrors state_pass.py, and also knows only the gate of the rule.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .common import (
    CHANNEL,
    find_columns,
    find_sequence,
    load_tile,
    load_transposed,
    product,
    store_tile,
)
from .state_pass import inverse_norm, row_decays
from .states_along import first_along, load_along


@triton.jit
def scan_chunks_backward(
    inputs, factors, back, begin, total, slot, bh, col, scale,
    BV: tl.constexpr, DIMS: tl.constexpr, FLAGS: tl.constexpr, HAS_DSTATE: tl.constexpr, DECAYS: tl.constexpr,
    EVERY: tl.constexpr = 0,
):  # fmt: skip
    """dS [KP, BV] from the end of a sequence to its start, 0 at its end unless HAS_DSTATE.

    A chunk loads W, q and k in [C, KP], do in [C, BV] and P in [C, C]; it stores dS at its end, and dVn. Where EVERY,
    gradients of the states along the sequence are added.
    """
    HV: tl.constexpr = DIMS.HV
    K: tl.constexpr = DIMS.K
    V: tl.constexpr = DIMS.V
    C: tl.constexpr = DIMS.C
    KP: tl.constexpr = DIMS.KP
    head = bh % HV
    at_key = (head // DIMS.GROUP) * K
    at_state = bh.to(tl.int64) * K * V
    dS = tl.zeros([KP, BV], tl.float32)
    # mutant: backward-without-dstate
    if HAS_DSTATE:
        dS = load_tile(back.dstate + at_state, V, K, col, V, KP, BV)
    chunks = tl.cdiv(total, C)
    along = 0
    if EVERY > 0:
        along = first_along(bh // HV, back.along_offsets, total, C, FLAGS.PACKED, EVERY)
    for after in range(chunks):
        chunk = chunks - 1 - after
        first = begin + chunk * C
        rows = total - chunk * C
        at_rows = first * HV + head
        at_slot = (slot + chunk).to(tl.int64) * HV + head
        # mutant: backward-without-dstates
        if EVERY > 0:
            dS += load_along(back.dalong, along, chunk, chunks, head, col, BV, DIMS, EVERY)
        store_tile(back.ends + at_slot * K * V, V, K, col, dS, V, KP, BV)
        decay_from_start, decay_to_end, chunk_decay = row_decays(
            # mutant: backward-without-scale
            inputs, factors, first, rows, at_slot, head, scale, DIMS, FLAGS, DECAYS
        )  # fmt: skip
        if FLAGS.GATE == CHANNEL:
            Kt = load_tile(factors.Kt + at_rows * K, HV * K, rows, 0, K, C, KP)
            dVn = product(Kt, dS, FLAGS)
        else:
            k = load_tile(inputs.k + first * inputs.k_stride + at_key, inputs.k_stride, rows, 0, K, C, KP)
            if FLAGS.NORMALIZE and not DECAYS:
                decay_to_end *= inverse_norm(k, 1)
            dVn = decay_to_end[:, None] * product(k, dS, FLAGS)
        # mutant: backward-does-not-decay
        dS = chunk_decay * dS
        if FLAGS.OUTPUT:
            do = load_tile(back.do + first * back.do_stride + head * V, back.do_stride, rows, col, V, C, BV)
            P = load_transposed(factors.P + at_rows * C, HV * C, rows, 0, C, C, C)
            dVn += product(P, do, FLAGS)
            if FLAGS.GATE == CHANNEL:
                Qe = load_transposed(factors.Qe + at_rows * K, HV * K, rows, 0, K, C, KP)
                dS += product(Qe, do, FLAGS)
            else:
                q = load_transposed(inputs.q + first * inputs.q_stride + at_key, inputs.q_stride, rows, 0, K, C, KP)
                if FLAGS.NORMALIZE and not DECAYS:
                    decay_from_start *= inverse_norm(q, 0)
                dS += product(q, decay_from_start[:, None] * do, FLAGS)
        store_tile(back.dVn + at_rows * V, HV * V, rows, col, dVn, V, C, BV)
        if FLAGS.DELTA:
            W = load_transposed(factors.W + at_rows * K, HV * K, rows, 0, K, C, KP)
            # mutant: backward-without-w
            dS -= product(W, dVn, FLAGS)
    store_tile(back.dinitial + at_state, V, K, col, dS, V, KP, BV)


@triton.jit(do_not_specialize=["sizes"])
def state_pass_backward_kernel(
    inputs, factors, back, sizes,
    BV: tl.constexpr, DIMS: tl.constexpr, FLAGS: tl.constexpr, HAS_DSTATE: tl.constexpr, DECAYS: tl.constexpr,
    EVERY: tl.constexpr,
):  # fmt: skip
    """The state's gradient, and dVn of all chunks. Grid (sequences * HV * cdiv(V, BV),).

    Registers hold dS [KP, BV] in float32 for all chunks.
    """
    bh, col = find_columns(DIMS.V, BV)
    begin, total, slot = find_sequence(bh // DIMS.HV, inputs, sizes, DIMS.C, FLAGS.PACKED)
    scan_chunks_backward(
        inputs, factors, back, begin, total, slot, bh, col, sizes.scale, BV, DIMS, FLAGS, HAS_DSTATE, DECAYS, EVERY
    )  # fmt: skip
