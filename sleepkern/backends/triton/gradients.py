"""Stage 4, gradients: dq, dk, dv, dg, dbeta of each chunk, once the states and their gradients at its ends are known.

    dR = X^T dVn;   dP = tril(dO Vn^T);   dM = -tril(dR Vn^T, -1);   dv = b dR
    row_i = sum_j dM_ij exp(G_i - G_j) k_j - E_i S dR_i                          (the part of dk that b_i scales)
    dq_i = scale (E_i S dO_i + sum_j dP_ij exp(G_i - G_j) k_j)
    col_j = sum_i exp(G_i - G_j) (scale dP_ij q_i + b_i dM_ij k_i) + exp(G_C - G_j) dS Vn_j
    dk = b row + col;   dbeta = dR.v + k.row;   dG = q dq + k (b row - col);   dg = sum of dG from here on
    at the last row dG also takes sum_j k_j exp(G_C - G_j) dS Vn_j + Gam S.dS

dG is one number a key channel; head decay sums it over the channels. notes: without delta X = 1, dM = 0, row = 0 and
dbeta = dR.v. Every product stands in the orientation that is used, so none is ever transposed.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .prepare import head_differences, level_decay
from .tiles import (
    CHANNEL,
    HEAD,
    NONE,
    channel_decay,
    exp_of,
    find_chunk,
    head_decay,
    last_row,
    load_row_values,
    load_tile,
    load_turned,
    product,
    store_tile,
    unit_rows,
)


@triton.jit
def score_gradients(
    p_X, p_Vn, p_dVn, p_do, at_rows, first, rows, head, do_stride,
    HV: tl.constexpr, V: tl.constexpr, C: tl.constexpr, BV: tl.constexpr,
    DELTA: tl.constexpr, READS: tl.constexpr, DT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dP, dP^T, dM, dM^T [C, C], triangles not yet cut; zero where the rule or the call has none."""
    dP = tl.zeros([C, C], tl.float32)
    dP_turned = tl.zeros([C, C], tl.float32)
    dM = tl.zeros([C, C], tl.float32)
    dM_turned = tl.zeros([C, C], tl.float32)
    for col in range(0, V, BV):
        Vn = load_tile(p_Vn + at_rows * V, HV * V, rows, col, V, C, BV)
        Vn_turned = load_turned(p_Vn + at_rows * V, HV * V, rows, col, V, C, BV)
        if READS:
            p_o = p_do + first * do_stride + head * V
            dP += product(load_tile(p_o, do_stride, rows, col, V, C, BV), Vn_turned, DT, PRECISION)
            dP_turned += product(Vn, load_turned(p_o, do_stride, rows, col, V, C, BV), DT, PRECISION)
        if DELTA:
            X = load_tile(p_X + at_rows * C, HV * C, rows, 0, C, C, C)
            X_turned = load_turned(p_X + at_rows * C, HV * C, rows, 0, C, C, C)
            dVn = load_tile(p_dVn + at_rows * V, HV * V, rows, col, V, C, BV)
            dVn_turned = load_turned(p_dVn + at_rows * V, HV * V, rows, col, V, C, BV)
            dM -= product(product(X_turned, dVn, DT, PRECISION), Vn_turned, DT, PRECISION)
            dM_turned -= product(Vn, product(dVn_turned, X, DT, PRECISION), DT, PRECISION)
    return dP, dP_turned, dM, dM_turned


@triton.jit
def state_gradients(
    p_v, p_beta, p_X, p_starts, p_Vn, p_ends, p_dVn, p_do, p_dv,
    at_rows, at_slot, first, rows, head, v_stride, beta_stride, do_stride,
    HV: tl.constexpr, K: tl.constexpr, V: tl.constexpr, C: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
    DELTA: tl.constexpr, HAS_BETA: tl.constexpr, READS: tl.constexpr, DT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """S dO, S dR, dS Vn [C, BK], dR.v [C], S.dS [BK], summed over the value columns; writes dv."""
    S_do = tl.zeros([C, BK], tl.float32)
    S_dR = tl.zeros([C, BK], tl.float32)
    dS_Vn = tl.zeros([C, BK], tl.float32)
    dR_v = tl.zeros([C], tl.float32)
    S_dS = tl.zeros([BK], tl.float32)
    b = tl.full([C], 1.0, tl.float32)
    if HAS_BETA:
        b = load_row_values(p_beta + first * beta_stride + head, beta_stride, rows, C)
    for col in range(0, V, BV):
        S = load_turned(p_starts + at_slot * K * V, V, K, col, V, BK, BV)
        dS = load_turned(p_ends + at_slot * K * V, V, K, col, V, BK, BV)
        Vn = load_tile(p_Vn + at_rows * V, HV * V, rows, col, V, C, BV)
        dR = load_tile(p_dVn + at_rows * V, HV * V, rows, col, V, C, BV).to(tl.float32)
        v = load_tile(p_v + first * v_stride + head * V, v_stride, rows, col, V, C, BV)
        if READS:
            do = load_tile(p_do + first * do_stride + head * V, do_stride, rows, col, V, C, BV)
            S_do += product(do, S, DT, PRECISION)
        if DELTA:
            X = load_turned(p_X + at_rows * C, HV * C, rows, 0, C, C, C)
            dR = product(X, dR, DT, PRECISION)
            S_dR += product(dR, S, DT, PRECISION)
        dS_Vn += product(Vn, dS, DT, PRECISION)
        dR_v += tl.sum(dR * v, 1)
        S_dS += tl.sum(S.to(tl.float32) * dS, 0)
        store_tile(p_dv + at_rows * V, HV * V, rows, col, b[:, None] * dR, V, C, BV)
    return S_do, S_dR, dS_Vn, dR_v, S_dS, b


@triton.jit
def inner_gradients(
    q, k, G, b, dP, dP_turned, dM, dM_turned, scale,
    GATE: tl.constexpr, DELTA: tl.constexpr, READS: tl.constexpr, C: tl.constexpr, BK: tl.constexpr,
    DT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The sums inside the chunk: those of dq, of row and of col, [C, BK] each."""
    i = tl.arange(0, C)
    dq = tl.zeros([C, BK], tl.float32)
    row = tl.zeros([C, BK], tl.float32)
    col = tl.zeros([C, BK], tl.float32)
    below = i[:, None] > i[None, :]
    above = i[:, None] < i[None, :]
    if GATE == CHANNEL:
        for level in tl.static_range(0, 7):
            half: tl.constexpr = C >> (level + 1)
            if half > 0:
                e, upper, pair = level_decay(G, half, C, BK)
                reverse = above & ((i // half)[:, None] + 1 == (i // half)[None, :]) & (((i // half) % 2) == 0)[:, None]
                ex = tl.where(upper, e, 0.0)
                ey = tl.where(upper, 0.0, e)
                if READS:
                    dq += ex * product(tl.where(pair, scale * dP, 0.0), k * ey, DT, PRECISION)
                    col += ey * product(tl.where(reverse, scale * dP_turned, 0.0), q * ex, DT, PRECISION)
                if DELTA:
                    row += ex * product(tl.where(pair, dM, 0.0), k * ey, DT, PRECISION)
                    col += ey * product(tl.where(reverse, dM_turned * b[None, :], 0.0), k * ex, DT, PRECISION)
        if READS:
            diagonal = scale * tl.sum(tl.where(i[:, None] == i[None, :], dP, 0.0), 1)[:, None]
            dq += diagonal * k
            col += diagonal * q
    else:
        D = head_differences(G, GATE, C)
        D_turned = tl.where(above | (i[:, None] == i[None, :]), 1.0, 0.0)
        if GATE == HEAD:
            D_turned *= exp_of(G[None, :] - G[:, None])
        if READS:
            dq = product(scale * dP * D, k, DT, PRECISION)
            col = product(scale * dP_turned * D_turned, q, DT, PRECISION)
        if DELTA:
            row = product(tl.where(below, dM * D, 0.0), k, DT, PRECISION)
            col += product(tl.where(above, dM_turned * D_turned * b[None, :], 0.0), k, DT, PRECISION)
    return dq, row, col


@triton.jit
def chunk_gradients(
    p_q, p_k, p_v, p_g, p_beta, p_X, p_starts, p_Vn, p_ends, p_dVn, p_do, p_dq, p_dk, p_dv, p_dg, p_dbeta,
    slot, first, rows, key_head, scale, q_stride, k_stride, v_stride, g_stride, beta_stride, do_stride,
    HV: tl.constexpr, GROUP: tl.constexpr, K: tl.constexpr, V: tl.constexpr,
    C: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
    GATE: tl.constexpr, DELTA: tl.constexpr, HAS_BETA: tl.constexpr, NORMALIZE: tl.constexpr, READS: tl.constexpr,
    DT: tl.constexpr, PRECISION: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """All gradients of the chunk of one key head; its value heads are gone through in order, so sums are repeatable."""
    at_key = key_head * K
    H: tl.constexpr = HV // GROUP
    k = load_tile(p_k + first * k_stride + at_key, k_stride, rows, 0, K, C, BK).to(tl.float32)
    q = k
    if READS:
        q = load_tile(p_q + first * q_stride + at_key, q_stride, rows, 0, K, C, BK).to(tl.float32)
    if NORMALIZE:
        k, k_norm = unit_rows(k)
        q, q_norm = unit_rows(q)
    dq_sum = tl.zeros([C, BK], tl.float32)
    dk_sum = tl.zeros([C, BK], tl.float32)
    i = tl.arange(0, C)
    for member in range(0, GROUP):
        head = key_head * GROUP + member
        at_rows = first * HV + head
        at_slot = slot.to(tl.int64) * HV + head
        dP, dP_turned, dM, dM_turned = score_gradients(
            p_X, p_Vn, p_dVn, p_do, at_rows, first, rows, head, do_stride, HV, V, C, BV, DELTA, READS, DT, PRECISION
        )
        S_do, S_dR, dS_Vn, dbeta, S_dS, b = state_gradients(
            p_v, p_beta, p_X, p_starts, p_Vn, p_ends, p_dVn, p_do, p_dv,
            at_rows, at_slot, first, rows, head, v_stride, beta_stride, do_stride,
            HV, K, V, C, BK, BV, DELTA, HAS_BETA, READS, DT, PRECISION,
        )  # fmt: skip
        G = 0.0
        E = 1.0
        until = 1.0
        if GATE == HEAD:
            G = head_decay(p_g + first * g_stride + head, g_stride, rows, C, WIDE)
            E = exp_of(G)[:, None]
            until = exp_of(last_row(G, C) - G)[:, None]
        if GATE == CHANNEL:
            G = channel_decay(p_g + first * g_stride + head * K, g_stride, rows, K, C, BK, WIDE)
            E = exp_of(G)
            until = exp_of(last_row(G, C)[None, :] - G)
        dq, row, col = inner_gradients(
            q, k, G, b, dP, dP_turned, dM, dM_turned, scale, GATE, DELTA, READS, C, BK, DT, PRECISION
        )
        write = until * dS_Vn
        dq += scale * E * S_do
        row -= E * S_dR
        col += write
        dq_sum += dq
        dk_sum += b[:, None] * row + col
        if HAS_BETA:
            dbeta += tl.sum(k * row, 1)
            tl.store(p_dbeta + at_rows + i * HV, dbeta, mask=i < rows)
        if GATE != NONE:
            dG = k * (b[:, None] * row - col)
            if READS:
                dG += q * dq
            at_end = tl.sum(k * write, 0)
            if GATE == CHANNEL:
                at_end += exp_of(last_row(G, C)) * S_dS
                dg = tl.cumsum(dG, 0, reverse=True) + at_end[None, :]
                store_tile(p_dg + at_rows * K, HV * K, rows, 0, dg, K, C, BK)
            else:
                end = tl.sum(at_end, 0) + exp_of(last_row(G, C)) * tl.sum(S_dS, 0)
                dg = tl.cumsum(tl.sum(dG, 1), 0, reverse=True) + end
                tl.store(p_dg + at_rows + i * HV, dg, mask=i < rows)
    at_rows = first * H + key_head
    if NORMALIZE:
        dk_sum = k_norm[:, None] * (dk_sum - k * tl.sum(k * dk_sum, 1)[:, None])
    store_tile(p_dk + at_rows * K, H * K, rows, 0, dk_sum, K, C, BK)
    if READS:
        if NORMALIZE:
            dq_sum = q_norm[:, None] * (dq_sum - q * tl.sum(q * dq_sum, 1)[:, None])
        store_tile(p_dq + at_rows * K, H * K, rows, 0, dq_sum, K, C, BK)


@triton.jit(do_not_specialize=["T", "sequences"])
def gradient_kernel(
    p_q, p_k, p_v, p_g, p_beta, p_offsets,  # as in prepare
    p_X, p_starts, p_Vn,  # as in prepare and ingest
    p_ends, p_dVn, p_do,  # as in adjoint
    p_dq, p_dk, p_dv, p_dg, p_dbeta,  # contiguous, shapes of the tensors
    T, sequences, scale, q_stride, k_stride, v_stride, g_stride, beta_stride, do_stride,
    HV: tl.constexpr, GROUP: tl.constexpr, K: tl.constexpr, V: tl.constexpr,
    C: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
    GATE: tl.constexpr, DELTA: tl.constexpr, HAS_BETA: tl.constexpr, NORMALIZE: tl.constexpr, READS: tl.constexpr,
    PACKED: tl.constexpr, DT: tl.constexpr, PRECISION: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """Grid (slots, H): one chunk of one key head. Registers: four [C, C], then six [C, BK] float32."""
    slot = tl.program_id(0)
    _, first, rows = find_chunk(slot, p_offsets, T, sequences, C, PACKED)
    if rows > 0:
        chunk_gradients(
            p_q, p_k, p_v, p_g, p_beta, p_X, p_starts, p_Vn, p_ends, p_dVn, p_do, p_dq, p_dk, p_dv, p_dg, p_dbeta,
            slot, first, rows, tl.program_id(1), scale,
            q_stride, k_stride, v_stride, g_stride, beta_stride, do_stride,
            HV, GROUP, K, V, C, BK, BV, GATE, DELTA, HAS_BETA, NORMALIZE, READS, DT, PRECISION, WIDE,
        )  # fmt: skip
