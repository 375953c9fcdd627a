"""Channel decay inside a chunk, where exp(G_i - G_j) differs from key channel to key channel.

The dyadic form takes it apart with no exponent above 0: at each level rows stand in pairs of halves of 2^level rows, R
is the last row of a pair's lower half, and exp(G_i - G_j) = exp(G_i - R) exp(R - G_j) for i in the upper half, j in the
lower. Levels inside BLOCK rows work on blocks [B, R, ...] of the diagonal, B = C / BLOCK and R = BLOCK, whose products
are small; levels above work on one block, the chunk. A level is an iteration of a loop, because a compiler that
unrolls the loop keeps the tiles of all levels alive at once.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .common import exp_of, product_as

BLOCK = tl.constexpr(16)
BLOCK_LEVELS = tl.constexpr(4)


@triton.jit
def channel_grams(q, k, G, C: tl.constexpr, BK: tl.constexpr, FLAGS: tl.constexpr):
    """(qk with its diagonal, kk without): lower triangles [C, C] of sum_d x_id k_jd exp(G_id - G_jd), BK channels."""
    LEVELS: tl.constexpr = 4 + C // 32 - C // 128
    B: tl.constexpr = C // BLOCK
    i = tl.arange(0, BLOCK)
    q_blocks = tl.reshape(q, [B, BLOCK, BK])
    k_blocks = tl.reshape(k, [B, BLOCK, BK])
    qk, kk = gram_levels(q_blocks, k_blocks, tl.reshape(G, [B, BLOCK, BK]), 0, BLOCK_LEVELS, B, BLOCK, BK, FLAGS)
    if FLAGS.OUTPUT:
        qk += tl.where((i[:, None] == i[None, :])[None], tl.sum(q_blocks * k_blocks, 2)[:, :, None], 0.0)
    qk = on_diagonal(qk, C)
    kk = on_diagonal(kk, C)
    if C > BLOCK:
        more_qk, more_kk = gram_levels(q[None], k[None], G[None], BLOCK_LEVELS, LEVELS, 1, C, BK, FLAGS)
        qk += tl.reshape(more_qk, [C, C])
        kk += tl.reshape(more_kk, [C, C])
    return qk, kk


@triton.jit
def gram_levels(
    q, k, G, first, last, B: tl.constexpr, R: tl.constexpr, BK: tl.constexpr, FLAGS: tl.constexpr
):  # fmt: skip
    """qk and kk [B, R, R] of the levels from first to before last; q, k, G [B, R, BK]."""
    qk = tl.zeros([B, R, R], tl.float32)
    kk = tl.zeros([B, R, R], tl.float32)
    for level in range(first, last):
        e, upper, paired, _ = level_decay(G, level, B, R, BK)
        y = tl.permute(tl.where(upper, 0.0, k * e), (0, 2, 1))
        if FLAGS.OUTPUT:
            qk += tl.where(paired, block_product(tl.where(upper, q * e, 0.0), y, FLAGS), 0.0)
        if FLAGS.DELTA:
            kk += tl.where(paired, block_product(tl.where(upper, k * e, 0.0), y, FLAGS), 0.0)
    return qk, kk


@triton.jit
def channel_gradients(
    q, k, G, b, factors, at, stride, rows, C: tl.constexpr, BK: tl.constexpr, FLAGS: tl.constexpr
):  # fmt: skip
    """The sums inside the chunk for dq, dk and dg, [C, BK] each. dP and dM are loaded from factors.P and
    factors.X, where value_columns has stored them, at offset `at`.

    The levels above BLOCK continue the sums of the levels inside BLOCK: two sets of sums would not fit in registers.
    """
    LEVELS: tl.constexpr = 4 + C // 32 - C // 128
    B: tl.constexpr = C // BLOCK
    zero = tl.zeros([B, BLOCK, BK], tl.float32)
    dq, dk, dg = gradient_levels(
        tl.reshape(q, [B, BLOCK, BK]), tl.reshape(k, [B, BLOCK, BK]), tl.reshape(G, [B, BLOCK, BK]),
        tl.reshape(b, [B, BLOCK]), zero, zero, zero, factors, at, stride, rows, 0, BLOCK_LEVELS,
        B, BLOCK, BK, FLAGS,
    )  # fmt: skip
    dq = tl.reshape(dq, [C, BK])
    dk = tl.reshape(dk, [C, BK])
    dg = tl.reshape(dg, [C, BK])
    if C > BLOCK:
        dq, dk, dg = gradient_levels(
            q[None], k[None], G[None], b[None], dq[None], dk[None], dg[None], factors, at, stride, rows,
            BLOCK_LEVELS, LEVELS, 1, C, BK, FLAGS,
        )  # fmt: skip
        dq = tl.reshape(dq, [C, BK])
        dk = tl.reshape(dk, [C, BK])
        dg = tl.reshape(dg, [C, BK])
    if FLAGS.OUTPUT:
        i = tl.arange(0, C)
        diagonal = tl.load(factors.P + at + i * (stride + 1), mask=i < rows, other=0.0).to(tl.float32)[:, None]
        dq += diagonal * k
        dk += diagonal * q
    return dq, dk, dg


@triton.jit
def gradient_levels(
    q, k, G, b, dq, dk, dg, factors, at, stride, rows, first, last,
    B: tl.constexpr, R: tl.constexpr, BK: tl.constexpr, FLAGS: tl.constexpr,
):  # fmt: skip
    """dq, dk and dg [B, R, BK] with the levels from first to before last added.

    A pair of a level is a row i of an upper half and a row j of a lower half. The decay of a row t of the upper half
    scales the pairs with i >= t, the decay of a row t of the lower half the pairs with j < t: dg_t sums the terms of
    these pairs.
    """
    PRECISION: tl.constexpr = FLAGS.PRECISION
    for level in range(first, last):
        e, upper, paired, paired_transposed = level_decay(G, level, B, R, BK)
        ex = tl.where(upper, e, 0.0)
        ey = tl.where(upper, 0.0, e)
        terms = tl.zeros([B, R, BK], tl.float32)
        if FLAGS.OUTPUT:
            dP = tl.where(paired, load_blocks(factors.P + at, stride, rows, B, R, False), 0.0)
            of_q = ex * block_product(dP, k * ey, FLAGS)
            dq += of_q
            terms += q * of_q
            dP_transposed = tl.where(paired_transposed, load_blocks(factors.P + at, stride, rows, B, R, True), 0.0)
            of_k = ey * block_product(dP_transposed, q * ex, FLAGS)
            dk += of_k
            terms += k * of_k
        if FLAGS.DELTA:
            dM = tl.where(paired, load_blocks(factors.X + at, stride, rows, B, R, False), 0.0)
            of_row = b[:, :, None] * (ex * block_product(dM, k * ey, FLAGS))
            dk += of_row
            terms += k * of_row
            dM_transposed = tl.where(
                paired_transposed, load_blocks(factors.X + at, stride, rows, B, R, True) * b[:, None, :], 0.0
            )
            of_k = ey * block_product(dM_transposed, k * ex, FLAGS)
            dk += of_k
            terms += k * of_k
        scaled = tl.broadcast_to(scaled_by_row(level, R), [B, R, R])
        dg += block_product_as(scaled, terms, tl.float32, PRECISION)
    return dq, dk, dg


@triton.jit
def scaled_by_row(level, R: tl.constexpr):
    """[1, R, R], row t, column s: 1 where the decay of t scales the terms of the pairs of s, else 0.

    t and s are rows of the same half of one level.
    """
    i = tl.arange(0, R)
    half = i >> level
    upper = (half & 1) == 1
    # mutant: pairs-of-the-wrong-rows
    from_row_on = i[None, :] >= i[:, None]
    counts = (half[:, None] == half[None, :]) & (from_row_on == upper[:, None])
    return tl.where(counts, 1.0, 0.0)[None]


@triton.jit
def level_decay(G, level, B: tl.constexpr, R: tl.constexpr, BK: tl.constexpr):
    """The factors of one level and their places.

    Returns exp(-|G - R|) [B, R, BK], which is exp(G_i - R) in upper halves and exp(R - G_j) in lower halves; whether a
    row is in an upper half [1, R, 1]; whether (i, j) are in the upper and lower half of one pair [1, R, R]; the
    transpose of the latter.
    """
    i = tl.arange(0, R)
    half = i >> level
    # mutant: levels-of-the-wrong-row
    last = ((half | 1) << level) - 1
    border = tl.gather(G, tl.broadcast_to(last[None, :, None], [B, R, BK]), 1)
    upper = (half & 1) == 1
    paired = (half[:, None] == half[None, :] + 1) & upper[:, None]
    paired_transposed = (half[:, None] + 1 == half[None, :]) & upper[None, :]
    return exp_of(-tl.abs(G - border)), upper[None, :, None], paired[None], paired_transposed[None]


@triton.jit
def block_product(a, b, FLAGS: tl.constexpr):
    """a @ b of each block, in the precision of the call."""
    PRECISION: tl.constexpr = FLAGS.PRECISION
    return block_product_as(a, b, FLAGS.DT, PRECISION)


@triton.jit
def block_product_as(a, b, DT: tl.constexpr, PRECISION: tl.constexpr):
    """a @ b of each block. Each warp takes one block, so a single block is multiplied as a plain matrix."""
    if a.shape[0] == 1:
        c = product_as(
            tl.reshape(a, [a.shape[1], a.shape[2]]), tl.reshape(b, [b.shape[1], b.shape[2]]), DT, PRECISION
        )  # fmt: skip
        return c[None]
    return product_as(a, b, DT, PRECISION)


@triton.jit
def load_blocks(p, stride, rows, B: tl.constexpr, R: tl.constexpr, TRANSPOSED: tl.constexpr):
    """Blocks [B, R, R] on the diagonal of a row-major matrix, each transposed if TRANSPOSED; 0 beyond `rows` rows."""
    at = tl.arange(0, B)[:, None, None] * R
    i = tl.arange(0, R)[None, :, None]
    j = tl.arange(0, R)[None, None, :]
    if TRANSPOSED:
        return tl.load(p + (at + j) * stride + at + i, mask=at + j < rows, other=0.0)
    return tl.load(p + (at + i) * stride + at + j, mask=at + i < rows, other=0.0)


@triton.jit
def on_diagonal(blocks, C: tl.constexpr):
    """[C, C] of blocks [C / BLOCK, BLOCK, BLOCK], 0 elsewhere."""
    block = tl.arange(0, C // BLOCK)
    same = block[:, None, None, None] == block[None, None, :, None]
    return tl.reshape(tl.where(same, blocks[:, :, None, :], 0.0), [C, C])
