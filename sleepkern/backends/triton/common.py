"""What all stages share: where a chunk lies, tiles in and out, products in one precision, decay inside a chunk.

Names in kernels: p_x is a pointer to x, x_stride the numbers from one row (token) to the next; C rows of a chunk, BK
key columns, BV value columns, KP the power of two that holds all key columns; GATE is NONE, HEAD or CHANNEL, DT the
type of operands. A product never takes the transpose of another product: Triton 3.4 to 3.7.0 turns that into wrong
code on Hopper (flash-linear-attention's issue 640). Where one is wanted it goes through memory and is read back turned.
"""

from __future__ import annotations

import triton
import triton.language as tl

NONE = tl.constexpr(0)
HEAD = tl.constexpr(1)
CHANNEL = tl.constexpr(2)
FORGET = tl.constexpr(-104.0)
"""exp of it is 0 in float32; a log decay of -inf itself would make differences of sums into NaN."""
NORM_EPS = tl.constexpr(1e-6)
SEARCH = tl.constexpr(256)


@triton.jit
def find_chunk(slot, p_offsets, T, sequences, C: tl.constexpr, PACKED: tl.constexpr):
    """The chunk in a slot: (its sequence, its first row, how many rows the sequence has from there on).

    A batch has cdiv(T, C) slots a sequence. Packed sequence s owns the slots from offset[s] // C + s on: enough for
    its chunks, found without a sum over the others, at the price of at most one slot a sequence that holds nothing
    (rows <= 0). So the grid follows from shapes alone and no index is ever read by the host.
    """
    if PACKED:
        before = 0
        for first in range(0, sequences, SEARCH):
            s = first + tl.arange(0, SEARCH)
            begins = tl.load(p_offsets + s, mask=s < sequences, other=0)
            owned = (begins // C + s <= slot) & (s < sequences)
            before += tl.sum(owned.to(tl.int32))
        sequence = before - 1
        begin = tl.load(p_offsets + sequence).to(tl.int64)
        end = tl.load(p_offsets + sequence + 1).to(tl.int64)
        # mutant: slots-of-packed-sequences
        chunk = slot - (begin // C).to(tl.int32) - sequence
    else:
        chunks = tl.cdiv(T, C)
        sequence = slot // chunks
        begin = sequence.to(tl.int64) * T
        end = begin + T
        chunk = slot % chunks
    first_row = begin + chunk * C
    return sequence, first_row, (end - first_row).to(tl.int32)


@triton.jit
def find_sequence(sequence, p_offsets, T, C: tl.constexpr, PACKED: tl.constexpr):
    """A sequence: (its first row, its number of rows, the slot of its first chunk)."""
    if PACKED:
        begin = tl.load(p_offsets + sequence).to(tl.int64)
        rows = (tl.load(p_offsets + sequence + 1).to(tl.int64) - begin).to(tl.int32)
        slot = (begin // C).to(tl.int32) + sequence
    else:
        begin = sequence.to(tl.int64) * T
        rows = T
        slot = sequence * tl.cdiv(T, C)
    return begin, rows, slot


@triton.jit
def find_columns(V: tl.constexpr, BV: tl.constexpr):
    """(lane, first value column) of a program: the columns of a lane lie side by side, so that they share what they
    read. One axis, because the second one of a grid ends at 65535.
    """
    blocks: tl.constexpr = (V + BV - 1) // BV
    program = tl.program_id(0)
    return program // blocks, (program % blocks) * BV


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
def load_turned(p, stride, rows, col, WIDTH: tl.constexpr, R: tl.constexpr, N: tl.constexpr):
    """[N, R], the transpose of load_tile."""
    i = tl.arange(0, R)[None, :]
    j = col + tl.arange(0, N)[:, None]
    mask = i < rows
    if WIDTH % N != 0:
        mask = mask & (j < WIDTH)
    return tl.load(p + i * stride + j, mask=mask, other=0.0)


@triton.jit
def store_tile(p, stride, rows, col, x, WIDTH: tl.constexpr, R: tl.constexpr, N: tl.constexpr):
    """Write [R, N] where load_tile reads."""
    i = tl.arange(0, R)[:, None]
    j = col + tl.arange(0, N)[None, :]
    mask = i < rows
    if WIDTH % N != 0:
        mask = mask & (j < WIDTH)
    tl.store(p + i * stride + j, x.to(p.dtype.element_ty), mask=mask)


@triton.jit
def load_row_values(p, stride, rows, R: tl.constexpr):
    """[R] numbers, one a row, as float32; 0 beyond `rows`."""
    i = tl.arange(0, R)
    return tl.load(p + i * stride, mask=i < rows, other=0.0).to(tl.float32)


@triton.jit
def product(a, b, DT: tl.constexpr, PRECISION: tl.constexpr):
    """a @ b, operands rounded to DT, sums in float32. PRECISION says how float32 operands are multiplied.

    Matrix units cut off what tf32 cannot hold, which makes all products too small; so it is rounded to nearest here.
    """
    if DT == tl.float32 and PRECISION == "tf32":
        return tl.dot(nearest_tf32(a.to(DT)), nearest_tf32(b.to(DT)), input_precision=PRECISION)
    return tl.dot(a.to(DT), b.to(DT), input_precision=PRECISION)


@triton.jit
def nearest_tf32(x):
    """float32 numbers with the 10 bits of mantissa that tf32 has; NaN stays NaN."""
    bits = x.to(tl.int32, bitcast=True)
    return tl.where(x == x, ((bits + 0x1000) & -0x2000).to(tl.float32, bitcast=True), x)


@triton.jit
def inverse_norms(p, stride, rows, K: tl.constexpr, C: tl.constexpr, BK: tl.constexpr):
    """1 / |x| of C rows of K numbers."""
    squares = tl.zeros([C], tl.float32)
    for col in range(0, K, BK):
        x = load_tile(p, stride, rows, col, K, C, BK).to(tl.float32)
        squares += tl.sum(x * x, 1)
    return 1.0 / tl.sqrt(squares + NORM_EPS)


@triton.jit
def head_decay(p_g, stride, rows, C: tl.constexpr, WIDE: tl.constexpr):
    """G [C], the running sum of one log decay a row; rows beyond the end keep everything. float64 when WIDE:

    differences of G are small where G is large.
    """
    # mutant: minus-infinity-as-it-is
    g = tl.maximum(load_row_values(p_g, stride, rows, C), FORGET)
    if WIDE:
        g = g.to(tl.float64)
    return tl.cumsum(g, 0)


@triton.jit
def channel_decay(p_g, stride, rows, col, K: tl.constexpr, C: tl.constexpr, BK: tl.constexpr, WIDE: tl.constexpr):
    """G [C, BK], the running sum of one log decay a row and key channel from col on; float64 when WIDE."""
    g = tl.maximum(load_tile(p_g, stride, rows, col, K, C, BK).to(tl.float32), FORGET)
    if WIDE:
        g = g.to(tl.float64)
    return tl.cumsum(g, 0)


@triton.jit
def last_row(G, C: tl.constexpr):
    """G at the last row of the chunk: a number of [C], or [BK] of [C, BK]."""
    last = tl.arange(0, C) == C - 1
    if len(G.shape) == 2:
        last = last[:, None]
    return tl.sum(tl.where(last, G, 0.0), 0)


@triton.jit
def exp_of(x):
    """exp of a non-positive difference, as float32."""
    return tl.exp(tl.minimum(x, 0.0).to(tl.float32))
