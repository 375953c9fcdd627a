"""Decode: a few tokens, one after the other, on BV columns of the state in registers; in place where final is state.

    S <- diag(a) S;   S <- S + b k (v - S^T k)^T  (without delta: + b k v^T);   o = scale S^T q

Bound by the bytes of the state, which are read once and written once; products are sums over registers.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .common import CHANNEL, FORGET, HEAD, NORM_EPS, find_columns, load_tile, store_tile


@triton.jit
def head_row(p, WIDTH: tl.constexpr, N: tl.constexpr, col, NORMALIZE: tl.constexpr):
    """[N] numbers of one head, from column col on, as float32; of length 1 when NORMALIZE."""
    j = col + tl.arange(0, N)
    x = tl.load(p + j, mask=j < WIDTH, other=0.0).to(tl.float32)
    if NORMALIZE:
        x *= 1.0 / tl.sqrt(tl.sum(x * x, 0) + NORM_EPS)
    return x


@triton.jit(do_not_specialize=["T"])
def step_kernel(
    p_q, p_k, p_v, p_g, p_beta,  # q, k [B,T,H,K]  v [B,T,HV,V]  g, beta: rules.py
    p_state, p_o, p_final,  # state, final [B,HV,K,V] float32  o [B,T,HV,V]
    T, scale, q_stride, k_stride, v_stride, g_stride, beta_stride,
    HV: tl.constexpr, GROUP: tl.constexpr, K: tl.constexpr, V: tl.constexpr, KP: tl.constexpr, BV: tl.constexpr,
    GATE: tl.constexpr, DELTA: tl.constexpr, HAS_BETA: tl.constexpr, NORMALIZE: tl.constexpr, READS: tl.constexpr,
    HAS_STATE: tl.constexpr,
):  # fmt: skip
    """Grid (B * HV * cdiv(V, BV),). Registers: S [KP, BV] float32."""
    lane, col = find_columns(V, BV)
    head = lane % HV
    row = (lane // HV).to(tl.int64) * T
    at_key = (head // GROUP) * K
    at_state = lane.to(tl.int64) * K * V
    S = tl.zeros([KP, BV], tl.float32)
    if HAS_STATE:
        S = load_tile(p_state + at_state, V, K, col, V, KP, BV)
    for _ in range(T):
        k = head_row(p_k + row * k_stride + at_key, K, KP, 0, NORMALIZE)
        v = head_row(p_v + row * v_stride + head * V, V, BV, col, False)
        if GATE == HEAD:
            # mutant: decode-without-decay
            S *= tl.exp(tl.maximum(tl.load(p_g + row * g_stride + head).to(tl.float32), FORGET))
        if GATE == CHANNEL:
            S *= tl.exp(tl.maximum(head_row(p_g + row * g_stride + head * K, K, KP, 0, False), FORGET))[:, None]
        if DELTA:
            v -= tl.sum(k[:, None] * S, 0)
        if HAS_BETA:
            v *= tl.load(p_beta + row * beta_stride + head).to(tl.float32)
        S += k[:, None] * v[None, :]
        if READS:
            q = head_row(p_q + row * q_stride + at_key, K, KP, 0, NORMALIZE)
            o = scale * tl.sum(q[:, None] * S, 0)
            j = col + tl.arange(0, BV)
            tl.store(p_o + (row * HV + head) * V + j, o.to(p_o.dtype.element_ty), mask=j < V)
        row += 1
    store_tile(p_final + at_state, V, K, col, S, V, KP, BV)
