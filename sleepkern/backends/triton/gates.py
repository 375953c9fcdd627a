"""Log decays and beta as every stage loads them: as they are, or made of raw projections where the call says so.

    x = raw g + dt_bias;   g = -exp(A_log) softplus(x), or with a lower bound L:  g = L sigmoid(exp(A_log) x)
    beta = BETA_SCALE sigmoid(raw beta)

backends/torch_gates.py is the definition. Each stage makes the gates anew, because they are a few operations on values
that it loads anyhow, and made gates would cross memory. The chunk backward takes gradients to the raw values and stores
the chunk's sums for A_log and dt_bias, which torch adds up over the chunks.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .common import MIN_LOG_DECAY, load_row_values, load_tile


@triton.jit
def sigmoid(x):
    """1 / (1 + exp(-x)) without overflow."""
    e = tl.exp(-tl.abs(x))
    return tl.where(x >= 0, 1.0, e) / (1.0 + e)


@triton.jit
def softplus(x):
    """max(x, 0) + log(1 + exp(-|x|)); the logarithm is 2 artanh(s) by its series, right also where it is tiny."""
    e = tl.exp(-tl.abs(x))
    s = e / (2.0 + e)
    z = s * s
    y = 1.0 / 11.0 + z * (1.0 / 13.0)
    y = 1.0 / 9.0 + z * y
    y = 1.0 / 7.0 + z * y
    y = 1.0 / 5.0 + z * y
    y = 1.0 / 3.0 + z * y
    return tl.maximum(x, 0.0) + 2.0 * s * (1.0 + z * y)


@triton.jit
def log_decay(x, rate, FLAGS: tl.constexpr):
    """The log decay that x gives."""
    if FLAGS.BOUND != 0.0:
        return FLAGS.BOUND * sigmoid(rate * x)
    # mutant: raw-decay-without-rate
    return -rate * softplus(x)


@triton.jit
def slopes(x, rate, FLAGS: tl.constexpr):
    """The derivatives of log_decay in x and in A_log."""
    if FLAGS.BOUND != 0.0:
        slope = FLAGS.BOUND * rate * sigmoid(rate * x) * sigmoid(-rate * x)
        return slope, slope * x
    return -rate * sigmoid(x), -rate * softplus(x)


@triton.jit
def rate_of(inputs, head):
    """exp(A_log) of a head; 1 where there is no A_log."""
    rate = 1.0
    if inputs.A_log is not None:
        rate = tl.exp(tl.load(inputs.A_log + head))
    return rate


@triton.jit
def raw_head_gates(inputs, first, head, rows, C: tl.constexpr):
    """x [C] of a head with one decay."""
    x = load_row_values(inputs.g + first * inputs.g_stride + head, inputs.g_stride, rows, C)
    if inputs.dt_bias is not None:
        x += tl.load(inputs.dt_bias + head)
    return x


@triton.jit
def raw_channel_gates(inputs, first, head, rows, col, K: tl.constexpr, C: tl.constexpr, BK: tl.constexpr):
    """x [C, BK] of a head's key channels from col on."""
    p_g = inputs.g + first * inputs.g_stride + head * K
    x = load_tile(p_g, inputs.g_stride, rows, col, K, C, BK).to(tl.float32)
    if inputs.dt_bias is not None:
        key = col + tl.arange(0, BK)
        x += tl.load(inputs.dt_bias + head * K + key, mask=key < K, other=0.0)[None, :]
    return x


@triton.jit
def head_decay(inputs, first, head, rows, C: tl.constexpr, FLAGS: tl.constexpr):
    """G [C], the running sum of one log decay a row; rows beyond the end do not decay.

    G is float64 when WIDE, because differences of G are small where G is large.
    """
    if FLAGS.RAW:
        g = log_decay(raw_head_gates(inputs, first, head, rows, C), rate_of(inputs, head), FLAGS)
        g = tl.where(tl.arange(0, C) < rows, g, 0.0)
    else:
        g = load_row_values(inputs.g + first * inputs.g_stride + head, inputs.g_stride, rows, C)
    # mutant: minus-infinity-as-it-is
    g = tl.maximum(g, MIN_LOG_DECAY)
    if FLAGS.WIDE:
        g = g.to(tl.float64)
    return tl.cumsum(g, 0)


@triton.jit
def channel_decay(
    inputs, first, head, rows, col, K: tl.constexpr, C: tl.constexpr, BK: tl.constexpr, FLAGS: tl.constexpr
):  # fmt: skip
    """G [C, BK], the running sum of one log decay a row and key channel from col on; float64 when WIDE."""
    if FLAGS.RAW:
        x = raw_channel_gates(inputs, first, head, rows, col, K, C, BK)
        inside = (tl.arange(0, C) < rows)[:, None] & (col + tl.arange(0, BK) < K)[None, :]
        g = tl.where(inside, log_decay(x, rate_of(inputs, head), FLAGS), 0.0)
    else:
        p_g = inputs.g + first * inputs.g_stride + head * K
        g = load_tile(p_g, inputs.g_stride, rows, col, K, C, BK).to(tl.float32)
    g = tl.maximum(g, MIN_LOG_DECAY)
    if FLAGS.WIDE:
        g = g.to(tl.float64)
    return tl.cumsum(g, 0)


@triton.jit
def load_beta(inputs, first, head, rows, C: tl.constexpr, FLAGS: tl.constexpr):
    """beta [C], 0 beyond `rows`."""
    b = load_row_values(inputs.beta + first * inputs.beta_stride + head, inputs.beta_stride, rows, C)
    if FLAGS.BETA_SCALE != 0.0:
        b = tl.where(tl.arange(0, C) < rows, FLAGS.BETA_SCALE * sigmoid(b), 0.0)
    return b


@triton.jit
def token_beta(inputs, row, head, FLAGS: tl.constexpr):
    """beta of one token."""
    b = tl.load(inputs.beta + row * inputs.beta_stride + head).to(tl.float32)
    if FLAGS.BETA_SCALE != 0.0:
        b = FLAGS.BETA_SCALE * sigmoid(b)
    return b


@triton.jit
def token_decay(inputs, row, head, FLAGS: tl.constexpr):
    """The log decay of one token of a head with one decay."""
    g = tl.load(inputs.g + row * inputs.g_stride + head).to(tl.float32)
    if FLAGS.RAW:
        if inputs.dt_bias is not None:
            g += tl.load(inputs.dt_bias + head)
        g = log_decay(g, rate_of(inputs, head), FLAGS)
    return tl.maximum(g, MIN_LOG_DECAY)


@triton.jit
def token_channel_decays(inputs, row, head, K: tl.constexpr, KP: tl.constexpr, FLAGS: tl.constexpr):
    """The log decays [KP] of one token of a head, one a key channel; 0 beyond K."""
    key = tl.arange(0, KP)
    g = tl.load(inputs.g + row * inputs.g_stride + head * K + key, mask=key < K, other=0.0).to(tl.float32)
    if FLAGS.RAW:
        if inputs.dt_bias is not None:
            g += tl.load(inputs.dt_bias + head * K + key, mask=key < K, other=0.0)
        g = tl.where(key < K, log_decay(g, rate_of(inputs, head), FLAGS), 0.0)
    return tl.maximum(g, MIN_LOG_DECAY)


@triton.jit
def beta_gradient(inputs, dbeta, first, head, rows, C: tl.constexpr, FLAGS: tl.constexpr):
    """The gradient [C] of beta as the call gives it."""
    if FLAGS.BETA_SCALE != 0.0:
        b = load_row_values(inputs.beta + first * inputs.beta_stride + head, inputs.beta_stride, rows, C)
        dbeta *= FLAGS.BETA_SCALE * sigmoid(b) * sigmoid(-b)
    return dbeta


@triton.jit
def head_gradient(inputs, grads, dg, slot, first, head, rows, DIMS: tl.constexpr, FLAGS: tl.constexpr):
    """The gradient [C] of g as the call gives it. Stores the chunk's sums for A_log and dt_bias of a raw one."""
    C: tl.constexpr = DIMS.C
    if FLAGS.RAW:
        x = raw_head_gates(inputs, first, head, rows, C)
        of_x, of_rate = slopes(x, rate_of(inputs, head), FLAGS)
        dg = tl.where(tl.arange(0, C) < rows, dg, 0.0)
        at = slot.to(tl.int64) * DIMS.HV + head
        tl.store(grads.dA_log + at, tl.sum(dg * of_rate, 0))
        # mutant: raw-gate-gradient-as-it-is
        dg *= of_x
        tl.store(grads.ddt_bias + at, tl.sum(dg, 0))
    return dg


@triton.jit
def channel_gradient(
    inputs, grads, dg, slot, first, head, rows, col, BK: tl.constexpr, DIMS: tl.constexpr, FLAGS: tl.constexpr
):  # fmt: skip
    """The same for dg [C, BK] of key channels from col on; A_log has a sum for each channel."""
    K: tl.constexpr = DIMS.K
    C: tl.constexpr = DIMS.C
    if FLAGS.RAW:
        x = raw_channel_gates(inputs, first, head, rows, col, K, C, BK)
        of_x, of_rate = slopes(x, rate_of(inputs, head), FLAGS)
        dg = tl.where((tl.arange(0, C) < rows)[:, None], dg, 0.0)
        key = col + tl.arange(0, BK)
        at = (slot.to(tl.int64) * DIMS.HV + head) * K + key
        tl.store(grads.dA_log + at, tl.sum(dg * of_rate, 0), mask=key < K)
        dg *= of_x
        tl.store(grads.ddt_bias + at, tl.sum(dg, 0), mask=key < K)
    return dg
