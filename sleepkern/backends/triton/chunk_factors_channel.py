"""Channel decay inside a chunk, where exp(G_i - G_j) is a number of its own for each key channel.

The dyadic form takes it apart with no exponent above 0: at each level rows stand in pairs of halves of 2^level rows, R
is the last row of a pair's lower half, and exp(G_i - G_j) = exp(G_i - R) exp(R - G_j) for i in the upper half, j in the
lower. Levels inside BLOCK rows work on blocks [B, R, ...] of the diagonal, B = C / BLOCK and R = BLOCK, whose products
are small; those above on one block, the chunk. A level is a turn of a loop: unrolled, all levels are alive at once.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .common import exp_of, product

BLOCK = tl.constexpr(16)
BLOCK_LEVELS = tl.constexpr(4)


@triton.jit
def channel_scores(
    q, k, G, READS: tl.constexpr, DELTA: tl.constexpr, C: tl.constexpr, BK: tl.constexpr, DT: tl.constexpr, PRECISION
):  # fmt: skip
    """(qk with its diagonal, kk without): lower triangles [C, C] of sum_d x_id k_jd exp(G_id - G_jd), BK channels."""
    LEVELS: tl.constexpr = 4 + C // 32 - C // 128
    B: tl.constexpr = C // BLOCK
    i = tl.arange(0, BLOCK)
    q_blocks = tl.reshape(q, [B, BLOCK, BK])
    k_blocks = tl.reshape(k, [B, BLOCK, BK])
    qk, kk = score_levels(
        q_blocks, k_blocks, tl.reshape(G, [B, BLOCK, BK]), 0, BLOCK_LEVELS, B, BLOCK, BK, READS, DELTA, DT, PRECISION
    )
    if READS:
        qk += tl.where((i[:, None] == i[None, :])[None], tl.sum(q_blocks * k_blocks, 2)[:, :, None], 0.0)
    qk = on_diagonal(qk, C)
    kk = on_diagonal(kk, C)
    if C > BLOCK:
        more_qk, more_kk = score_levels(
            q[None], k[None], G[None], BLOCK_LEVELS, LEVELS, 1, C, BK, READS, DELTA, DT, PRECISION
        )
        qk += tl.reshape(more_qk, [C, C])
        kk += tl.reshape(more_kk, [C, C])
    return qk, kk


@triton.jit
def score_levels(
    q, k, G, first, last, B: tl.constexpr, R: tl.constexpr, BK: tl.constexpr,
    READS: tl.constexpr, DELTA: tl.constexpr, DT: tl.constexpr, PRECISION,
):  # fmt: skip
    """qk and kk [B, R, R] of the levels from first to before last; q, k, G [B, R, BK]."""
    qk = tl.zeros([B, R, R], tl.float32)
    kk = tl.zeros([B, R, R], tl.float32)
    for level in range(first, last):
        e, upper, pair, _ = level_decay(G, level, B, R, BK)
        y = tl.permute(tl.where(upper, 0.0, k * e), (0, 2, 1))
        if READS:
            qk += tl.where(pair, block_product(tl.where(upper, q * e, 0.0), y, DT, PRECISION), 0.0)
        if DELTA:
            kk += tl.where(pair, block_product(tl.where(upper, k * e, 0.0), y, DT, PRECISION), 0.0)
    return qk, kk


@triton.jit
def channel_gradients(
    q, k, G, b, p_P, p_X, stride, rows, C: tl.constexpr, BK: tl.constexpr,
    DELTA: tl.constexpr, READS: tl.constexpr, DT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The sums inside the chunk: those of dq, of dk and of dg, [C, BK] each; dP and dM lie at p_P and p_X.

    The levels above BLOCK go on from what those inside it have summed: two sets of sums would not fit in registers.
    """
    LEVELS: tl.constexpr = 4 + C // 32 - C // 128
    B: tl.constexpr = C // BLOCK
    zero = tl.zeros([B, BLOCK, BK], tl.float32)
    dq, dk, dg = gradient_levels(
        tl.reshape(q, [B, BLOCK, BK]), tl.reshape(k, [B, BLOCK, BK]), tl.reshape(G, [B, BLOCK, BK]),
        tl.reshape(b, [B, BLOCK]), zero, zero, zero, p_P, p_X, stride, rows, 0, BLOCK_LEVELS,
        B, BLOCK, BK, DELTA, READS, DT, PRECISION,
    )  # fmt: skip
    dq = tl.reshape(dq, [C, BK])
    dk = tl.reshape(dk, [C, BK])
    dg = tl.reshape(dg, [C, BK])
    if C > BLOCK:
        dq, dk, dg = gradient_levels(
            q[None], k[None], G[None], b[None], dq[None], dk[None], dg[None], p_P, p_X, stride, rows,
            BLOCK_LEVELS, LEVELS, 1, C, BK, DELTA, READS, DT, PRECISION,
        )  # fmt: skip
        dq = tl.reshape(dq, [C, BK])
        dk = tl.reshape(dk, [C, BK])
        dg = tl.reshape(dg, [C, BK])
    if READS:
        i = tl.arange(0, C)
        diagonal = tl.load(p_P + i * (stride + 1), mask=i < rows, other=0.0).to(tl.float32)[:, None]
        dq += diagonal * k
        dk += diagonal * q
    return dq, dk, dg


@triton.jit
def gradient_levels(
    q, k, G, b, dq, dk, dg, p_P, p_X, stride, rows, first, last, B: tl.constexpr, R: tl.constexpr, BK: tl.constexpr,
    DELTA: tl.constexpr, READS: tl.constexpr, DT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dq, dk and dg [B, R, BK] with the levels from first to before last added.

    All pairs of a level are of an upper half's row i and a lower half's row j. At a row t of the upper half those of
    rows from t on decay, at one of the lower half those of rows before t: dg takes the sum of what they give.
    """
    for level in range(first, last):
        e, upper, pair, turned = level_decay(G, level, B, R, BK)
        ex = tl.where(upper, e, 0.0)
        ey = tl.where(upper, 0.0, e)
        gains = tl.zeros([B, R, BK], tl.float32)
        if READS:
            dP = tl.where(pair, load_blocks(p_P, stride, rows, B, R, False), 0.0)
            of_q = ex * block_product(dP, k * ey, DT, PRECISION)
            dq += of_q
            gains += q * of_q
            dP_turned = tl.where(turned, load_blocks(p_P, stride, rows, B, R, True), 0.0)
            of_k = ey * block_product(dP_turned, q * ex, DT, PRECISION)
            dk += of_k
            gains += k * of_k
        if DELTA:
            dM = tl.where(pair, load_blocks(p_X, stride, rows, B, R, False), 0.0)
            of_row = b[:, :, None] * (ex * block_product(dM, k * ey, DT, PRECISION))
            dk += of_row
            gains += k * of_row
            dM_turned = tl.where(turned, load_blocks(p_X, stride, rows, B, R, True) * b[:, None, :], 0.0)
            of_k = ey * block_product(dM_turned, k * ex, DT, PRECISION)
            dk += of_k
            gains += k * of_k
        dg += block_product(tl.broadcast_to(crossing(level, R), [B, R, R]), gains, tl.float32, PRECISION)
    return dq, dk, dg


@triton.jit
def crossing(level, R: tl.constexpr):
    """[1, R, R]: 1 where what pairs give row s of a half of one level, column, decays at row t of it, row, else 0."""
    i = tl.arange(0, R)
    half = i >> level
    upper = (half & 1) == 1
    # mutant: pairs-of-the-wrong-rows
    behind = i[None, :] >= i[:, None]
    counts = (half[:, None] == half[None, :]) & (behind == upper[:, None])
    return tl.where(counts, 1.0, 0.0)[None]


@triton.jit
def level_decay(G, level, B: tl.constexpr, R: tl.constexpr, BK: tl.constexpr):
    """exp(-|G - R|) [B, R, BK] of one level, which is exp(G_i - R) in upper halves and exp(R - G_j) in lower ones;

    whether a row is in an upper half [1, R, 1]; whether (i, j) are the upper and lower half of one pair [1, R, R]; the
    same of (j, i).
    """
    i = tl.arange(0, R)
    half = i >> level
    # mutant: levels-of-the-wrong-row
    last = ((half | 1) << level) - 1
    border = tl.gather(G, tl.broadcast_to(last[None, :, None], [B, R, BK]), 1)
    upper = (half & 1) == 1
    pair = (half[:, None] == half[None, :] + 1) & upper[:, None]
    turned = (half[:, None] + 1 == half[None, :]) & upper[None, :]
    return exp_of(-tl.abs(G - border)), upper[None, :, None], pair[None], turned[None]


@triton.jit
def block_product(a, b, DT: tl.constexpr, PRECISION: tl.constexpr):
    """a @ b of each block. Warps take a block each, so one block alone is multiplied as a plain matrix."""
    if a.shape[0] == 1:
        c = product(
            tl.reshape(a, [a.shape[1], a.shape[2]]), tl.reshape(b, [b.shape[1], b.shape[2]]), DT, PRECISION
        )  # fmt: skip
        return c[None]
    return product(a, b, DT, PRECISION)


@triton.jit
def load_blocks(p, stride, rows, B: tl.constexpr, R: tl.constexpr, TURNED: tl.constexpr):
    """Blocks [B, R, R] on the diagonal of a row-major matrix, each turned if TURNED; 0 beyond `rows` rows."""
    at = tl.arange(0, B)[:, None, None] * R
    i = tl.arange(0, R)[None, :, None]
    j = tl.arange(0, R)[None, None, :]
    if TURNED:
        return tl.load(p + (at + j) * stride + at + i, mask=at + j < rows, other=0.0)
    return tl.load(p + (at + i) * stride + at + j, mask=at + i < rows, other=0.0)


@triton.jit
def on_diagonal(blocks, C: tl.constexpr):
    """[C, C] of blocks [C / BLOCK, BLOCK, BLOCK], 0 elsewhere."""
    block = tl.arange(0, C // BLOCK)
    same = block[:, None, None, None] == block[None, None, :, None]
    return tl.reshape(tl.where(same, blocks[:, :, None, :], 0.0), [C, C])
