"""Stage 1, prepare: the factors of each chunk that do not depend on the state. The only stage that knows the rule.

    M_ij = b_i k_i.k_j exp(G_i - G_j), i > j     P_ij = scale q_i.k_j exp(G_i - G_j), i >= j
    X = (I + M)^-1    U = X diag(b) V    W = X diag(b E) K    Kt = K exp(G_C - G)    Qe = scale Q E

Exponents are differences inside a chunk and never positive. The inverse is exact substitution on 16 x 16 diagonal
blocks in float32, merged block by block; no series, whose powers overflow for correlated keys.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .tiles import (
    CHANNEL,
    HEAD,
    channel_decay,
    exp_of,
    find_chunk,
    head_decay,
    last_row,
    load_row_values,
    load_tile,
    product,
    store_tile,
    unit_rows,
)

BLOCK = tl.constexpr(16)


@triton.jit
def scores(
    q, k, G, GATE: tl.constexpr, READS: tl.constexpr, DELTA: tl.constexpr,
    C: tl.constexpr, BK: tl.constexpr, DT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """(qk with its diagonal, kk without): lower triangles [C, C] of sum_d x_id k_jd exp(G_id - G_jd)."""
    i = tl.arange(0, C)
    qk = tl.zeros([C, C], tl.float32)
    kk = tl.zeros([C, C], tl.float32)
    if GATE == CHANNEL:
        half: tl.constexpr = C // 2
        for level in tl.static_range(0, 7):
            if (half >> level) > 0:
                e, upper, pair = level_decay(G, half >> level, C, BK)
                y = tl.trans(tl.where(upper, 0.0, k * e))
                if READS:
                    qk += tl.where(pair, product(tl.where(upper, q * e, 0.0), y, tl.float32, PRECISION), 0.0)
                if DELTA:
                    kk += tl.where(pair, product(tl.where(upper, k * e, 0.0), y, tl.float32, PRECISION), 0.0)
        if READS:
            qk += tl.where(i[:, None] == i[None, :], tl.sum(q * k, 1)[:, None], 0.0)
    else:
        D = head_differences(G, GATE, C)
        if READS:
            qk = product(q, tl.trans(k.to(DT)), DT, PRECISION) * D
        if DELTA:
            kk = tl.where(i[:, None] > i[None, :], product(k, tl.trans(k.to(DT)), DT, PRECISION) * D, 0.0)
    return qk, kk


@triton.jit
def head_differences(G, GATE: tl.constexpr, C: tl.constexpr):
    """[C, C] of exp(G_i - G_j), i >= j, else 0."""
    i = tl.arange(0, C)
    lower = i[:, None] >= i[None, :]
    if GATE == HEAD:
        return tl.where(lower, exp_of(G[:, None] - G[None, :]), 0.0)
    return tl.where(lower, 1.0, 0.0)


@triton.jit
def level_decay(G, half: tl.constexpr, C: tl.constexpr, BK: tl.constexpr):
    """One level of the dyadic form: rows in pairs of halves, R the last row of the lower half of each pair.

    Returns exp(-|G - R|) [C, BK], which is exp(G_i - R) in the upper half and exp(R - G_j) in the lower; whether a row
    is in the upper half [C, 1]; whether (i, j) are the upper and lower half of one pair [C, C].
    """
    i = tl.arange(0, C)
    PAIRS: tl.constexpr = C // (2 * half)
    in_pair = tl.arange(0, 2 * half)[None, :, None]
    pairs = tl.reshape(G, [PAIRS, 2 * half, BK])
    R = tl.sum(tl.where(in_pair == half - 1, pairs, 0.0), 1)
    distance = tl.reshape(tl.abs(pairs - R[:, None, :]), [C, BK])
    upper = (i // half) % 2 == 1
    pair = (i // half)[:, None] == (i // half)[None, :] + 1
    return exp_of(-distance), upper[:, None], pair & upper[:, None]


@triton.jit
def invert(M, C: tl.constexpr, PRECISION: tl.constexpr):
    """(I + M)^-1 [C, C] of a strictly lower triangle: blocks of 16 by substitution, then pairs of blocks merged."""
    BLOCKS: tl.constexpr = C // BLOCK
    row = tl.arange(0, BLOCK)[None, :, None]
    block = tl.arange(0, BLOCKS)
    same = block[:, None, None, None] == block[None, None, :, None]
    diagonal = tl.sum(tl.where(same, tl.reshape(M, [BLOCKS, BLOCK, BLOCKS, BLOCK]), 0.0), 2)
    X = tl.where(row == tl.arange(0, BLOCK)[None, None, :], 1.0, 0.0) + tl.zeros([BLOCKS, BLOCK, BLOCK], tl.float32)
    for r in range(1, BLOCK):
        m = tl.sum(tl.where(row == r, diagonal, 0.0), 1)
        X = tl.where(row == r, X - tl.sum(m[:, :, None] * X, 1)[:, None, :], X)
    inverse = tl.reshape(tl.where(same, X[:, :, None, :], 0.0), [C, C])
    i = tl.arange(0, C)
    for level in tl.static_range(0, 3):
        size: tl.constexpr = 16 << level
        if size < C:
            below = (i[:, None] // (2 * size) == i[None, :] // (2 * size)) & (i[:, None] // size > i[None, :] // size)
            left = product(inverse, tl.where(below, M, 0.0), tl.float32, PRECISION)
            inverse -= product(left, inverse, tl.float32, PRECISION)
    return inverse


@triton.jit
def prepare_chunk(
    p_q, p_k, p_v, p_g, p_beta, p_P, p_X, p_W, p_U, p_Kt, p_Qe, p_end,
    slot, first, rows, head, scale, q_stride, k_stride, v_stride, g_stride, beta_stride,
    HV: tl.constexpr, GROUP: tl.constexpr, K: tl.constexpr, V: tl.constexpr,
    C: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
    GATE: tl.constexpr, DELTA: tl.constexpr, NORMALIZE: tl.constexpr, READS: tl.constexpr, KEEP: tl.constexpr,
    DT: tl.constexpr, PRECISION: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """Factors of the chunk of a value head that starts at row `first` and may use `rows` rows; X only when KEEP."""
    at_key = (head // GROUP) * K
    k = load_tile(p_k + first * k_stride + at_key, k_stride, rows, 0, K, C, BK)
    q = k
    if READS:
        q = load_tile(p_q + first * q_stride + at_key, q_stride, rows, 0, K, C, BK)
    if NORMALIZE:
        k, _ = unit_rows(k)
        q, _ = unit_rows(q)
    G = 0.0
    if GATE == HEAD:
        G = head_decay(p_g + first * g_stride + head, g_stride, rows, C, WIDE)
    if GATE == CHANNEL:
        G = channel_decay(p_g + first * g_stride + head * K, g_stride, rows, K, C, BK, WIDE)
        q, k = q.to(tl.float32), k.to(tl.float32)
    qk, kk = scores(q, k, G, GATE, READS, DELTA, C, BK, DT, PRECISION)
    at_rows = first * HV + head
    if READS:
        store_tile(p_P + at_rows * C, HV * C, rows, 0, scale * qk, C, C, C)
    if GATE == CHANNEL:
        end = last_row(G, C)
        key = tl.arange(0, BK)
        tl.store(p_end + (slot.to(tl.int64) * HV + head) * K + key, end.to(tl.float32), mask=key < K)
        store_tile(p_Kt + at_rows * K, HV * K, rows, 0, k * exp_of(end[None, :] - G), K, C, BK)
        if READS:
            store_tile(p_Qe + at_rows * K, HV * K, rows, 0, scale * q * exp_of(G), K, C, BK)
    if DELTA:
        b = load_row_values(p_beta + first * beta_stride + head, beta_stride, rows, C)
        X = invert(b[:, None] * kk, C, PRECISION)
        if KEEP:
            store_tile(p_X + at_rows * C, HV * C, rows, 0, X, C, C, C)
        bE = b[:, None]
        if GATE == HEAD:
            bE = (b * exp_of(G))[:, None]
        if GATE == CHANNEL:
            bE = b[:, None] * exp_of(G)
        store_tile(p_W + at_rows * K, HV * K, rows, 0, product(X, bE * k, DT, PRECISION), K, C, BK)
        for col in range(0, V, BV):
            v = load_tile(p_v + first * v_stride + head * V, v_stride, rows, col, V, C, BV)
            store_tile(p_U + at_rows * V, HV * V, rows, col, product(X, b[:, None] * v, DT, PRECISION), V, C, BV)


@triton.jit(do_not_specialize=["T", "sequences"])
def prepare_kernel(
    p_q, p_k, p_v, p_g, p_beta, p_offsets,  # q, k [rows,H,K]  v [rows,HV,V]  g, beta: rules.py
    p_P, p_X, p_W, p_U, p_Kt, p_Qe,  # P, X [rows,HV,C]  W, Kt, Qe [rows,HV,K]  U [rows,HV,V]
    p_end,  # [slots,HV,K] G at the last row of the chunk, for channel decay
    T, sequences, scale, q_stride, k_stride, v_stride, g_stride, beta_stride,
    HV: tl.constexpr, GROUP: tl.constexpr, K: tl.constexpr, V: tl.constexpr,
    C: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
    GATE: tl.constexpr, DELTA: tl.constexpr, NORMALIZE: tl.constexpr, READS: tl.constexpr, KEEP: tl.constexpr,
    PACKED: tl.constexpr, DT: tl.constexpr, PRECISION: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """Grid (slots, HV): one chunk of one value head. Registers: q, k [C, BK], two [C, C]; v goes by in [C, BV]."""
    slot = tl.program_id(0)
    _, first, rows = find_chunk(slot, p_offsets, T, sequences, C, PACKED)
    if rows > 0:
        prepare_chunk(
            p_q, p_k, p_v, p_g, p_beta, p_P, p_X, p_W, p_U, p_Kt, p_Qe, p_end,
            slot, first, rows, tl.program_id(1), scale, q_stride, k_stride, v_stride, g_stride, beta_stride,
            HV, GROUP, K, V, C, BK, BV, GATE, DELTA, NORMALIZE, READS, KEEP, DT, PRECISION, WIDE,
        )  # fmt: skip
