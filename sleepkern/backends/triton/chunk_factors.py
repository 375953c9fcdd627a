"""Stage 1: the factors of each chunk that do not depend on the state. No other stage knows the rule.

    M_ij = b_i k_i.k_j exp(G_i - G_j), i > j     P_ij = scale q_i.k_j exp(G_i - G_j), i >= j
    X = (I + M)^-1    U = X diag(b) V    W = X diag(b E) K    Kt = K exp(G_C - G)    Qe = scale Q E

Exponents are differences inside a chunk and never positive. The inverse is merged from smaller inverses, from single
rows on. A series would need powers, which overflow for correlated keys.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .chunk_factors_channel import BLOCK, channel_grams, on_diagonal
from .common import (
    CHANNEL,
    HEAD,
    exp_of,
    find_chunk,
    inverse_norms,
    last_row,
    load_tile,
    product,
    product_as,
    store_tile,
)
from .gates import channel_decay, head_decay, load_beta


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
    """(I + M)^-1 [C, C] of a strictly lower triangle M: inverses of pairs of blocks are merged, from single rows to C.

    Blocks of up to BLOCK rows on the diagonal are multiplied by themselves, as [BLOCK, BLOCK], and not as [C, C].
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
    """[C, C]: whether the row is in the second and the column in the first half of one block of 2^(level + 1) rows."""
    half = i >> level
    # mutant: blocks-merged-with-the-wrong-half
    return (half[:, None] == half[None, :] + 1) & ((half[None, :] & 1) == 0)


@triton.jit
def merge(X, L, PRECISION: tl.constexpr):
    """Inverses of blocks of twice the size from inverses X of blocks on the diagonal: X - X L X, L the tile between."""
    return X - product_as(product_as(X, L, tl.float32, PRECISION), X, tl.float32, PRECISION)


@triton.jit
def chunk_grams(
    inputs, factors, slot, first, rows, head, scale,
    BK: tl.constexpr, DIMS: tl.constexpr, FLAGS: tl.constexpr, DECAYS: tl.constexpr,
):  # fmt: skip
    """q k^T and k k^T with decay, [C, C] each (the latter counts below the diagonal); 1 / |k| [C]; G [C] of head decay.

    q, k and the decay of channels are loaded in [C, BK]. Kt, Qe and G_end of channel decay are stored.
    """
    HV: tl.constexpr = DIMS.HV
    K: tl.constexpr = DIMS.K
    C: tl.constexpr = DIMS.C
    at_rows = first * HV + head
    at_key = (head // DIMS.GROUP) * K
    p_k = inputs.k + first * inputs.k_stride + at_key
    G = 0.0
    q_norm = tl.full([C], 1.0, tl.float32)
    k_norm = tl.full([C], 1.0, tl.float32)
    if FLAGS.OUTPUT:
        p_q = inputs.q + first * inputs.q_stride + at_key
    if FLAGS.NORMALIZE:
        k_norm = inverse_norms(p_k, inputs.k_stride, rows, K, C, BK)
        if FLAGS.OUTPUT:
            q_norm = inverse_norms(p_q, inputs.q_stride, rows, K, C, BK)
    gram_qk = tl.zeros([C, C], tl.float32)
    gram_kk = tl.zeros([C, C], tl.float32)
    for col in range(0, K, BK):
        k = load_tile(p_k, inputs.k_stride, rows, col, K, C, BK)
        q = k
        if FLAGS.OUTPUT:
            q = load_tile(p_q, inputs.q_stride, rows, col, K, C, BK)
        if FLAGS.GATE == CHANNEL:
            q, k = q.to(tl.float32), k.to(tl.float32)
            G_columns = channel_decay(inputs, first, head, rows, col, K, C, BK, FLAGS)
            more_qk, more_kk = channel_grams(q, k, G_columns, C, BK, FLAGS)
            gram_qk += more_qk
            gram_kk += more_kk
            G_end = last_row(G_columns, C)
            key = col + tl.arange(0, BK)
            at_end = (slot.to(tl.int64) * HV + head) * K
            tl.store(factors.G_end + at_end + key, G_end.to(tl.float32), mask=key < K)
            Kt = k_norm[:, None] * k * exp_of(G_end[None, :] - G_columns)
            store_tile(factors.Kt + at_rows * K, HV * K, rows, col, Kt, K, C, BK)
            if FLAGS.OUTPUT:
                Qe = (scale * q_norm)[:, None] * q * exp_of(G_columns)
                store_tile(factors.Qe + at_rows * K, HV * K, rows, col, Qe, K, C, BK)
        else:
            if FLAGS.OUTPUT:
                gram_qk += product(q, tl.trans(k), FLAGS)
            if FLAGS.DELTA:
                gram_kk += product(k, tl.trans(k), FLAGS)
    if FLAGS.GATE != CHANNEL:
        if FLAGS.GATE == HEAD:
            G = head_decay(inputs, first, head, rows, C, FLAGS)
        D = head_differences(G, FLAGS.GATE, C)
        gram_qk *= D
        gram_kk *= D
    if FLAGS.NORMALIZE:
        gram_qk *= q_norm[:, None] * k_norm[None, :]
        gram_kk *= k_norm[:, None] * k_norm[None, :]
    if DECAYS:
        store_row_decays(factors, slot, first, rows, head, scale, q_norm, k_norm, G, DIMS, FLAGS)
    return gram_qk, gram_kk, k_norm, G


@triton.jit
def store_row_decays(
    factors, slot, first, rows, head, scale, q_norm, k_norm, G, DIMS: tl.constexpr, FLAGS: tl.constexpr
):  # fmt: skip
    """Store scale exp(G) / |q|, exp(G_C - G) / |k| and exp(G_C) of head decay or none, for the state passes."""
    i = tl.arange(0, DIMS.C)
    from_start = scale * q_norm
    to_end = k_norm
    chunk_decay = 1.0
    if FLAGS.GATE == HEAD:
        G_end = last_row(G, DIMS.C)
        from_start *= exp_of(G)
        # mutant: stored-decays-to-the-start
        to_end *= exp_of(G_end - G)
        chunk_decay = exp_of(G_end)
    at_rows = first * DIMS.HV + head + i * DIMS.HV
    tl.store(factors.from_start + at_rows, from_start, mask=i < rows)
    tl.store(factors.to_end + at_rows, to_end, mask=i < rows)
    tl.store(factors.chunk_decay + slot.to(tl.int64) * DIMS.HV + head, chunk_decay)


@triton.jit
def write_chunk_factors(
    inputs, factors, slot, first, rows, head, scale,
    BK: tl.constexpr, BV: tl.constexpr, DIMS: tl.constexpr, FLAGS: tl.constexpr,
    SAVE: tl.constexpr, DECAYS: tl.constexpr,
):  # fmt: skip
    """Store the factors of the chunk of a value head that starts at row `first`; X and kk only when SAVE."""
    HV: tl.constexpr = DIMS.HV
    K: tl.constexpr = DIMS.K
    V: tl.constexpr = DIMS.V
    C: tl.constexpr = DIMS.C
    at_rows = first * HV + head
    gram_qk, gram_kk, k_norm, G = chunk_grams(inputs, factors, slot, first, rows, head, scale, BK, DIMS, FLAGS, DECAYS)
    if FLAGS.OUTPUT:
        store_tile(factors.P + at_rows * C, HV * C, rows, 0, scale * gram_qk, C, C, C)
    if FLAGS.DELTA:
        p_k = inputs.k + first * inputs.k_stride + (head // DIMS.GROUP) * K
        p_v = inputs.v + first * inputs.v_stride + head * V
        b = load_beta(inputs, first, head, rows, C, FLAGS)
        PRECISION: tl.constexpr = FLAGS.PRECISION
        X = invert(b[:, None] * gram_kk, C, PRECISION)
        if SAVE:
            store_tile(factors.X + at_rows * C, HV * C, rows, 0, X, C, C, C)
            store_tile(factors.kk + at_rows * C, HV * C, rows, 0, gram_kk, C, C, C)
        b_norm = b * k_norm
        if FLAGS.GATE == HEAD:
            b_norm *= exp_of(G)
        for col in range(0, K, BK):
            k = b_norm[:, None] * load_tile(p_k, inputs.k_stride, rows, col, K, C, BK)
            if FLAGS.GATE == CHANNEL:
                k *= exp_of(channel_decay(inputs, first, head, rows, col, K, C, BK, FLAGS))
            store_tile(factors.W + at_rows * K, HV * K, rows, col, product(X, k, FLAGS), K, C, BK)
        for col in range(0, V, BV):
            v = load_tile(p_v, inputs.v_stride, rows, col, V, C, BV)
            store_tile(factors.U + at_rows * V, HV * V, rows, col, product(X, b[:, None] * v, FLAGS), V, C, BV)


@triton.jit(do_not_specialize=["sizes"])
def chunk_factors_kernel(
    inputs, factors, sizes,
    BK: tl.constexpr, BV: tl.constexpr, DIMS: tl.constexpr, FLAGS: tl.constexpr,
    SAVE: tl.constexpr, DECAYS: tl.constexpr,
):  # fmt: skip
    """P, W, U and their like (formulas: this file's head) of one chunk of one value head. Grid (slots, HV).

    Registers hold two tiles [C, C]; q and k are loaded in [C, BK], v in [C, BV].
    """
    slot = tl.program_id(0)
    first, rows = find_chunk(slot, inputs, sizes, DIMS.C, FLAGS.PACKED)
    if rows > 0:
        write_chunk_factors(
            inputs, factors, slot, first, rows, tl.program_id(1), sizes.scale, BK, BV, DIMS, FLAGS, SAVE, DECAYS
        )  # fmt: skip
