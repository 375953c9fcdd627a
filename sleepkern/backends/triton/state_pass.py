"""Stage 2, the state pass: a scan of the state over the chunks, with their outputs. Of the rule it knows only the gate.

    Vn = U - W S;   O = Qe S + P Vn;   S <- exp(G_C) S + Kt^T Vn        (without delta: Vn = b v)

Value columns are independent: each program keeps [K, BV] of the state in registers from the first chunk to the last,
pass after pass. Decay and normalisation are one factor a row here (Kt = diag(exp(G_C - G) / |k|) K), except for channel
decay, whose Kt and Qe chunk_factors_kernel has stored.

The variant "decays" loads the factors of the rows, which chunk_factors_kernel then stores, in place of summing log
decays and squares in each program.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .common import (
    CHANNEL,
    HEAD,
    MIN_LOG_DECAY,
    NORM_EPS,
    exp_of,
    find_columns,
    find_sequence,
    last_row,
    load_row_values,
    load_tile,
    load_transposed,
    product,
    store_tile,
)
from .gates import head_decay, load_beta
from .states_along import first_along, store_along


@triton.jit
def row_decays(
    inputs, factors, first, rows, at_slot, head, scale, DIMS: tl.constexpr, FLAGS: tl.constexpr, DECAYS: tl.constexpr
):  # fmt: skip
    """scale exp(G) and exp(G_C - G) [C], and exp(G_C): a number, or [KP, 1] of channel decay.

    Where DECAYS, chunk_factors_kernel has stored them, with the lengths of q and k when those are normalised.
    """
    C: tl.constexpr = DIMS.C
    K: tl.constexpr = DIMS.K
    decay_from_start = tl.full([C], scale, tl.float32)
    decay_to_end = tl.full([C], 1.0, tl.float32)
    chunk_decay = 1.0
    if DECAYS:
        at_rows = first * DIMS.HV + head
        chunk_decay = tl.load(factors.chunk_decay + at_slot)
        # mutant: stored-decays-of-another-head
        decay_from_start = load_row_values(factors.from_start + at_rows, DIMS.HV, rows, C)
        decay_to_end = load_row_values(factors.to_end + at_rows, DIMS.HV, rows, C)
    elif FLAGS.GATE == HEAD:
        G = head_decay(inputs, first, head, rows, C, FLAGS)
        G_end = last_row(G, C)
        decay_from_start *= exp_of(G)
        decay_to_end = exp_of(G_end - G)
        chunk_decay = exp_of(G_end)
    elif FLAGS.GATE == CHANNEL:
        key = tl.arange(0, DIMS.KP)
        chunk_decay = exp_of(tl.load(factors.G_end + at_slot * K + key, mask=key < K, other=0.0))[:, None]
    return decay_from_start, decay_to_end, chunk_decay


@triton.jit
def scan_chunks(
    S, inputs, factors, states, begin, total, slot, head, col, scale,
    BV: tl.constexpr, DIMS: tl.constexpr, FLAGS: tl.constexpr, OUTPUT: tl.constexpr, SAVE: tl.constexpr,
    DECAYS: tl.constexpr, MAPS: tl.constexpr = False, EVERY: tl.constexpr = 0, along=0,
):  # fmt: skip
    """One pass of S [KP, BV] over a sequence; stores outputs when OUTPUT, states at chunk starts and Vn when SAVE.

    A chunk loads W, q and k in [C, KP], U, v in [C, BV] and P in [C, C]. Where MAPS, columns
    below 0 take no values: segments.py computes transitions in them. Where EVERY, states along the sequence are stored,
    from index `along` on.
    """
    HV: tl.constexpr = DIMS.HV
    K: tl.constexpr = DIMS.K
    V: tl.constexpr = DIMS.V
    C: tl.constexpr = DIMS.C
    KP: tl.constexpr = DIMS.KP
    at_key = (head // DIMS.GROUP) * K
    for chunk in range(tl.cdiv(total, C)):
        first = begin + chunk * C
        rows = total - chunk * C
        at_rows = first * HV + head
        value_rows = rows
        if MAPS:
            # mutant: transitions-take-values
            value_rows = tl.where(col < 0, 0, rows)
        at_slot = (slot + chunk).to(tl.int64) * HV + head
        if SAVE:
            store_tile(states.starts + at_slot * K * V, V, K, col, S, V, KP, BV)
        if FLAGS.DELTA:
            W = load_tile(factors.W + at_rows * K, HV * K, rows, 0, K, C, KP)
            U = load_tile(factors.U + at_rows * V, HV * V, value_rows, col, V, C, BV)
            # mutant: erases-nothing
            Vn = U.to(tl.float32) - product(W, S, FLAGS)
        else:
            p_v = inputs.v + first * inputs.v_stride + head * V
            Vn = load_tile(p_v, inputs.v_stride, value_rows, col, V, C, BV).to(tl.float32)
            if FLAGS.HAS_BETA:
                Vn *= load_beta(inputs, first, head, rows, C, FLAGS)[:, None]
        if SAVE:
            store_tile(states.Vn + at_rows * V, HV * V, rows, col, Vn, V, C, BV)
        decay_from_start, decay_to_end, chunk_decay = row_decays(
            inputs, factors, first, rows, at_slot, head, scale, DIMS, FLAGS, DECAYS
        )  # fmt: skip
        if OUTPUT:
            P = load_tile(factors.P + at_rows * C, HV * C, rows, 0, C, C, C)
            if FLAGS.GATE == CHANNEL:
                Qe = load_tile(factors.Qe + at_rows * K, HV * K, rows, 0, K, C, KP)
                o = product(Qe, S, FLAGS)
            else:
                q = load_tile(inputs.q + first * inputs.q_stride + at_key, inputs.q_stride, rows, 0, K, C, KP)
                if FLAGS.NORMALIZE and not DECAYS:
                    decay_from_start *= inverse_norm(q, 1)
                o = decay_from_start[:, None] * product(q, S, FLAGS)
            o += product(P, Vn, FLAGS)
            store_tile(states.o + at_rows * V, HV * V, rows, col, o, V, C, BV)
        if FLAGS.GATE == CHANNEL:
            k_transposed = load_transposed(factors.Kt + at_rows * K, HV * K, rows, 0, K, C, KP)
        else:
            p_k = inputs.k + first * inputs.k_stride + at_key
            k_transposed = load_transposed(p_k, inputs.k_stride, rows, 0, K, C, KP)
            if FLAGS.NORMALIZE and not DECAYS:
                decay_to_end *= inverse_norm(k_transposed, 0)
        # mutant: state-does-not-decay
        S = chunk_decay * S + product(k_transposed, decay_to_end[:, None] * Vn, FLAGS)
        if EVERY > 0:
            store_along(states.along, S, along, chunk, tl.cdiv(total, C), head, col, BV, DIMS, EVERY)
    return S


@triton.jit
def inverse_norm(x, axis: tl.constexpr):
    """1 / |x| along an axis."""
    x = x.to(tl.float32)
    return 1.0 / tl.sqrt(tl.sum(x * x, axis) + NORM_EPS)


@triton.jit
def sequence_decay(inputs, factors, begin, total, slot, head, DIMS: tl.constexpr, FLAGS: tl.constexpr):
    """The sum of the log decay of a sequence, [KP]."""
    K: tl.constexpr = DIMS.K
    C: tl.constexpr = DIMS.C
    key = tl.arange(0, DIMS.KP)
    G = tl.zeros([DIMS.KP], tl.float32)
    for chunk in range(tl.cdiv(total, C)):
        if FLAGS.GATE == CHANNEL:
            at = ((slot + chunk).to(tl.int64) * DIMS.HV + head) * K
            G += tl.load(factors.G_end + at + key, mask=key < K, other=0.0)
        if FLAGS.GATE == HEAD:
            p_g = inputs.g + (begin + chunk * C) * inputs.g_stride + head
            G += tl.sum(tl.maximum(load_row_values(p_g, inputs.g_stride, total - chunk * C, C), MIN_LOG_DECAY), 0)
    return G


@triton.jit
def state_pass_columns(
    inputs, factors, states, sizes, begin, total, slot, bh, col,
    BV: tl.constexpr, DIMS: tl.constexpr, FLAGS: tl.constexpr,
    OUTPUT: tl.constexpr, SAVE: tl.constexpr, HAS_STATE: tl.constexpr, REPLAY: tl.constexpr,
    DECAYS: tl.constexpr, EVERY: tl.constexpr = 0,
):  # fmt: skip
    """All passes of BV value columns of one bh (a sequence's value head), from the initial to the final state.

    Without delta the passes before the last have a closed form, S <- D^n S + (1 + ... + D^(n-1)) B, where D is the
    decay of the sequence and B the state after one pass from 0.
    """
    K: tl.constexpr = DIMS.K
    V: tl.constexpr = DIMS.V
    KP: tl.constexpr = DIMS.KP
    head = bh % DIMS.HV
    at_state = bh.to(tl.int64) * K * V
    S = tl.zeros([KP, BV], tl.float32)
    if REPLAY and not FLAGS.DELTA:
        S = scan_chunks(
            S, inputs, factors, states, begin, total, slot, head, col, sizes.scale,
            BV, DIMS, FLAGS, False, False, DECAYS,
        )  # fmt: skip
        G = sequence_decay(inputs, factors, begin, total, slot, head, DIMS, FLAGS)
        powers = tl.zeros([KP], tl.float32)
        for n in range(sizes.passes - 1):
            powers += tl.exp(n * G)
        S = powers[:, None] * S
        if HAS_STATE:
            # mutant: closed-form-of-one-pass-more
            decay = tl.exp((sizes.passes - 1) * G)
            S += decay[:, None] * load_tile(states.initial + at_state, V, K, col, V, KP, BV)
    else:
        if HAS_STATE:
            S = load_tile(states.initial + at_state, V, K, col, V, KP, BV).to(tl.float32)
        if REPLAY:
            # mutant: replay-starts-over
            for _ in range(1, sizes.passes):
                S = scan_chunks(
                    S, inputs, factors, states, begin, total, slot, head, col, sizes.scale,
                    BV, DIMS, FLAGS, False, False, DECAYS,
                )  # fmt: skip
    along = 0
    if EVERY > 0:
        along = first_along(bh // DIMS.HV, states.along_offsets, total, DIMS.C, FLAGS.PACKED, EVERY)
    S = scan_chunks(
        S, inputs, factors, states, begin, total, slot, head, col, sizes.scale,
        BV, DIMS, FLAGS, OUTPUT, SAVE, DECAYS, False, EVERY, along,
    )  # fmt: skip
    store_tile(states.final + at_state, V, K, col, S, V, KP, BV)


@triton.jit(do_not_specialize=["sizes"])
def state_pass_kernel(
    inputs, factors, states, sizes, BV: tl.constexpr, DIMS: tl.constexpr, FLAGS: tl.constexpr,
    SAVE: tl.constexpr, HAS_STATE: tl.constexpr, REPLAY: tl.constexpr, DECAYS: tl.constexpr, EVERY: tl.constexpr,
):  # fmt: skip
    """All passes of the state over the chunks of its sequence. Grid (sequences * HV * cdiv(V, BV),).

    Registers hold S [KP, BV] in float32 for all chunks of all passes.
    """
    bh, col = find_columns(DIMS.V, BV)
    begin, total, slot = find_sequence(bh // DIMS.HV, inputs, sizes, DIMS.C, FLAGS.PACKED)
    state_pass_columns(
        inputs, factors, states, sizes, begin, total, slot, bh, col,
        BV, DIMS, FLAGS, FLAGS.OUTPUT, SAVE, HAS_STATE, REPLAY, DECAYS, EVERY,
    )  # fmt: skip
