"""Stage 4, gradients: dq, dk, dv, dg, dbeta of each chunk, once the states and their gradients at its ends are known.

    dR = X^T dVn;   dP = tril(dO Vn^T);   dM = -tril(dR Vn^T, -1);   dv = b dR
    row_i = sum_j dM_ij exp(G_i - G_j) k_j - E_i S dR_i                          (the part of dk that b_i scales)
    dq_i = scale (E_i S dO_i + sum_j dP_ij exp(G_i - G_j) k_j)
    col_j = sum_i exp(G_i - G_j) (scale dP_ij q_i + b_i dM_ij k_i) + exp(G_C - G_j) dS Vn_j
    dk = b row + col;   dbeta = dR.v + k.row

dg of a row is the sum of all that decays there:

    dg_t = sum_(i >= t) (scale q_i E_i S dO_i - b_i k_i E_i S dR_i)  from the state before the chunk to rows from t on
         + sum_(j < t) k_j exp(G_C - G_j) dS Vn_j                    from rows before t to the state behind the chunk
         + sum_(i >= t > j) (dP_ij P_ij + b_i dM_ij kk_ij)           between these rows
         + Gam S.dS                                                  through the whole chunk

and never a difference of sums that hold what does not decay at t, such as the pair of a row with itself: where decay is
strong only its rounding would be left. dg is one number a key channel; head decay sums it over the channels. Without
delta X = 1, dM = 0 and row = 0. First value columns go by and leave dR, dP and dM in memory, then key columns, which
read them back in both orientations.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .chunk_factors import head_differences
from .chunk_factors_channel import channel_gradients
from .common import (
    CHANNEL,
    HEAD,
    NONE,
    channel_decay,
    exp_of,
    find_chunk,
    head_decay,
    inverse_norms,
    last_row,
    load_row_values,
    load_tile,
    load_turned,
    product,
    store_tile,
)


@triton.jit
def value_columns(
    p_v, p_P, p_X, p_kk, p_dR, p_Vn, p_dVn, p_do, p_dv, b, at_rows, rows, scale, v_stride, do_stride,
    HV: tl.constexpr, V: tl.constexpr, C: tl.constexpr, BV: tl.constexpr,
    GATE: tl.constexpr, DELTA: tl.constexpr, READS: tl.constexpr, DT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dbeta and dg of head decay but for what goes through states, [C] each.

    Writes dR and dv, scale dP over P and dM over X, which nothing needs any more.
    """
    i = tl.arange(0, C)
    below = i[:, None] > i[None, :]
    dP = tl.zeros([C, C], tl.float32)
    dM = tl.zeros([C, C], tl.float32)
    dR_v = tl.zeros([C], tl.float32)
    for col in range(0, V, BV):
        Vn = load_turned(p_Vn + at_rows * V, HV * V, rows, col, V, C, BV)
        dR = load_tile(p_dVn + at_rows * V, HV * V, rows, col, V, C, BV).to(tl.float32)
        v = load_tile(p_v, v_stride, rows, col, V, C, BV)
        if READS:
            dP += product(load_tile(p_do, do_stride, rows, col, V, C, BV), Vn, DT, PRECISION)
        if DELTA:
            X = load_turned(p_X + at_rows * C, HV * C, rows, 0, C, C, C)
            dR = product(X, dR, DT, PRECISION)
            dM -= product(dR, Vn, DT, PRECISION)
            store_tile(p_dR + at_rows * V, HV * V, rows, col, dR, V, C, BV)
        dR_v += tl.sum(dR * v, 1)
        store_tile(p_dv + at_rows * V, HV * V, rows, col, b[:, None] * dR, V, C, BV)
    gains = tl.zeros([C, C], tl.float32)
    if READS:
        gains = tl.where(below, dP * load_tile(p_P + at_rows * C, HV * C, rows, 0, C, C, C), 0.0)
    if DELTA:
        gain = tl.where(below, dM * load_tile(p_kk + at_rows * C, HV * C, rows, 0, C, C, C), 0.0)
        dR_v += tl.sum(gain, 1)
        gains += b[:, None] * gain
    dg = tl.zeros([C], tl.float32)
    if GATE == HEAD:
        dg = tl.sum(tl.where(below, tl.cumsum(gains, 0, reverse=True), 0.0), 1)
    tl.debug_barrier()
    if READS:
        store_tile(p_P + at_rows * C, HV * C, rows, 0, scale * dP, C, C, C)
    if DELTA:
        store_tile(p_X + at_rows * C, HV * C, rows, 0, dM, C, C, C)
    tl.debug_barrier()
    return dR_v, dg


@triton.jit
def through_states(
    p_starts, p_ends, p_Vn, p_dR, p_do, at_rows, at_slot, rows, col, do_stride,
    HV: tl.constexpr, K: tl.constexpr, V: tl.constexpr, C: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
    DELTA: tl.constexpr, READS: tl.constexpr, DT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """S dO, S dR, dS Vn [C, BK] and S.dS [BK] for the key columns from col on."""
    S_do = tl.zeros([C, BK], tl.float32)
    S_dR = tl.zeros([C, BK], tl.float32)
    dS_Vn = tl.zeros([C, BK], tl.float32)
    S_dS = tl.zeros([BK], tl.float32)
    at_state = at_slot * K * V + col * V
    for value in range(0, V, BV):
        S = load_turned(p_starts + at_state, V, K - col, value, V, BK, BV)
        dS = load_turned(p_ends + at_state, V, K - col, value, V, BK, BV)
        Vn = load_tile(p_Vn + at_rows * V, HV * V, rows, value, V, C, BV)
        if READS:
            S_do += product(load_tile(p_do, do_stride, rows, value, V, C, BV), S, DT, PRECISION)
        if DELTA:
            S_dR += product(load_tile(p_dR + at_rows * V, HV * V, rows, value, V, C, BV), S, DT, PRECISION)
        dS_Vn += product(Vn, dS, DT, PRECISION)
        S_dS += tl.sum(S.to(tl.float32) * dS, 0)
    return S_do, S_dR, dS_Vn, S_dS


@triton.jit
def sum_before(x, C: tl.constexpr):
    """The sum of the rows before each row of x, [C] or [C, BK]; no difference of sums that hold the row itself."""
    i = tl.arange(0, C)
    before = tl.maximum(i - 1, 0)
    if len(x.shape) == 2:
        shifted = tl.where((i > 0)[:, None], tl.gather(x, tl.broadcast_to(before[:, None], x.shape), 0), 0.0)
    else:
        shifted = tl.where(i > 0, tl.gather(x, before, 0), 0.0)
    return tl.cumsum(shifted, 0)


@triton.jit
def inside_chunk(
    q, k, G, b, p_P, p_X, stride, rows, C: tl.constexpr,
    GATE: tl.constexpr, DELTA: tl.constexpr, READS: tl.constexpr, DT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The sums of channel_gradients but dg's, for a decay [C] that all channels share, or none."""
    i = tl.arange(0, C)
    dq = tl.zeros_like(k)
    dk = tl.zeros_like(k)
    D = head_differences(G, GATE, C)
    turned = i[:, None] <= i[None, :]
    D_turned = tl.where(turned, 1.0, 0.0)
    if GATE == HEAD:
        D_turned = tl.where(turned, exp_of(G[None, :] - G[:, None]), 0.0)
    if READS:
        dq = product(D * load_tile(p_P, stride, rows, 0, C, C, C), k, DT, PRECISION)
        dk = product(D_turned * load_turned(p_P, stride, rows, 0, C, C, C), q, DT, PRECISION)
    if DELTA:
        dM = load_tile(p_X, stride, rows, 0, C, C, C)
        dk += b[:, None] * product(tl.where(i[:, None] > i[None, :], D * dM, 0.0), k, DT, PRECISION)
        dM_turned = load_turned(p_X, stride, rows, 0, C, C, C) * b[None, :]
        dk += product(tl.where(i[:, None] < i[None, :], D_turned * dM_turned, 0.0), k, DT, PRECISION)
    return dq, dk


@triton.jit
def key_columns(
    p_q, p_k, p_g, p_P, p_X, p_starts, p_ends, p_Vn, p_dR, p_do, p_dq, p_dk, p_dg, b, q_norm, k_norm, G,
    at_rows, at_keys, at_slot, rows, col, add, scale, q_stride, k_stride, g_stride, do_stride,
    HV: tl.constexpr, H: tl.constexpr, K: tl.constexpr, V: tl.constexpr,
    C: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
    GATE: tl.constexpr, DELTA: tl.constexpr, READS: tl.constexpr,
    DT: tl.constexpr, PRECISION: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """k.row [C], and of head decay's dg what is summed up from a row on and before it, [C] each, and what all take.

    k.row and these hold what goes through states; all else is in value_columns. Writes dg of channel decay; writes dq
    and dk, on top of what is there when `add`.
    """
    k = k_norm[:, None] * load_tile(p_k, k_stride, rows, col, K, C, BK)
    q = k
    if READS:
        q = q_norm[:, None] * load_tile(p_q, q_stride, rows, col, K, C, BK)
    E = tl.full([C, 1], 1.0, tl.float32)
    until = tl.full([C, 1], 1.0, tl.float32)
    if GATE == HEAD:
        E = exp_of(G)[:, None]
        until = exp_of(last_row(G, C) - G)[:, None]
    if GATE == CHANNEL:
        G = channel_decay(p_g, g_stride, rows, col, K, C, BK, WIDE)
        E = exp_of(G)
        until = exp_of(last_row(G, C)[None, :] - G)
    if READS:
        p_P += at_rows * C
    if DELTA:
        p_X += at_rows * C
    dg = 0.0
    if GATE == CHANNEL:
        dq, dk, dg = channel_gradients(
            q, k, G, b, p_P, p_X, HV * C, rows, C, BK, DELTA, READS, DT, PRECISION
        )  # fmt: skip
    else:
        dq, dk = inside_chunk(q, k, G, b, p_P, p_X, HV * C, rows, C, GATE, DELTA, READS, DT, PRECISION)
    S_do, S_dR, dS_Vn, S_dS = through_states(
        p_starts, p_ends, p_Vn, p_dR, p_do, at_rows, at_slot, rows, col, do_stride,
        HV, K, V, C, BK, BV, DELTA, READS, DT, PRECISION,
    )  # fmt: skip
    if GATE != NONE:
        S_dS *= exp_of(last_row(G, C))
    S_do *= scale * E
    S_dR *= E
    dS_Vn *= until
    dq += S_do
    dk += dS_Vn - b[:, None] * S_dR
    from_start = -b[:, None] * (k * S_dR)
    if READS:
        from_start += q * S_do
    to_end = k * dS_Vn
    if GATE == CHANNEL:
        # mutant: dg-of-a-channel-by-differences
        dg += tl.cumsum(from_start, 0, reverse=True) + sum_before(to_end, C) + S_dS[None, :]
        store_tile(p_dg + at_rows * K, HV * K, rows, col, dg, K, C, BK)
    # mutant: value-heads-overwrite-each-other
    if add:
        dk += load_tile(p_dk + at_keys, H * K, rows, col, K, C, BK)
    store_tile(p_dk + at_keys, H * K, rows, col, dk, K, C, BK)
    if READS:
        if add:
            dq += load_tile(p_dq + at_keys, H * K, rows, col, K, C, BK)
        store_tile(p_dq + at_keys, H * K, rows, col, dq, K, C, BK)
    return -tl.sum(k * S_dR, 1), tl.sum(from_start, 1), tl.sum(to_end, 1), tl.sum(S_dS, 0)


@triton.jit
def finish(
    p_x, p_sum, p_dx, norm, at_keys, rows, x_stride,
    H: tl.constexpr, K: tl.constexpr, C: tl.constexpr, BK: tl.constexpr, NORMALIZE: tl.constexpr,
):  # fmt: skip
    """From the gradient of x / |x|, summed over the value heads, to that of x; both [rows,H,K]."""
    along = tl.zeros([C], tl.float32)
    if NORMALIZE:
        for col in range(0, K, BK):
            x = load_tile(p_x, x_stride, rows, col, K, C, BK)
            along += norm * tl.sum(x * load_tile(p_sum + at_keys, H * K, rows, col, K, C, BK), 1)
    for col in range(0, K, BK):
        d = load_tile(p_sum + at_keys, H * K, rows, col, K, C, BK)
        if NORMALIZE:
            x = norm[:, None] * load_tile(p_x, x_stride, rows, col, K, C, BK)
            # mutant: gradient-of-the-length-is-left-in
            d = norm[:, None] * (d - x * along[:, None])
        store_tile(p_dx + at_keys, H * K, rows, col, d, K, C, BK)


@triton.jit
def chunk_gradients(
    p_q, p_k, p_v, p_g, p_beta, p_P, p_X, p_kk, p_starts, p_Vn, p_ends, p_dVn, p_dR, p_do,
    p_dq, p_dk, p_dv, p_dg, p_dbeta, p_dq_sum, p_dk_sum,
    slot, first, rows, key_head, scale, q_stride, k_stride, v_stride, g_stride, beta_stride, do_stride,
    HV: tl.constexpr, GROUP: tl.constexpr, K: tl.constexpr, V: tl.constexpr,
    C: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
    GATE: tl.constexpr, DELTA: tl.constexpr, HAS_BETA: tl.constexpr, NORMALIZE: tl.constexpr, READS: tl.constexpr,
    SUMS: tl.constexpr, DT: tl.constexpr, PRECISION: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """All gradients of the chunk of one key head; its value heads are gone through in order, so sums repeat."""
    i = tl.arange(0, C)
    H: tl.constexpr = HV // GROUP
    at_keys = (first * H + key_head) * K
    # mutant: gradients-of-another-key-head
    p_k += first * k_stride + key_head * K
    q_norm = tl.full([C], 1.0, tl.float32)
    k_norm = tl.full([C], 1.0, tl.float32)
    if NORMALIZE:
        k_norm = inverse_norms(p_k, k_stride, rows, K, C, BK)
    if READS:
        p_q += first * q_stride + key_head * K
        if NORMALIZE:
            q_norm = inverse_norms(p_q, q_stride, rows, K, C, BK)
    for member in range(GROUP):
        head = key_head * GROUP + member
        at_rows = first * HV + head
        at_slot = slot.to(tl.int64) * HV + head
        p_do_head = p_do
        if READS:
            p_do_head = p_do + first * do_stride + head * V
        b = tl.full([C], 1.0, tl.float32)
        if HAS_BETA:
            b = load_row_values(p_beta + first * beta_stride + head, beta_stride, rows, C)
        dbeta, dg = value_columns(
            p_v + first * v_stride + head * V, p_P, p_X, p_kk, p_dR, p_Vn, p_dVn, p_do_head, p_dv, b,
            at_rows, rows, scale, v_stride, do_stride, HV, V, C, BV, GATE, DELTA, READS, DT, PRECISION,
        )  # fmt: skip
        G = 0.0
        p_g_head = p_g
        if GATE == HEAD:
            G = head_decay(p_g + first * g_stride + head, g_stride, rows, C, WIDE)
        if GATE == CHANNEL:
            p_g_head = p_g + first * g_stride + head * K
        from_start = tl.zeros([C], tl.float32)
        to_end = tl.zeros([C], tl.float32)
        through = 0.0
        for col in range(0, K, BK):
            k_row, more_from_start, more_to_end, more_through = key_columns(
                p_q, p_k, p_g_head, p_P, p_X, p_starts, p_ends, p_Vn, p_dR, p_do_head, p_dq_sum, p_dk_sum, p_dg,
                b, q_norm, k_norm, G, at_rows, at_keys, at_slot, rows, col, member > 0, scale,
                q_stride, k_stride, g_stride, do_stride,
                HV, H, K, V, C, BK, BV, GATE, DELTA, READS, DT, PRECISION, WIDE,
            )  # fmt: skip
            # mutant: dbeta-without-k-row
            dbeta += k_row
            from_start += more_from_start
            to_end += more_to_end
            # mutant: dg-without-the-end-of-the-chunk
            through += more_through
        if HAS_BETA:
            tl.store(p_dbeta + at_rows + i * HV, dbeta, mask=i < rows)
        if GATE == HEAD:
            # mutant: dg-by-differences
            dg += tl.cumsum(from_start, 0, reverse=True) + sum_before(to_end, C) + through
            tl.store(p_dg + at_rows + i * HV, dg, mask=i < rows)
        if SUMS:
            tl.debug_barrier()
    if SUMS:
        finish(p_k, p_dk_sum, p_dk, k_norm, at_keys, rows, k_stride, H, K, C, BK, NORMALIZE)
        if READS:
            finish(p_q, p_dq_sum, p_dq, q_norm, at_keys, rows, q_stride, H, K, C, BK, NORMALIZE)


@triton.jit(do_not_specialize=["T", "sequences"])
def gradient_kernel(
    p_q, p_k, p_v, p_g, p_beta, p_offsets,  # as in prepare
    p_P, p_X, p_kk, p_starts, p_Vn,  # as in prepare and ingest
    p_ends, p_dVn, p_do,  # as in adjoint
    p_dR,  # [rows,HV,V] scratch
    p_dq, p_dk, p_dv, p_dg, p_dbeta,  # contiguous, shapes of the tensors
    p_dq_sum, p_dk_sum,  # [rows,H,K] float32 scratch when SUMS, else dq and dk themselves
    T, sequences, scale, q_stride, k_stride, v_stride, g_stride, beta_stride, do_stride,
    HV: tl.constexpr, GROUP: tl.constexpr, K: tl.constexpr, V: tl.constexpr,
    C: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
    GATE: tl.constexpr, DELTA: tl.constexpr, HAS_BETA: tl.constexpr, NORMALIZE: tl.constexpr, READS: tl.constexpr,
    SUMS: tl.constexpr, PACKED: tl.constexpr, DT: tl.constexpr, PRECISION: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """Grid (slots, H): one chunk of one key head. Registers: two [C, C], then six [C, BK] float32."""
    slot = tl.program_id(0)
    _, first, rows = find_chunk(slot, p_offsets, T, sequences, C, PACKED)
    if rows > 0:
        chunk_gradients(
            p_q, p_k, p_v, p_g, p_beta, p_P, p_X, p_kk, p_starts, p_Vn, p_ends, p_dVn, p_dR, p_do,
            p_dq, p_dk, p_dv, p_dg, p_dbeta, p_dq_sum, p_dk_sum,
            slot, first, rows, tl.program_id(1), scale,
            q_stride, k_stride, v_stride, g_stride, beta_stride, do_stride,
            HV, GROUP, K, V, C, BK, BV, GATE, DELTA, HAS_BETA, NORMALIZE, READS, SUMS, DT, PRECISION, WIDE,
        )  # fmt: skip
