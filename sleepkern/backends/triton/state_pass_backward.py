"""Stage 3, adjoint: the gradient of the state walks back over the chunks. The mirror of ingest, and as blind.

dVn = P^T dO + Kt dS;   dS <- Gam dS + Qe^T dO - W^T dVn        (without delta: no W)
"""

from __future__ import annotations

import triton
import triton.language as tl

from .common import (
    CHANNEL,
    HEAD,
    exp_of,
    find_columns,
    find_sequence,
    head_decay,
    last_row,
    load_tile,
    load_turned,
    product,
    store_tile,
)
from .state_pass import inverse_norm


@triton.jit
def walk_back(
    dS, p_q, p_k, p_g, p_P, p_W, p_Kt, p_Qe, p_end, p_do, p_ends, p_dVn,
    begin, total, slot, head, col, scale, q_stride, k_stride, g_stride, do_stride,
    HV: tl.constexpr, GROUP: tl.constexpr, K: tl.constexpr, V: tl.constexpr,
    C: tl.constexpr, KP: tl.constexpr, BV: tl.constexpr,
    GATE: tl.constexpr, DELTA: tl.constexpr, NORMALIZE: tl.constexpr, READS: tl.constexpr,
    DT: tl.constexpr, PRECISION: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """dS [KP, BV] from the end of a sequence to its start; writes dS at the ends of the chunks, and dVn."""
    at_key = (head // GROUP) * K
    chunks = tl.cdiv(total, C)
    for back in range(chunks):
        chunk = chunks - 1 - back
        first = begin + chunk * C
        rows = total - chunk * C
        at_rows = first * HV + head
        at_slot = (slot + chunk).to(tl.int64) * HV + head
        store_tile(p_ends + at_slot * K * V, V, K, col, dS, V, KP, BV)
        # mutant: backward-without-scale
        since = tl.full([C], scale, tl.float32)
        until = tl.full([C], 1.0, tl.float32)
        kept = 1.0
        if GATE == HEAD:
            G = head_decay(p_g + first * g_stride + head, g_stride, rows, C, WIDE)
            end = last_row(G, C)
            since *= exp_of(G)
            until = exp_of(end - G)
            kept = exp_of(end)
        if GATE == CHANNEL:
            Kt = load_tile(p_Kt + at_rows * K, HV * K, rows, 0, K, C, KP)
            dVn = product(Kt, dS, DT, PRECISION)
            key = tl.arange(0, KP)
            kept = exp_of(tl.load(p_end + at_slot * K + key, mask=key < K, other=0.0))[:, None]
        else:
            k = load_tile(p_k + first * k_stride + at_key, k_stride, rows, 0, K, C, KP)
            if NORMALIZE:
                until *= inverse_norm(k, 1)
            dVn = until[:, None] * product(k, dS, DT, PRECISION)
        # mutant: backward-does-not-decay
        dS = kept * dS
        if READS:
            do = load_tile(p_do + first * do_stride + head * V, do_stride, rows, col, V, C, BV)
            P = load_turned(p_P + at_rows * C, HV * C, rows, 0, C, C, C)
            dVn += product(P, do, DT, PRECISION)
            if GATE == CHANNEL:
                Qe = load_turned(p_Qe + at_rows * K, HV * K, rows, 0, K, C, KP)
                dS += product(Qe, do, DT, PRECISION)
            else:
                q = load_turned(p_q + first * q_stride + at_key, q_stride, rows, 0, K, C, KP)
                if NORMALIZE:
                    since *= inverse_norm(q, 0)
                dS += product(q, since[:, None] * do, DT, PRECISION)
        store_tile(p_dVn + at_rows * V, HV * V, rows, col, dVn, V, C, BV)
        if DELTA:
            W = load_turned(p_W + at_rows * K, HV * K, rows, 0, K, C, KP)
            # mutant: backward-without-w
            dS -= product(W, dVn, DT, PRECISION)
    return dS


@triton.jit(do_not_specialize=["T"])
def adjoint_kernel(
    p_q, p_k, p_g, p_offsets,  # as in prepare
    p_P, p_W, p_Kt, p_Qe, p_end,
    p_do, p_dstate, p_dinitial,  # [rows,HV,V]  [sequences,HV,K,V] float32, twice
    p_ends, p_dVn,  # [slots,HV,K,V] gradients of the states at the ends of the chunks  [rows,HV,V]
    T, scale, q_stride, k_stride, g_stride, do_stride,
    HV: tl.constexpr, GROUP: tl.constexpr, K: tl.constexpr, V: tl.constexpr,
    C: tl.constexpr, KP: tl.constexpr, BV: tl.constexpr,
    GATE: tl.constexpr, DELTA: tl.constexpr, NORMALIZE: tl.constexpr, READS: tl.constexpr, HAS_STATE: tl.constexpr,
    PACKED: tl.constexpr, DT: tl.constexpr, PRECISION: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """Grid (sequences * HV * cdiv(V, BV),). Registers: dS [KP, BV] float32. HAS_STATE: p_dstate is given."""
    lane, col = find_columns(V, BV)
    begin, total, slot = find_sequence(lane // HV, p_offsets, T, C, PACKED)
    at_state = lane.to(tl.int64) * K * V
    dS = tl.zeros([KP, BV], tl.float32)
    if HAS_STATE:
        dS = load_tile(p_dstate + at_state, V, K, col, V, KP, BV)
    dS = walk_back(
        dS, p_q, p_k, p_g, p_P, p_W, p_Kt, p_Qe, p_end, p_do, p_ends, p_dVn,
        begin, total, slot, lane % HV, col, scale, q_stride, k_stride, g_stride, do_stride,
        HV, GROUP, K, V, C, KP, BV, GATE, DELTA, NORMALIZE, READS, DT, PRECISION, WIDE,
    )  # fmt: skip
    store_tile(p_dinitial + at_state, V, K, col, dS, V, KP, BV)
