"""Code that all stages share: groups of arguments, positions of chunks, loads and stores of tiles, products, decay.

Names in kernels: x_stride is the number of elements from one row (token) to the next; C rows of a chunk, BK key columns
and BV value columns at a time, KP the power of two that holds all key columns; bh = sequence * HV + value head. A
product never takes the transpose of another product: Triton 3.4 to 3.7.0 compiles that into wrong code on Hopper
(flash-linear-attention's issue 640). A transpose that is wanted goes through memory and is loaded transposed.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

NONE = tl.constexpr(0)
HEAD = tl.constexpr(1)
CHANNEL = tl.constexpr(2)
MIN_LOG_DECAY = tl.constexpr(-104.0)
"""exp(-104) is 0 in float32; a log decay of -inf itself would turn differences of sums into NaN."""
NORM_EPS = tl.constexpr(1e-6)
SEARCH = tl.constexpr(256)


class Inputs(NamedTuple):
    """Pointers to the tensors of a call, None for a tensor that the call lacks, and the strides of their rows."""

    q: Any  # [rows,H,K]
    k: Any  # [rows,H,K]
    v: Any  # [rows,HV,V]
    g: Any  # [rows,HV] or [rows,HV,K]
    beta: Any  # [rows,HV]
    offsets: Any  # [sequences + 1] when packed
    q_stride: Any
    k_stride: Any
    v_stride: Any
    g_stride: Any
    beta_stride: Any
    A_log: Any = None  # [HV] float32, with raw log decays (gates.py)
    dt_bias: Any = None  # [HV] or [HV,K] float32


class ChunkFactors(NamedTuple):
    """Scratch that chunk_factors_kernel writes (formulas: chunk_factors.py); None where the rule has no such factor."""

    P: Any  # [rows,HV,C]
    X: Any  # [rows,HV,C], for the backward pass
    kk: Any  # [rows,HV,C], for the backward pass
    W: Any  # [rows,HV,K]
    U: Any  # [rows,HV,V]
    Kt: Any  # [rows,HV,K], channel decay
    Qe: Any  # [rows,HV,K], channel decay
    G_end: Any  # [slots,HV,K] float32, channel decay: G at the last row of the chunk
    from_start: Any = None  # [rows,HV] float32, state passes of variant "decays": scale exp(G) / |q|
    to_end: Any = None  # [rows,HV] float32, the same: exp(G_C - G) / |k|
    chunk_decay: Any = None  # [slots,HV] float32, the same: exp(G_C)


class States(NamedTuple):
    """The tensors that a state pass loads and stores; starts and Vn are for the backward pass."""

    initial: Any  # [sequences,HV,K,V] float32
    final: Any  # [sequences,HV,K,V] float32
    o: Any  # [rows,HV,V]
    starts: Any  # [slots,HV,K,V] states at the starts of the chunks
    Vn: Any  # [rows,HV,V]
    along: Any = None  # [states,HV,K,V] float32, with state_every (states_along.py)
    along_offsets: Any = None  # [sequences + 1] int64, the same when packed: where the states of a sequence begin


class DecodeStates(NamedTuple):
    """States of a decode that are stored in a pool, and where those after each token go.

    Strides count elements; each state of a head is contiguous. `out` None: the final states replace the initial ones.
    """

    indices: Any  # [B] int64, the state of each sequence, negative for a padded row; None means 0, 1, 2, ...
    stride: Any  # from one state of the pool to the next
    head_stride: Any
    out: Any = None  # [B,T,HV,K,V], or a pool [n,HV,K,V]: states after each token
    out_indices: Any = None  # [B,T] int64 into the pool `out`, a negative one is not written
    out_stride: Any = None
    out_token_stride: Any = None
    out_head_stride: Any = None


class StateGradients(NamedTuple):
    """The tensors that a backward state pass loads and stores."""

    do: Any  # [rows,HV,V]
    dstate: Any  # [sequences,HV,K,V] float32
    dinitial: Any  # [sequences,HV,K,V] float32
    ends: Any  # [slots,HV,K,V] gradients of the states at the ends of the chunks
    dVn: Any  # [rows,HV,V]
    do_stride: Any
    dalong: Any = None  # [states,HV,K,V] float32, gradients of the states along a sequence
    along_offsets: Any = None  # [sequences + 1] int64 when packed


class Gradients(NamedTuple):
    """Contiguous gradients of the inputs, and scratch."""

    dq: Any
    dk: Any
    dv: Any
    dg: Any
    dbeta: Any
    dq_sum: Any  # [rows,H,K] float32 scratch when SUMS, else dq itself
    dk_sum: Any  # [rows,H,K] float32 scratch when SUMS, else dk itself
    dR: Any  # [rows,HV,V] scratch
    dA_log: Any = None  # [slots,HV] or [slots,HV,K] float32, sums of a chunk, with raw log decays
    ddt_bias: Any = None  # the same
    dbeta_part: Any = None  # [rows,HV] float32 scratch, chunk backward of variant "products"
    dg_part: Any = None  # [rows,HV] float32 scratch, the same


class Sizes(NamedTuple):
    """Numbers of a call that no kernel is compiled for."""

    T: int
    sequences: int
    passes: int
    scale: float


class Dims(NamedTuple):
    """Compile-time sizes: value heads, value heads of a key head, widths, rows of a chunk, padded(K)."""

    HV: int
    GROUP: int
    K: int
    V: int
    C: int
    KP: int


class Flags(NamedTuple):
    """Compile-time switches. GATE is NONE, HEAD or CHANNEL; DT and PRECISION are those of `product`; WIDE sums log
    decays in float64. RAW log decays are made with BOUND, 0 for none; BETA_SCALE is 0 where beta is not raw."""

    GATE: int
    DELTA: bool
    HAS_BETA: bool
    NORMALIZE: bool
    OUTPUT: bool
    PACKED: bool
    DT: Any
    PRECISION: str
    WIDE: bool
    RAW: bool = False
    BOUND: float = 0.0
    BETA_SCALE: float = 0.0


@triton.jit
def find_chunk(slot, inputs, sizes, C: tl.constexpr, PACKED: tl.constexpr):
    """The chunk in a slot: (its first row, the number of rows that its sequence has from there on).

    A batch has cdiv(T, C) slots a sequence. Packed sequence s owns the slots from offset[s] // C + s on: enough for
    its chunks, found without a sum over the others, at the price of at most one slot a sequence that holds nothing
    (rows <= 0). The grid therefore follows from shapes alone, and the host never reads an index.
    """
    if PACKED:
        before = 0
        for start in range(0, sizes.sequences, SEARCH):
            s = start + tl.arange(0, SEARCH)
            begins = tl.load(inputs.offsets + s, mask=s < sizes.sequences, other=0)
            owned = (begins // C + s <= slot) & (s < sizes.sequences)
            before += tl.sum(owned.to(tl.int32))
        sequence = before - 1
        begin = tl.load(inputs.offsets + sequence).to(tl.int64)
        end = tl.load(inputs.offsets + sequence + 1).to(tl.int64)
        # mutant: slots-of-packed-sequences
        chunk = slot - (begin // C).to(tl.int32) - sequence
    else:
        chunks = tl.cdiv(sizes.T, C)
        sequence = slot // chunks
        begin = sequence.to(tl.int64) * sizes.T
        end = begin + sizes.T
        chunk = slot % chunks
    first = begin + chunk * C
    return first, (end - first).to(tl.int32)


@triton.jit
def find_sequence(sequence, inputs, sizes, C: tl.constexpr, PACKED: tl.constexpr):
    """A sequence: (its first row, its number of rows, the slot of its first chunk)."""
    if PACKED:
        begin = tl.load(inputs.offsets + sequence).to(tl.int64)
        total = (tl.load(inputs.offsets + sequence + 1).to(tl.int64) - begin).to(tl.int32)
        slot = (begin // C).to(tl.int32) + sequence
    else:
        begin = sequence.to(tl.int64) * sizes.T
        total = sizes.T
        slot = sequence * tl.cdiv(sizes.T, C)
    return begin, total, slot


@triton.jit
def find_columns(V: tl.constexpr, BV: tl.constexpr):
    """(bh, first value column) of a program. Programs of one bh are neighbours, so that they share what they load.

    The grid has one axis, because the second axis of a grid ends at 65535.
    """
    tiles: tl.constexpr = (V + BV - 1) // BV
    program = tl.program_id(0)
    return program // tiles, (program % tiles) * BV


@triton.jit
def load_tile(p, stride, rows, col, WIDTH: tl.constexpr, R: tl.constexpr, N: tl.constexpr):
    """[R, N] of a row-major matrix, columns from col on; 0 beyond `rows` rows and WIDTH columns."""
    i = tl.arange(0, R)[:, None]
    j = col + tl.arange(0, N)[None, :]
    mask = i < rows
    if WIDTH % N != 0:
        mask = mask & (j < WIDTH)
    return tl.load(p + i * stride + j, mask=mask, other=0.0)


@triton.jit
def load_transposed(p, stride, rows, col, WIDTH: tl.constexpr, R: tl.constexpr, N: tl.constexpr):
    """[N, R], the transpose of load_tile."""
    i = tl.arange(0, R)[None, :]
    j = col + tl.arange(0, N)[:, None]
    mask = i < rows
    if WIDTH % N != 0:
        mask = mask & (j < WIDTH)
    return tl.load(p + i * stride + j, mask=mask, other=0.0)


@triton.jit
def store_tile(p, stride, rows, col, x, WIDTH: tl.constexpr, R: tl.constexpr, N: tl.constexpr):
    """Store [R, N] where load_tile loads."""
    i = tl.arange(0, R)[:, None]
    j = col + tl.arange(0, N)[None, :]
    mask = i < rows
    if WIDTH % N != 0:
        mask = mask & (j < WIDTH)
    tl.store(p + i * stride + j, x.to(p.dtype.element_ty), mask=mask)


@triton.jit
def load_row_values(p, stride, rows, R: tl.constexpr):
    """[R] values, one a row, as float32; 0 beyond `rows`."""
    i = tl.arange(0, R)
    return tl.load(p + i * stride, mask=i < rows, other=0.0).to(tl.float32)


@triton.jit
def product(a, b, FLAGS: tl.constexpr):
    """a @ b in the precision of the call."""
    PRECISION: tl.constexpr = FLAGS.PRECISION  # Triton 3.6 passes no string on that is not a name's
    return product_as(a, b, FLAGS.DT, PRECISION)


@triton.jit
def product_as(a, b, DT: tl.constexpr, PRECISION: tl.constexpr):
    """a @ b, operands rounded to DT, sums in float32. PRECISION says how float32 operands are multiplied.

    Matrix units cut off the bits that tf32 lacks, which makes all products too small; operands are therefore rounded
    to nearest first.
    """
    if DT == tl.float32 and PRECISION == "tf32":
        return tl.dot(nearest_tf32(a.to(DT)), nearest_tf32(b.to(DT)), input_precision=PRECISION)
    return tl.dot(a.to(DT), b.to(DT), input_precision=PRECISION)


@triton.jit
def nearest_tf32(x):
    """float32 values with the 10 bits of mantissa that tf32 has; NaN stays NaN."""
    bits = x.to(tl.int32, bitcast=True)
    return tl.where(x == x, ((bits + 0x1000) & -0x2000).to(tl.float32, bitcast=True), x)


@triton.jit
def inverse_norms(p, stride, rows, K: tl.constexpr, C: tl.constexpr, BK: tl.constexpr):
    """1 / |x| of C rows of K elements."""
    squares = tl.zeros([C], tl.float32)
    for col in range(0, K, BK):
        x = load_tile(p, stride, rows, col, K, C, BK).to(tl.float32)
        squares += tl.sum(x * x, 1)
    return 1.0 / tl.sqrt(squares + NORM_EPS)


@triton.jit
def last_row(G, C: tl.constexpr):
    """G at the last row of the chunk: a scalar of [C], or [BK] of [C, BK]."""
    last = tl.arange(0, C) == C - 1
    if len(G.shape) == 2:
        last = last[:, None]
    return tl.sum(tl.where(last, G, 0.0), 0)


@triton.jit
def exp_of(x):
    """exp of a non-positive difference, as float32."""
    return tl.exp(tl.minimum(x, 0.0).to(tl.float32))
