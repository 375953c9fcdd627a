"""Stage 2, ingest: the state walks over the chunks, and the readouts on its way. Blind to the rule but for the gate.

    Vn = U - W S;   O = Qe S + P Vn;   S <- Gam S + Kt^T Vn        (without delta: Vn = b v)

Value columns are independent: each program keeps [K, BV] of the state in registers from the first chunk to the last,
pass after pass. Decay and normalisation are numbers a row here (Kt = diag(exp(G_C - G) / |k|) K), but for channel
decay, whose Kt and Qe prepare has written.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .common import (
    CHANNEL,
    FORGET,
    HEAD,
    NORM_EPS,
    exp_of,
    find_columns,
    find_sequence,
    head_decay,
    last_row,
    load_row_values,
    load_tile,
    load_turned,
    product,
    store_tile,
)


@triton.jit
def walk(
    S, p_q, p_k, p_v, p_g, p_beta, p_P, p_W, p_U, p_Kt, p_Qe, p_end, p_o, p_starts, p_Vn,
    begin, total, slot, head, col, scale, q_stride, k_stride, v_stride, g_stride, beta_stride,
    HV: tl.constexpr, GROUP: tl.constexpr, K: tl.constexpr, V: tl.constexpr,
    C: tl.constexpr, KP: tl.constexpr, BV: tl.constexpr,
    GATE: tl.constexpr, DELTA: tl.constexpr, HAS_BETA: tl.constexpr, NORMALIZE: tl.constexpr, READS: tl.constexpr,
    KEEP: tl.constexpr, DT: tl.constexpr, PRECISION: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """One pass of S [KP, BV] over a sequence; writes readouts when READS, chunk starts and Vn when KEEP."""
    at_key = (head // GROUP) * K
    for chunk in range(tl.cdiv(total, C)):
        first = begin + chunk * C
        rows = total - chunk * C
        at_rows = first * HV + head
        at_slot = (slot + chunk).to(tl.int64) * HV + head
        if KEEP:
            store_tile(p_starts + at_slot * K * V, V, K, col, S, V, KP, BV)
        if DELTA:
            W = load_tile(p_W + at_rows * K, HV * K, rows, 0, K, C, KP)
            U = load_tile(p_U + at_rows * V, HV * V, rows, col, V, C, BV)
            # mutant: erases-nothing
            Vn = U.to(tl.float32) - product(W, S, DT, PRECISION)
        else:
            Vn = load_tile(p_v + first * v_stride + head * V, v_stride, rows, col, V, C, BV).to(tl.float32)
            if HAS_BETA:
                Vn *= load_row_values(p_beta + first * beta_stride + head, beta_stride, rows, C)[:, None]
        if KEEP:
            store_tile(p_Vn + at_rows * V, HV * V, rows, col, Vn, V, C, BV)
        since = tl.full([C], scale, tl.float32)
        until = tl.full([C], 1.0, tl.float32)
        if GATE == HEAD:
            G = head_decay(p_g + first * g_stride + head, g_stride, rows, C, WIDE)
            end = last_row(G, C)
            since *= exp_of(G)
            until = exp_of(end - G)
        if READS:
            P = load_tile(p_P + at_rows * C, HV * C, rows, 0, C, C, C)
            if GATE == CHANNEL:
                Qe = load_tile(p_Qe + at_rows * K, HV * K, rows, 0, K, C, KP)
                o = product(Qe, S, DT, PRECISION)
            else:
                q = load_tile(p_q + first * q_stride + at_key, q_stride, rows, 0, K, C, KP)
                if NORMALIZE:
                    since *= inverse_norm(q, 1)
                o = since[:, None] * product(q, S, DT, PRECISION)
            o += product(P, Vn, DT, PRECISION)
            store_tile(p_o + at_rows * V, HV * V, rows, col, o, V, C, BV)
        if GATE == CHANNEL:
            turned = load_turned(p_Kt + at_rows * K, HV * K, rows, 0, K, C, KP)
            key = tl.arange(0, KP)
            kept = exp_of(tl.load(p_end + at_slot * K + key, mask=key < K, other=0.0))[:, None]
        else:
            turned = load_turned(p_k + first * k_stride + at_key, k_stride, rows, 0, K, C, KP)
            if NORMALIZE:
                until *= inverse_norm(turned, 0)
            kept = 1.0
            if GATE == HEAD:
                kept = exp_of(end)
        # mutant: state-does-not-decay
        S = kept * S + product(turned, until[:, None] * Vn, DT, PRECISION)
    return S


@triton.jit
def inverse_norm(x, axis: tl.constexpr):
    """1 / |x| along an axis."""
    x = x.to(tl.float32)
    return 1.0 / tl.sqrt(tl.sum(x * x, axis) + NORM_EPS)


@triton.jit
def window_decay(
    p_g, p_end, begin, total, slot, head, g_stride,
    HV: tl.constexpr, K: tl.constexpr, C: tl.constexpr, KP: tl.constexpr, GATE: tl.constexpr,
):  # fmt: skip
    """Sum of the log decay of a sequence, [KP]."""
    key = tl.arange(0, KP)
    G = tl.zeros([KP], tl.float32)
    for chunk in range(tl.cdiv(total, C)):
        if GATE == CHANNEL:
            at = ((slot + chunk).to(tl.int64) * HV + head) * K
            G += tl.load(p_end + at + key, mask=key < K, other=0.0)
        if GATE == HEAD:
            g = load_row_values(p_g + (begin + chunk * C) * g_stride + head, g_stride, total - chunk * C, C)
            G += tl.sum(tl.maximum(g, FORGET), 0)
    return G


@triton.jit
def ingest_columns(
    p_q, p_k, p_v, p_g, p_beta, p_P, p_W, p_U, p_Kt, p_Qe, p_end, p_state, p_o, p_final, p_starts, p_Vn,
    begin, total, slot, lane, col, scale, passes, q_stride, k_stride, v_stride, g_stride, beta_stride,
    HV: tl.constexpr, GROUP: tl.constexpr, K: tl.constexpr, V: tl.constexpr,
    C: tl.constexpr, KP: tl.constexpr, BV: tl.constexpr,
    GATE: tl.constexpr, DELTA: tl.constexpr, HAS_BETA: tl.constexpr, NORMALIZE: tl.constexpr, READS: tl.constexpr,
    KEEP: tl.constexpr, HAS_STATE: tl.constexpr, REPLAY: tl.constexpr,
    DT: tl.constexpr, PRECISION: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """All passes of BV value columns of a lane (a sequence's value head), from state to final.

    Without delta the passes before the last have a closed form, S <- Gam^n S + (1 + ... + Gam^(n-1)) B, where B is one
    walk from 0.
    """
    head = lane % HV
    at_state = lane.to(tl.int64) * K * V
    S = tl.zeros([KP, BV], tl.float32)
    if REPLAY and not DELTA:
        S = walk(
            S, p_q, p_k, p_v, p_g, p_beta, p_P, p_W, p_U, p_Kt, p_Qe, p_end, p_o, p_starts, p_Vn,
            begin, total, slot, head, col, scale, q_stride, k_stride, v_stride, g_stride, beta_stride,
            HV, GROUP, K, V, C, KP, BV, GATE, DELTA, HAS_BETA, NORMALIZE, False, False, DT, PRECISION, WIDE,
        )  # fmt: skip
        G = window_decay(p_g, p_end, begin, total, slot, head, g_stride, HV, K, C, KP, GATE)
        powers = tl.zeros([KP], tl.float32)
        for n in range(passes - 1):
            powers += tl.exp(n * G)
        S = powers[:, None] * S
        if HAS_STATE:
            # mutant: closed-form-of-one-pass-more
            S += tl.exp((passes - 1) * G)[:, None] * load_tile(p_state + at_state, V, K, col, V, KP, BV)
    else:
        if HAS_STATE:
            S = load_tile(p_state + at_state, V, K, col, V, KP, BV)
        if REPLAY:
            # mutant: replay-starts-over
            for _ in range(1, passes):
                S = walk(
                    S, p_q, p_k, p_v, p_g, p_beta, p_P, p_W, p_U, p_Kt, p_Qe, p_end, p_o, p_starts, p_Vn,
                    begin, total, slot, head, col, scale, q_stride, k_stride, v_stride, g_stride, beta_stride,
                    HV, GROUP, K, V, C, KP, BV, GATE, DELTA, HAS_BETA, NORMALIZE, False, False, DT, PRECISION, WIDE,
                )  # fmt: skip
    S = walk(
        S, p_q, p_k, p_v, p_g, p_beta, p_P, p_W, p_U, p_Kt, p_Qe, p_end, p_o, p_starts, p_Vn,
        begin, total, slot, head, col, scale, q_stride, k_stride, v_stride, g_stride, beta_stride,
        HV, GROUP, K, V, C, KP, BV, GATE, DELTA, HAS_BETA, NORMALIZE, READS, KEEP, DT, PRECISION, WIDE,
    )  # fmt: skip
    store_tile(p_final + at_state, V, K, col, S, V, KP, BV)


@triton.jit(do_not_specialize=["T", "sequences", "passes"])
def ingest_kernel(
    p_q, p_k, p_v, p_g, p_beta, p_offsets,  # as in prepare
    p_P, p_W, p_U, p_Kt, p_Qe, p_end,
    p_state, p_o, p_final,  # state, final [sequences,HV,K,V] float32  o [rows,HV,V]
    p_starts, p_Vn,  # [slots,HV,K,V] states at the starts of the chunks  [rows,HV,V]
    T, scale, passes, q_stride, k_stride, v_stride, g_stride, beta_stride,
    HV: tl.constexpr, GROUP: tl.constexpr, K: tl.constexpr, V: tl.constexpr,
    C: tl.constexpr, KP: tl.constexpr, BV: tl.constexpr,
    GATE: tl.constexpr, DELTA: tl.constexpr, HAS_BETA: tl.constexpr, NORMALIZE: tl.constexpr, READS: tl.constexpr,
    KEEP: tl.constexpr, HAS_STATE: tl.constexpr, REPLAY: tl.constexpr, PACKED: tl.constexpr,
    DT: tl.constexpr, PRECISION: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """Grid (sequences * HV * cdiv(V, BV),). Registers: S [KP, BV] float32 for all chunks of all passes."""
    lane, col = find_columns(V, BV)
    begin, total, slot = find_sequence(lane // HV, p_offsets, T, C, PACKED)
    ingest_columns(
        p_q, p_k, p_v, p_g, p_beta, p_P, p_W, p_U, p_Kt, p_Qe, p_end, p_state, p_o, p_final, p_starts, p_Vn,
        begin, total, slot, lane, col, scale, passes,
        q_stride, k_stride, v_stride, g_stride, beta_stride,
        HV, GROUP, K, V, C, KP, BV, GATE, DELTA, HAS_BETA, NORMALIZE, READS, KEEP, HAS_STATE, REPLAY,
        DT, PRECISION, WIDE,
    )  # fmt: skip
