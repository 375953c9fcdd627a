"""Stage 1, prepare: the factors of each chunk that do not depend on the state. The only stage that knows the rule.

    M_ij = b_i k_i.k_j exp(G_i - G_j), i > j     P_ij = scale q_i.k_j exp(G_i - G_j), i >= j
    X = (I + M)^-1    U = X diag(b) V    W = X diag(b E) K    Kt = K exp(G_C - G)    Qe = scale Q E

Exponents are differences inside a chunk and never positive. The inverse is merged block by block, from single rows on;
no series, whose powers overflow for correlated keys.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .chunk_factors_channel import BLOCK, channel_scores, on_diagonal
from .common import (
    CHANNEL,
    HEAD,
    channel_decay,
    exp_of,
    find_chunk,
    head_decay,
    inverse_norms,
    last_row,
    load_row_values,
    load_tile,
    product,
    store_tile,
)


@triton.jit
def head_differences(G, GATE: tl.constexpr, C: tl.constexpr):
    """[C, C] of exp(G_i - G_j), i >= j, else 0."""
    i = tl.arange(0, C)
    lower = i[:, None] >= i[None, :]
    if GATE == HEAD:
        return tl.where(lower, exp_of(G[:, None] - G[None, :]), 0.0)
    return tl.where(lower, 1.0, 0.0)


@triton.jit
def invert(M, C: tl.constexpr, PRECISION: tl.constexpr):
    """(I + M)^-1 [C, C] of a strictly lower triangle M: pairs of blocks merged, from single rows to all.

    Up to BLOCK rows the blocks of the diagonal are products of their own [BLOCK, BLOCK], not of all of [C, C].
    """
    BLOCKS: tl.constexpr = C // BLOCK
    i = tl.arange(0, BLOCK)
    block = tl.arange(0, BLOCKS)
    same = block[:, None, None, None] == block[None, None, :, None]
    diagonal = tl.sum(tl.where(same, tl.reshape(M, [BLOCKS, BLOCK, BLOCKS, BLOCK]), 0.0), 2)
    X = tl.where((i[:, None] == i[None, :])[None], 1.0, -tl.where(between(i, 0)[None], diagonal, 0.0))
    for level in tl.static_range(1, 4):
        X = merge(X, tl.where(between(i, level)[None], diagonal, 0.0), PRECISION)
    inverse = on_diagonal(X, C)
    for level in tl.static_range(4, 7):
        # mutant: inverse-of-smaller-blocks
        if (1 << level) < C:
            inverse = merge(inverse, tl.where(between(tl.arange(0, C), level), M, 0.0), PRECISION)
    return inverse


@triton.jit
def between(i, level: tl.constexpr):
    """[C, C]: whether row and column are the second and the first half of one block of 2^(level + 1) rows."""
    half = i >> level
    # mutant: blocks-merged-with-the-wrong-half
    return (half[:, None] == half[None, :] + 1) & ((half[None, :] & 1) == 0)


@triton.jit
def merge(X, L, PRECISION: tl.constexpr):
    """From inverses X of blocks on the diagonal to those of twice the size: X - X L X, L the numbers between them."""
    return X - product(product(X, L, tl.float32, PRECISION), X, tl.float32, PRECISION)


@triton.jit
def score_chunk(
    p_q, p_k, p_g, p_Kt, p_Qe, p_end, at_rows, at_end, rows, head, scale, q_stride, k_stride, g_stride,
    HV: tl.constexpr, K: tl.constexpr, C: tl.constexpr, BK: tl.constexpr,
    GATE: tl.constexpr, DELTA: tl.constexpr, NORMALIZE: tl.constexpr, READS: tl.constexpr,
    DT: tl.constexpr, PRECISION: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """qk and kk with decay [C, C], of kk what is below the diagonal counts; 1 / |k| [C], G [C] of head decay.

    Writes Kt, Qe and end of channel decay.
    """
    G = 0.0
    q_norm = tl.full([C], 1.0, tl.float32)
    k_norm = tl.full([C], 1.0, tl.float32)
    if NORMALIZE:
        k_norm = inverse_norms(p_k, k_stride, rows, K, C, BK)
        if READS:
            q_norm = inverse_norms(p_q, q_stride, rows, K, C, BK)
    qk = tl.zeros([C, C], tl.float32)
    kk = tl.zeros([C, C], tl.float32)
    for col in range(0, K, BK):
        k = load_tile(p_k, k_stride, rows, col, K, C, BK)
        q = k
        if READS:
            q = load_tile(p_q, q_stride, rows, col, K, C, BK)
        if GATE == CHANNEL:
            q, k = q.to(tl.float32), k.to(tl.float32)
            decay = channel_decay(p_g, g_stride, rows, col, K, C, BK, WIDE)
            more_qk, more_kk = channel_scores(q, k, decay, READS, DELTA, C, BK, DT, PRECISION)
            qk += more_qk
            kk += more_kk
            end = last_row(decay, C)
            key = col + tl.arange(0, BK)
            tl.store(p_end + at_end + key, end.to(tl.float32), mask=key < K)
            Kt = k_norm[:, None] * k * exp_of(end[None, :] - decay)
            store_tile(p_Kt + at_rows * K, HV * K, rows, col, Kt, K, C, BK)
            if READS:
                Qe = (scale * q_norm)[:, None] * q * exp_of(decay)
                store_tile(p_Qe + at_rows * K, HV * K, rows, col, Qe, K, C, BK)
        else:
            if READS:
                qk += product(q, tl.trans(k), DT, PRECISION)
            if DELTA:
                kk += product(k, tl.trans(k), DT, PRECISION)
    if GATE != CHANNEL:
        if GATE == HEAD:
            G = head_decay(p_g, g_stride, rows, C, WIDE)
        D = head_differences(G, GATE, C)
        qk *= D
        kk *= D
    if NORMALIZE:
        qk *= q_norm[:, None] * k_norm[None, :]
        kk *= k_norm[:, None] * k_norm[None, :]
    return qk, kk, k_norm, G


@triton.jit
def prepare_chunk(
    p_q, p_k, p_v, p_g, p_beta, p_P, p_X, p_kk, p_W, p_U, p_Kt, p_Qe, p_end,
    slot, first, rows, head, scale, q_stride, k_stride, v_stride, g_stride, beta_stride,
    HV: tl.constexpr, GROUP: tl.constexpr, K: tl.constexpr, V: tl.constexpr,
    C: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
    GATE: tl.constexpr, DELTA: tl.constexpr, NORMALIZE: tl.constexpr, READS: tl.constexpr, KEEP: tl.constexpr,
    DT: tl.constexpr, PRECISION: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """Factors of the chunk of a value head from row `first` on, `rows` of them there; X and kk only when KEEP."""
    at_rows = first * HV + head
    p_k += first * k_stride + (head // GROUP) * K
    if READS:
        p_q += first * q_stride + (head // GROUP) * K
    if GATE == HEAD:
        p_g += first * g_stride + head
    if GATE == CHANNEL:
        p_g += first * g_stride + head * K
    at_end = (slot.to(tl.int64) * HV + head) * K
    qk, kk, k_norm, G = score_chunk(
        p_q, p_k, p_g, p_Kt, p_Qe, p_end, at_rows, at_end, rows, head, scale, q_stride, k_stride, g_stride,
        HV, K, C, BK, GATE, DELTA, NORMALIZE, READS, DT, PRECISION, WIDE,
    )  # fmt: skip
    if READS:
        store_tile(p_P + at_rows * C, HV * C, rows, 0, scale * qk, C, C, C)
    if DELTA:
        b = load_row_values(p_beta + first * beta_stride + head, beta_stride, rows, C)
        X = invert(b[:, None] * kk, C, PRECISION)
        if KEEP:
            store_tile(p_X + at_rows * C, HV * C, rows, 0, X, C, C, C)
            store_tile(p_kk + at_rows * C, HV * C, rows, 0, kk, C, C, C)
        b_norm = b * k_norm
        if GATE == HEAD:
            b_norm *= exp_of(G)
        for col in range(0, K, BK):
            k = b_norm[:, None] * load_tile(p_k, k_stride, rows, col, K, C, BK)
            if GATE == CHANNEL:
                k *= exp_of(channel_decay(p_g, g_stride, rows, col, K, C, BK, WIDE))
            store_tile(p_W + at_rows * K, HV * K, rows, col, product(X, k, DT, PRECISION), K, C, BK)
        for col in range(0, V, BV):
            v = load_tile(p_v + first * v_stride + head * V, v_stride, rows, col, V, C, BV)
            store_tile(p_U + at_rows * V, HV * V, rows, col, product(X, b[:, None] * v, DT, PRECISION), V, C, BV)


@triton.jit(do_not_specialize=["T", "sequences"])
def prepare_kernel(
    p_q, p_k, p_v, p_g, p_beta, p_offsets,  # q, k [rows,H,K]  v [rows,HV,V]  g, beta: rules.py
    p_P, p_X, p_kk, p_W, p_U, p_Kt, p_Qe,  # P, X, kk [rows,HV,C]  W, Kt, Qe [rows,HV,K]  U [rows,HV,V]
    p_end,  # [slots,HV,K] G at the last row of the chunk, for channel decay
    T, sequences, scale, q_stride, k_stride, v_stride, g_stride, beta_stride,
    HV: tl.constexpr, GROUP: tl.constexpr, K: tl.constexpr, V: tl.constexpr,
    C: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
    GATE: tl.constexpr, DELTA: tl.constexpr, NORMALIZE: tl.constexpr, READS: tl.constexpr, KEEP: tl.constexpr,
    PACKED: tl.constexpr, DT: tl.constexpr, PRECISION: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """Grid (slots, HV): one chunk of one value head. Registers: two [C, C]; q, k, v go by in [C, BK] and [C, BV]."""
    slot = tl.program_id(0)
    _, first, rows = find_chunk(slot, p_offsets, T, sequences, C, PACKED)
    if rows > 0:
        prepare_chunk(
            p_q, p_k, p_v, p_g, p_beta, p_P, p_X, p_kk, p_W, p_U, p_Kt, p_Qe, p_end,
            slot, first, rows, tl.program_id(1), scale, q_stride, k_stride, v_stride, g_stride, beta_stride,
            HV, GROUP, K, V, C, BK, BV, GATE, DELTA, NORMALIZE, READS, KEEP, DT, PRECISION, WIDE,
        )  # fmt: skip
