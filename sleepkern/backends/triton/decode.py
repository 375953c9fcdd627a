"""Decode: a few tokens, one after the other, on BV columns of the state in registers.

    S <- diag(a) S;   S <- S + b k (v - S^T k)^T  (without delta: + b k v^T);   o = scale S^T q

The bytes of the state, which are loaded once and stored once, bound the time. Products are sums over registers. The
final state may be the initial one, which is then updated in place. States are float32, or bfloat16 in memory: between
tokens they stay float32, and a store rounds to nearest. They may be stored in a pool, and a call may store the state
after each token in place of the final one (`DecodeStates`).
"""

from __future__ import annotations

import triton
import triton.language as tl

from .common import CHANNEL, HEAD, NORM_EPS, find_columns, load_tile, store_tile
from .gates import token_beta, token_channel_decays, token_decay


@triton.jit
def head_row(p, WIDTH: tl.constexpr, N: tl.constexpr, col, NORMALIZE: tl.constexpr):
    """[N] elements of one head, from column col on, as float32; scaled to length 1 when NORMALIZE."""
    j = col + tl.arange(0, N)
    x = tl.load(p + j, mask=j < WIDTH, other=0.0).to(tl.float32)
    if NORMALIZE:
        x *= 1.0 / tl.sqrt(tl.sum(x * x, 0) + NORM_EPS)
    return x


@triton.jit
def start_of(pool, sequence, head, K: tl.constexpr):
    """A sequence's state in the pool: (offset of its elements, their rows, 0 for a padded row)."""
    index = sequence.to(tl.int64)
    if pool.indices is not None:
        index = tl.load(pool.indices + sequence)
    # mutant: padded-rows-are-read
    return index * pool.stride + head * pool.head_stride, tl.where(index < 0, 0, K)


@triton.jit
def store_after_token(pool, S, sequence, token, tokens, head, keys, col, BV: tl.constexpr, DIMS: tl.constexpr):
    """Store S [KP, BV] as the state after a token."""
    p_out = pool.out + head * pool.out_head_stride
    if pool.out_indices is not None:
        # mutant: state-of-another-token
        index = tl.load(pool.out_indices + sequence.to(tl.int64) * tokens + token)
        p_out += index * pool.out_stride
        keys = tl.where(index < 0, 0, keys)
    else:
        p_out += sequence.to(tl.int64) * pool.out_stride + token * pool.out_token_stride
    store_tile(p_out, DIMS.V, keys, col, S, DIMS.V, DIMS.KP, BV)


@triton.jit(do_not_specialize=["sizes"])
def decode_kernel(
    inputs, states, sizes, pool, BV: tl.constexpr, DIMS: tl.constexpr, FLAGS: tl.constexpr, HAS_STATE: tl.constexpr,
    POOL: tl.constexpr, AFTER_EACH: tl.constexpr,
):  # fmt: skip
    """T tokens of one bh, value columns BV at a time. Grid (B * HV * cdiv(V, BV),).

    Registers hold S [KP, BV] in float32; a token loads k and q [KP] and v [BV]. pool: a DecodeStates where POOL,
    else sequence n has the n-th of contiguous states. AFTER_EACH: the state after each token is stored, not the final
    one.
    """
    K: tl.constexpr = DIMS.K
    V: tl.constexpr = DIMS.V
    KP: tl.constexpr = DIMS.KP
    bh, col = find_columns(V, BV)
    head = bh % DIMS.HV
    row = (bh // DIMS.HV).to(tl.int64) * sizes.T
    at_key = (head // DIMS.GROUP) * K
    at_state = bh.to(tl.int64) * K * V
    keys = K
    if POOL:  # not `pool is not None`: Triton 3.6 compares no group that holds a None
        at_state, keys = start_of(pool, bh // DIMS.HV, head, K)
    S = tl.zeros([KP, BV], tl.float32)
    if HAS_STATE:
        S = load_tile(states.initial + at_state, V, keys, col, V, KP, BV).to(tl.float32)
    for token in range(sizes.T):
        k = head_row(inputs.k + row * inputs.k_stride + at_key, K, KP, 0, FLAGS.NORMALIZE)
        v = head_row(inputs.v + row * inputs.v_stride + head * V, V, BV, col, False)
        if FLAGS.GATE == HEAD:
            # mutant: decode-without-decay
            S *= tl.exp(token_decay(inputs, row, head, FLAGS))
        if FLAGS.GATE == CHANNEL:
            S *= tl.exp(token_channel_decays(inputs, row, head, K, KP, FLAGS))[:, None]
        if FLAGS.DELTA:
            v -= tl.sum(k[:, None] * S, 0)
        if FLAGS.HAS_BETA:
            v *= token_beta(inputs, row, head, FLAGS)
        S += k[:, None] * v[None, :]
        if FLAGS.OUTPUT:
            q = head_row(inputs.q + row * inputs.q_stride + at_key, K, KP, 0, FLAGS.NORMALIZE)
            o = sizes.scale * tl.sum(q[:, None] * S, 0)
            if POOL:
                o = tl.where(keys > 0, o, 0.0)
            j = col + tl.arange(0, BV)
            tl.store(states.o + (row * DIMS.HV + head) * V + j, o.to(states.o.dtype.element_ty), mask=j < V)
        if AFTER_EACH:
            store_after_token(pool, S, bh // DIMS.HV, token, sizes.T, head, keys, col, BV, DIMS)
        row += 1
    if not AFTER_EACH:
        # mutant: bfloat16-states-are-cut-off
        store_tile(states.final + at_state, V, keys, col, S, V, KP, BV)
