"""Short windows (one chunk a sequence): all stages of a direction in one launch, each in its own words.

What a stage writes the next one reads back through the caches, behind a barrier of the program; nothing else differs
from the launches stage by stage.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .chunk_backward import chunk_gradients
from .chunk_factors import prepare_chunk
from .common import load_tile, store_tile
from .state_pass import ingest_columns
from .state_pass_backward import walk_back


@triton.jit(do_not_specialize=["T", "passes"])
def window_kernel(
    p_q, p_k, p_v, p_g, p_beta,  # as in prepare
    p_P, p_W, p_U, p_Kt, p_Qe, p_end,
    p_state, p_o, p_final,  # as in ingest
    T, scale, passes, q_stride, k_stride, v_stride, g_stride, beta_stride,
    HV: tl.constexpr, GROUP: tl.constexpr, K: tl.constexpr, V: tl.constexpr,
    C: tl.constexpr, BK: tl.constexpr, KP: tl.constexpr, BV: tl.constexpr,
    GATE: tl.constexpr, DELTA: tl.constexpr, HAS_BETA: tl.constexpr, NORMALIZE: tl.constexpr, READS: tl.constexpr,
    HAS_STATE: tl.constexpr, REPLAY: tl.constexpr, FACTORS: tl.constexpr,
    DT: tl.constexpr, PRECISION: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """Grid (sequences * HV,). FACTORS: there is something to prepare."""
    lane = tl.program_id(0)
    slot = lane // HV
    begin = slot.to(tl.int64) * T
    if FACTORS:
        prepare_chunk(
            p_q, p_k, p_v, p_g, p_beta, p_P, p_P, p_P, p_W, p_U, p_Kt, p_Qe, p_end,
            slot, begin, T, lane % HV, scale, q_stride, k_stride, v_stride, g_stride, beta_stride,
            HV, GROUP, K, V, C, BK, BV, GATE, DELTA, NORMALIZE, READS, False, DT, PRECISION, WIDE,
        )  # fmt: skip
        tl.debug_barrier()
    for col in range(0, V, BV):
        ingest_columns(
            p_q, p_k, p_v, p_g, p_beta, p_P, p_W, p_U, p_Kt, p_Qe, p_end, p_state, p_o, p_final, p_o, p_o,
            begin, T, slot, lane, col, scale, passes, q_stride, k_stride, v_stride, g_stride, beta_stride,
            HV, GROUP, K, V, C, KP, BV, GATE, DELTA, HAS_BETA, NORMALIZE, READS, False, HAS_STATE, REPLAY,
            DT, PRECISION, WIDE,
        )  # fmt: skip


@triton.jit(do_not_specialize=["T"])
def window_gradient_kernel(
    p_q, p_k, p_v, p_g, p_beta, p_state,  # as in prepare and ingest
    p_P, p_X, p_kk, p_W, p_U, p_Kt, p_Qe, p_end, p_final, p_starts, p_Vn,
    p_do, p_dstate, p_dinitial, p_ends, p_dVn,  # as in adjoint
    p_dR, p_dq, p_dk, p_dv, p_dg, p_dbeta, p_dq_sum, p_dk_sum,  # as in gradients
    T, scale, q_stride, k_stride, v_stride, g_stride, beta_stride, do_stride,
    HV: tl.constexpr, GROUP: tl.constexpr, K: tl.constexpr, V: tl.constexpr,
    C: tl.constexpr, BK: tl.constexpr, KP: tl.constexpr, BV: tl.constexpr,
    GATE: tl.constexpr, DELTA: tl.constexpr, HAS_BETA: tl.constexpr, NORMALIZE: tl.constexpr, READS: tl.constexpr,
    HAS_STATE: tl.constexpr, HAS_DSTATE: tl.constexpr, FACTORS: tl.constexpr, SUMS: tl.constexpr,
    DT: tl.constexpr, PRECISION: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """Grid (sequences * H,): a key head with its value heads."""
    H: tl.constexpr = HV // GROUP
    pair = tl.program_id(0)
    slot = pair // H
    key_head = pair % H
    begin = slot.to(tl.int64) * T
    for member in range(GROUP):
        head = key_head * GROUP + member
        lane = slot * HV + head
        at_state = lane.to(tl.int64) * K * V
        if FACTORS:
            prepare_chunk(
                p_q, p_k, p_v, p_g, p_beta, p_P, p_X, p_kk, p_W, p_U, p_Kt, p_Qe, p_end,
                slot, begin, T, head, scale, q_stride, k_stride, v_stride, g_stride, beta_stride,
                HV, GROUP, K, V, C, BK, BV, GATE, DELTA, NORMALIZE, READS, True, DT, PRECISION, WIDE,
            )  # fmt: skip
            tl.debug_barrier()
        for col in range(0, V, BV):
            ingest_columns(
                p_q, p_k, p_v, p_g, p_beta, p_P, p_W, p_U, p_Kt, p_Qe, p_end, p_state, p_final, p_final, p_starts, p_Vn,
                begin, T, slot, lane, col, scale, 1, q_stride, k_stride, v_stride, g_stride, beta_stride,
                HV, GROUP, K, V, C, KP, BV, GATE, DELTA, HAS_BETA, NORMALIZE, False, True, HAS_STATE, False,
                DT, PRECISION, WIDE,
            )  # fmt: skip
            dS = tl.zeros([KP, BV], tl.float32)
            # mutant: single-chunk-without-dstate
            if HAS_DSTATE:
                dS = load_tile(p_dstate + at_state, V, K, col, V, KP, BV)
            dS = walk_back(
                dS, p_q, p_k, p_g, p_P, p_W, p_Kt, p_Qe, p_end, p_do, p_ends, p_dVn,
                begin, T, slot, head, col, scale, q_stride, k_stride, g_stride, do_stride,
                HV, GROUP, K, V, C, KP, BV, GATE, DELTA, NORMALIZE, READS, DT, PRECISION, WIDE,
            )  # fmt: skip
            store_tile(p_dinitial + at_state, V, K, col, dS, V, KP, BV)
    tl.debug_barrier()
    chunk_gradients(
        p_q, p_k, p_v, p_g, p_beta, p_P, p_X, p_kk, p_starts, p_Vn, p_ends, p_dVn, p_dR, p_do,
        p_dq, p_dk, p_dv, p_dg, p_dbeta, p_dq_sum, p_dk_sum,
        slot, begin, T, key_head, scale, q_stride, k_stride, v_stride, g_stride, beta_stride, do_stride,
        HV, GROUP, K, V, C, BK, BV, GATE, DELTA, HAS_BETA, NORMALIZE, READS, SUMS, DT, PRECISION, WIDE,
    )  # fmt: skip
