"""Stage 4: dq, dk, dv, dg, dbeta of each chunk, from the states and their gradients at its ends.

    dR = X^T dVn;   dP = tril(dO Vn^T);   dM = -tril(dR Vn^T, -1);   dv = b dR;   E_i = exp(G_i)
    row_i = sum_j dM_ij exp(G_i - G_j) k_j - E_i S dR_i                          (the part of dk that b_i scales)
    dq_i = scale (E_i S dO_i + sum_j dP_ij exp(G_i - G_j) k_j)
    col_j = sum_i exp(G_i - G_j) (scale dP_ij q_i + b_i dM_ij k_i) + exp(G_C - G_j) dS Vn_j
    dk = b row + col;   dbeta = dR.v + k.row

dg of a row sums all terms that the decay of this row scales:

    dg_t = sum_(i >= t) (scale q_i E_i S dO_i - b_i k_i E_i S dR_i)  from the state before the chunk to rows from t on
         + sum_(j < t) k_j exp(G_C - G_j) dS Vn_j                    from rows before t to the state after the chunk
         + sum_(i >= t > j) (dP_ij P_ij + b_i dM_ij kk_ij)           between these rows
         + exp(G_C) S.dS                                             through the whole chunk

dg is never a difference of sums over terms that this decay does not scale, such as the pair of a row with itself: under
strong decay only the rounding of these terms would remain. dg has one value a key channel; head decay sums them over
the channels. Without delta X = 1, dM = 0 and row = 0. A first loop, over value columns, writes dR, dP and dM to memory;
a second loop, over key columns, loads them in both orientations.
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
    exp_of,
    find_chunk,
    inverse_norms,
    last_row,
    load_row_values,
    load_tile,
    load_transposed,
    product,
    store_tile,
)
from .gates import beta_gradient, channel_decay, channel_gradient, head_decay, head_gradient, load_beta


@triton.jit
def value_columns(
    inputs, factors, states, back, grads, b, first, rows, head, scale,
    BV: tl.constexpr, DIMS: tl.constexpr, FLAGS: tl.constexpr,
):  # fmt: skip
    """dbeta and head decay's dg except for their terms through states, [C] each.

    v, do, dVn and Vn are loaded in [C, BV]. dR and dv are stored; scale dP is stored over P and dM over X, which no
    later step loads.
    """
    HV: tl.constexpr = DIMS.HV
    V: tl.constexpr = DIMS.V
    C: tl.constexpr = DIMS.C
    at_rows = first * HV + head
    i = tl.arange(0, C)
    below = i[:, None] > i[None, :]
    dP = tl.zeros([C, C], tl.float32)
    dM = tl.zeros([C, C], tl.float32)
    dR_v = tl.zeros([C], tl.float32)
    for col in range(0, V, BV):
        Vn = load_transposed(states.Vn + at_rows * V, HV * V, rows, col, V, C, BV)
        dR = load_tile(back.dVn + at_rows * V, HV * V, rows, col, V, C, BV).to(tl.float32)
        v = load_tile(inputs.v + first * inputs.v_stride + head * V, inputs.v_stride, rows, col, V, C, BV)
        if FLAGS.OUTPUT:
            do = load_tile(back.do + first * back.do_stride + head * V, back.do_stride, rows, col, V, C, BV)
            dP += product(do, Vn, FLAGS)
        if FLAGS.DELTA:
            X = load_transposed(factors.X + at_rows * C, HV * C, rows, 0, C, C, C)
            dR = product(X, dR, FLAGS)
            dM -= product(dR, Vn, FLAGS)
            store_tile(grads.dR + at_rows * V, HV * V, rows, col, dR, V, C, BV)
        dR_v += tl.sum(dR * v, 1)
        store_tile(grads.dv + at_rows * V, HV * V, rows, col, b[:, None] * dR, V, C, BV)
    terms = tl.zeros([C, C], tl.float32)
    if FLAGS.OUTPUT:
        terms = tl.where(below, dP * load_tile(factors.P + at_rows * C, HV * C, rows, 0, C, C, C), 0.0)
    if FLAGS.DELTA:
        term = tl.where(below, dM * load_tile(factors.kk + at_rows * C, HV * C, rows, 0, C, C, C), 0.0)
        dR_v += tl.sum(term, 1)
        terms += b[:, None] * term
    dg = tl.zeros([C], tl.float32)
    if FLAGS.GATE == HEAD:
        dg = tl.sum(tl.where(below, tl.cumsum(terms, 0, reverse=True), 0.0), 1)
    tl.debug_barrier()
    if FLAGS.OUTPUT:
        store_tile(factors.P + at_rows * C, HV * C, rows, 0, scale * dP, C, C, C)
    if FLAGS.DELTA:
        store_tile(factors.X + at_rows * C, HV * C, rows, 0, dM, C, C, C)
    tl.debug_barrier()
    return dR_v, dg


@triton.jit
def through_states(
    states, back, grads, slot, first, rows, head, col,
    BK: tl.constexpr, BV: tl.constexpr, DIMS: tl.constexpr, FLAGS: tl.constexpr,
):  # fmt: skip
    """S dO, S dR, dS Vn [C, BK] and S.dS [BK] for the key columns from col on."""
    HV: tl.constexpr = DIMS.HV
    K: tl.constexpr = DIMS.K
    V: tl.constexpr = DIMS.V
    C: tl.constexpr = DIMS.C
    S_do = tl.zeros([C, BK], tl.float32)
    S_dR = tl.zeros([C, BK], tl.float32)
    dS_Vn = tl.zeros([C, BK], tl.float32)
    S_dS = tl.zeros([BK], tl.float32)
    at_rows = first * HV + head
    at_state = (slot.to(tl.int64) * HV + head) * K * V + col * V
    for value in range(0, V, BV):
        S = load_transposed(states.starts + at_state, V, K - col, value, V, BK, BV)
        dS = load_transposed(back.ends + at_state, V, K - col, value, V, BK, BV)
        Vn = load_tile(states.Vn + at_rows * V, HV * V, rows, value, V, C, BV)
        if FLAGS.OUTPUT:
            do = load_tile(back.do + first * back.do_stride + head * V, back.do_stride, rows, value, V, C, BV)
            S_do += product(do, S, FLAGS)
        if FLAGS.DELTA:
            S_dR += product(load_tile(grads.dR + at_rows * V, HV * V, rows, value, V, C, BV), S, FLAGS)
        dS_Vn += product(Vn, dS, FLAGS)
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
def inside_chunk(q, k, G, b, factors, at, stride, rows, C: tl.constexpr, FLAGS: tl.constexpr):
    """The sums of channel_gradients without dg's, for a decay [C] that all channels share, or none."""
    i = tl.arange(0, C)
    dq = tl.zeros_like(k)
    dk = tl.zeros_like(k)
    D = head_differences(G, FLAGS.GATE, C)
    upper = i[:, None] <= i[None, :]
    D_transposed = tl.where(upper, 1.0, 0.0)
    if FLAGS.GATE == HEAD:
        D_transposed = tl.where(upper, exp_of(G[None, :] - G[:, None]), 0.0)
    if FLAGS.OUTPUT:
        dq = product(D * load_tile(factors.P + at, stride, rows, 0, C, C, C), k, FLAGS)
        dk = product(D_transposed * load_transposed(factors.P + at, stride, rows, 0, C, C, C), q, FLAGS)
    if FLAGS.DELTA:
        dM = load_tile(factors.X + at, stride, rows, 0, C, C, C)
        dk += b[:, None] * product(tl.where(i[:, None] > i[None, :], D * dM, 0.0), k, FLAGS)
        dM_transposed = load_transposed(factors.X + at, stride, rows, 0, C, C, C) * b[None, :]
        dk += product(tl.where(i[:, None] < i[None, :], D_transposed * dM_transposed, 0.0), k, FLAGS)
    return dq, dk


@triton.jit
def key_columns(
    inputs, factors, states, back, grads, b, q_norm, k_norm, G, slot, first, rows, head, col, add, scale,
    BK: tl.constexpr, BV: tl.constexpr, DIMS: tl.constexpr, FLAGS: tl.constexpr,
):  # fmt: skip
    """The terms of dbeta and of head decay's dg through states, for the key columns from col on.

    Returns k.row [C], and of head decay's dg what is summed from a row on and what is summed before a row, [C] each,
    and what every row takes. q and k are loaded in [C, BK]. Stores dg of channel decay, dq and dk; when `add` it adds
    dq and dk to the stored values.
    """
    HV: tl.constexpr = DIMS.HV
    H: tl.constexpr = DIMS.HV // DIMS.GROUP
    K: tl.constexpr = DIMS.K
    C: tl.constexpr = DIMS.C
    at_rows = first * HV + head
    at_key = (head // DIMS.GROUP) * K
    at_keys = (first * H + head // DIMS.GROUP) * K
    # mutant: gradients-of-another-key-head
    p_k = inputs.k + first * inputs.k_stride + at_key
    k = k_norm[:, None] * load_tile(p_k, inputs.k_stride, rows, col, K, C, BK)
    q = k
    if FLAGS.OUTPUT:
        p_q = inputs.q + first * inputs.q_stride + at_key
        q = q_norm[:, None] * load_tile(p_q, inputs.q_stride, rows, col, K, C, BK)
    decay_from_start = tl.full([C, 1], 1.0, tl.float32)
    decay_to_end = tl.full([C, 1], 1.0, tl.float32)
    if FLAGS.GATE == HEAD:
        decay_from_start = exp_of(G)[:, None]
        decay_to_end = exp_of(last_row(G, C) - G)[:, None]
    if FLAGS.GATE == CHANNEL:
        G = channel_decay(inputs, first, head, rows, col, K, C, BK, FLAGS)
        decay_from_start = exp_of(G)
        decay_to_end = exp_of(last_row(G, C)[None, :] - G)
    dg = 0.0
    if FLAGS.GATE == CHANNEL:
        dq, dk, dg = channel_gradients(q, k, G, b, factors, at_rows * C, HV * C, rows, C, BK, FLAGS)
    else:
        dq, dk = inside_chunk(q, k, G, b, factors, at_rows * C, HV * C, rows, C, FLAGS)
    S_do, S_dR, dS_Vn, S_dS = through_states(
        states, back, grads, slot, first, rows, head, col, BK, BV, DIMS, FLAGS
    )  # fmt: skip
    if FLAGS.GATE != NONE:
        S_dS *= exp_of(last_row(G, C))
    S_do *= scale * decay_from_start
    S_dR *= decay_from_start
    dS_Vn *= decay_to_end
    dq += S_do
    dk += dS_Vn - b[:, None] * S_dR
    from_start = -b[:, None] * (k * S_dR)
    if FLAGS.OUTPUT:
        from_start += q * S_do
    to_end = k * dS_Vn
    if FLAGS.GATE == CHANNEL:
        # mutant: dg-of-a-channel-by-differences
        dg += tl.cumsum(from_start, 0, reverse=True) + sum_before(to_end, C) + S_dS[None, :]
        dg = channel_gradient(inputs, grads, dg, slot, first, head, rows, col, BK, DIMS, FLAGS)
        store_tile(grads.dg + at_rows * K, HV * K, rows, col, dg, K, C, BK)
    # mutant: value-heads-overwrite-each-other
    if add:
        dk += load_tile(grads.dk_sum + at_keys, H * K, rows, col, K, C, BK)
    store_tile(grads.dk_sum + at_keys, H * K, rows, col, dk, K, C, BK)
    if FLAGS.OUTPUT:
        if add:
            dq += load_tile(grads.dq_sum + at_keys, H * K, rows, col, K, C, BK)
        store_tile(grads.dq_sum + at_keys, H * K, rows, col, dq, K, C, BK)
    return -tl.sum(k * S_dR, 1), tl.sum(from_start, 1), tl.sum(to_end, 1), tl.sum(S_dS, 0)


@triton.jit
def normalize_backward(
    p_x, p_sum, p_dx, norm, at_keys, rows, x_stride, BK: tl.constexpr, DIMS: tl.constexpr, FLAGS: tl.constexpr
):  # fmt: skip
    """The gradient of x from the gradient of x / |x|, summed over the value heads; both [rows,H,K]."""
    K: tl.constexpr = DIMS.K
    C: tl.constexpr = DIMS.C
    HK: tl.constexpr = DIMS.HV // DIMS.GROUP * DIMS.K
    along = tl.zeros([C], tl.float32)
    if FLAGS.NORMALIZE:
        for col in range(0, K, BK):
            x = load_tile(p_x, x_stride, rows, col, K, C, BK)
            along += norm * tl.sum(x * load_tile(p_sum + at_keys, HK, rows, col, K, C, BK), 1)
    for col in range(0, K, BK):
        d = load_tile(p_sum + at_keys, HK, rows, col, K, C, BK)
        if FLAGS.NORMALIZE:
            x = norm[:, None] * load_tile(p_x, x_stride, rows, col, K, C, BK)
            # mutant: gradient-of-the-length-is-left-in
            d = norm[:, None] * (d - x * along[:, None])
        store_tile(p_dx + at_keys, HK, rows, col, d, K, C, BK)


@triton.jit
def chunk_backward(
    inputs, factors, states, back, grads, slot, first, rows, key_head, scale,
    BK: tl.constexpr, BV: tl.constexpr, DIMS: tl.constexpr, FLAGS: tl.constexpr, SUMS: tl.constexpr,
    SPLIT: tl.constexpr,
):  # fmt: skip
    """All gradients of the chunk of one key head. The loop over its value heads is in order, so that sums repeat.

    Where SPLIT, chunk_backward_values_kernel has made those that need value columns alone.
    """
    HV: tl.constexpr = DIMS.HV
    GROUP: tl.constexpr = DIMS.GROUP
    K: tl.constexpr = DIMS.K
    C: tl.constexpr = DIMS.C
    i = tl.arange(0, C)
    at_keys = (first * (HV // GROUP) + key_head) * K
    p_k = inputs.k + first * inputs.k_stride + key_head * K
    q_norm = tl.full([C], 1.0, tl.float32)
    k_norm = tl.full([C], 1.0, tl.float32)
    if FLAGS.NORMALIZE:
        k_norm = inverse_norms(p_k, inputs.k_stride, rows, K, C, BK)
    if FLAGS.OUTPUT:
        p_q = inputs.q + first * inputs.q_stride + key_head * K
        if FLAGS.NORMALIZE:
            q_norm = inverse_norms(p_q, inputs.q_stride, rows, K, C, BK)
    for member in range(GROUP):
        head = key_head * GROUP + member
        at_rows = first * HV + head
        b = tl.full([C], 1.0, tl.float32)
        if FLAGS.HAS_BETA:
            b = load_beta(inputs, first, head, rows, C, FLAGS)
        if SPLIT:
            dbeta = load_row_values(grads.dbeta_part + at_rows, HV, rows, C)
            dg = load_row_values(grads.dg_part + at_rows, HV, rows, C)
        else:
            dbeta, dg = value_columns(
                inputs, factors, states, back, grads, b, first, rows, head, scale, BV, DIMS, FLAGS
            )  # fmt: skip
        G = 0.0
        if FLAGS.GATE == HEAD:
            G = head_decay(inputs, first, head, rows, C, FLAGS)
        from_start = tl.zeros([C], tl.float32)
        to_end = tl.zeros([C], tl.float32)
        through = 0.0
        for col in range(0, K, BK):
            k_row, more_from_start, more_to_end, more_through = key_columns(
                inputs, factors, states, back, grads, b, q_norm, k_norm, G,
                slot, first, rows, head, col, member > 0, scale, BK, BV, DIMS, FLAGS,
            )  # fmt: skip
            # mutant: dbeta-without-k-row
            dbeta += k_row
            from_start += more_from_start
            to_end += more_to_end
            # mutant: dg-without-the-end-of-the-chunk
            through += more_through
        if FLAGS.HAS_BETA:
            dbeta = beta_gradient(inputs, dbeta, first, head, rows, C, FLAGS)
            tl.store(grads.dbeta + at_rows + i * HV, dbeta, mask=i < rows)
        if FLAGS.GATE == HEAD:
            # mutant: dg-by-differences
            dg += tl.cumsum(from_start, 0, reverse=True) + sum_before(to_end, C) + through
            dg = head_gradient(inputs, grads, dg, slot, first, head, rows, DIMS, FLAGS)
            tl.store(grads.dg + at_rows + i * HV, dg, mask=i < rows)
        if SUMS:
            tl.debug_barrier()
    if SUMS:
        normalize_backward(p_k, grads.dk_sum, grads.dk, k_norm, at_keys, rows, inputs.k_stride, BK, DIMS, FLAGS)
        if FLAGS.OUTPUT:
            normalize_backward(p_q, grads.dq_sum, grads.dq, q_norm, at_keys, rows, inputs.q_stride, BK, DIMS, FLAGS)


@triton.jit(do_not_specialize=["sizes"])
def chunk_backward_kernel(
    inputs, factors, states, back, grads, sizes,
    BK: tl.constexpr, BV: tl.constexpr, DIMS: tl.constexpr, FLAGS: tl.constexpr, SUMS: tl.constexpr,
    SPLIT: tl.constexpr,
):  # fmt: skip
    """Gradients of one chunk of one key head (formulas: this file's head). Grid (slots, H).

    Registers hold two tiles [C, C], then six tiles [C, BK] in float32; the latter alone where SPLIT.
    """
    slot = tl.program_id(0)
    first, rows = find_chunk(slot, inputs, sizes, DIMS.C, FLAGS.PACKED)
    if rows > 0:
        chunk_backward(
            inputs, factors, states, back, grads, slot, first, rows, tl.program_id(1), sizes.scale,
            BK, BV, DIMS, FLAGS, SUMS, SPLIT,
        )  # fmt: skip


@triton.jit(do_not_specialize=["sizes"])
def chunk_backward_values_kernel(
    inputs, factors, states, back, grads, sizes, BV: tl.constexpr, DIMS: tl.constexpr, FLAGS: tl.constexpr
):  # fmt: skip
    """dR, dv, dP, dM and the terms of dbeta and dg without states, of one chunk of one value head. Grid (slots, HV).

    It makes the products of value columns, and chunk_backward_kernel with SPLIT then makes those of key columns.
    Registers hold two tiles [C, C].
    """
    slot = tl.program_id(0)
    head = tl.program_id(1)
    first, rows = find_chunk(slot, inputs, sizes, DIMS.C, FLAGS.PACKED)
    if rows > 0:
        i = tl.arange(0, DIMS.C)
        b = tl.full([DIMS.C], 1.0, tl.float32)
        if FLAGS.HAS_BETA:
            b = load_beta(inputs, first, head, rows, DIMS.C, FLAGS)
        dbeta, dg = value_columns(
            inputs, factors, states, back, grads, b, first, rows, head, sizes.scale, BV, DIMS, FLAGS
        )  # fmt: skip
        at_rows = first * DIMS.HV + head + i * DIMS.HV
        # mutant: split-without-dbeta-of-values
        tl.store(grads.dbeta_part + at_rows, dbeta, mask=i < rows)
        # mutant: split-without-dg-of-values
        tl.store(grads.dg_part + at_rows, dg, mask=i < rows)
