"""A state pass on two levels, for few heads and long sequences: the affine maps of segments, then a scan over them.

A sequence is cut into segments of whole chunks. Over a segment the state goes through S <- A S + B:

    1. segment_maps_kernel     A [K, K] and B [K, V] of every segment, all at once: the state pass of state_pass.py from
                               the identity without values, and from zero with them
    2. join_segments_kernel    S_(n+1) = A_n S_n + B_n over the segments, which gives the states at their starts
    3. state_pass_kernel       segments in place of sequences, from these states

Steps 1 and 3 have as many programs as there are segments, heads and tiles, so that few heads fill the device.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .common import find_columns, load_tile, product_as, store_tile
from .state_pass import scan_chunks


@triton.jit(do_not_specialize=["sizes"])
def segment_maps_kernel(
    inputs, factors, states, maps, sizes,
    BV: tl.constexpr, DIMS: tl.constexpr, FLAGS: tl.constexpr, DECAYS: tl.constexpr,
):  # fmt: skip
    """BV columns of [A | B], float32 [segments,HV,K,K+V], of one segment. Grid (segments * HV * cdiv(K + V, BV),).

    sizes are those of a batch of segments. Registers hold [KP, BV] of A or B. K is a multiple of BV.
    """
    K: tl.constexpr = DIMS.K
    V: tl.constexpr = DIMS.V
    KP: tl.constexpr = DIMS.KP
    bh, col = find_columns(K + V, BV)
    segment = bh // DIMS.HV
    begin = segment.to(tl.int64) * sizes.T
    slot = segment * tl.cdiv(sizes.T, DIMS.C)
    key = tl.arange(0, KP)[:, None]
    # mutant: maps-from-zero
    S = tl.where(key == col + tl.arange(0, BV)[None, :], 1.0, 0.0)
    S = scan_chunks(
        S, inputs, factors, states, begin, sizes.T, slot, bh % DIMS.HV, col - K, sizes.scale,
        BV, DIMS, FLAGS, False, False, DECAYS, True,
    )  # fmt: skip
    store_tile(maps + bh.to(tl.int64) * K * (K + V), K + V, K, col, S, K + V, KP, BV)


@triton.jit(do_not_specialize=["segments"])
def join_segments_kernel(
    states, maps, starts, segments,
    BV: tl.constexpr, DIMS: tl.constexpr, FLAGS: tl.constexpr, HAS_STATE: tl.constexpr,
):  # fmt: skip
    """starts, float32 [sequences,segments,HV,K,V], and the final state. Grid (sequences * HV * cdiv(V, BV),).

    Registers hold S [KP, BV]; a segment loads A [KP, KP] and B [KP, BV].
    """
    HV: tl.constexpr = DIMS.HV
    K: tl.constexpr = DIMS.K
    V: tl.constexpr = DIMS.V
    KP: tl.constexpr = DIMS.KP
    PRECISION: tl.constexpr = FLAGS.PRECISION
    bh, col = find_columns(V, BV)
    S = tl.zeros([KP, BV], tl.float32)
    if HAS_STATE:
        S = load_tile(states.initial + bh.to(tl.int64) * K * V, V, K, col, V, KP, BV).to(tl.float32)
    for n in range(segments):
        at = ((bh // HV).to(tl.int64) * segments + n) * HV + bh % HV
        store_tile(starts + at * K * V, V, K, col, S, V, KP, BV)
        p_map = maps + at * K * (K + V)
        A = load_tile(p_map, K + V, K, 0, K, KP, KP)
        B = load_tile(p_map + K, K + V, K, col, V, KP, BV)
        # mutant: joins-without-the-bias
        S = product_as(A, S, tl.float32, PRECISION) + B
    store_tile(states.final + bh.to(tl.int64) * K * V, V, K, col, S, V, KP, BV)
