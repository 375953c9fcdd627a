"""The short convolution, forward and backward, and its step of one token. Each channel is convolved for itself.

    z_t = bias + sum_j w_{W-1-j} x_{t-j}, j < W;   y_t = silu(z_t) or z_t;   last = the last W - 1 rows of past ++ x
    dz_t = dy_t y'(z_t);   dx_t = sum_j w_{W-1-j} dz_{t+j} + dlast;   dw_{W-1-j} = sum_t dz_t x_{t-j};   db = sum_t dz_t

A program has N runs of R tokens, one after the other, of BD channels. Row r of every run is one tile [N, BD] in
registers, so that the token j before row r is in tile r - j of the same thread: a row is loaded (R + W - 1) / R times
from the L1 cache and once from memory, and no row crosses threads. Tiles stay in the type of x until they are summed
in float32. `u` numbers the rows of one sequence; those of `past` are -(W - 1) to -1.

Bytes an element in a type of s bytes: forward 2 s, backward 3 s and 8 (W + 1) / (N R) for the partial sums of the
weight's gradient, which torch adds up in one order. At 4.2 TB/s, 8192 tokens of 8192 channels in bfloat16 are
predicted to take 64 us forward and 106 us backward by their bytes; instructions take longer (docs/kernels/triton.md).
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

SEARCH = tl.constexpr(256)


class ConvolutionInputs(NamedTuple):
    """Pointers to the tensors of a call, None for a tensor that the call lacks."""

    x: Any  # [rows,D]
    weight: Any  # [D,W]
    bias: Any  # [D]
    past: Any  # [sequences,W-1,D]
    offsets: Any  # [sequences + 1] when packed
    x_stride: Any


class ConvolutionGradients(NamedTuple):
    """Gradients that come from above, those that the kernel stores, and partial sums, one of each tile of tokens."""

    dy: Any  # [rows,D]
    dlast: Any  # [sequences,W-1,D]
    dx: Any  # [rows,D]
    dpast: Any  # [sequences,W-1,D]
    sums: Any  # [slots,W+1,D] float32, those of the bias after those of the weight
    dy_stride: Any


class ConvolutionSizes(NamedTuple):
    """Numbers of a call that no kernel is compiled for."""

    T: int
    sequences: int


class ConvolutionDims(NamedTuple):
    """Compile-time sizes: channels, width, runs of a program, rows of a run, channels of a program."""

    D: int
    W: int
    N: int
    R: int
    BD: int


class ConvolutionFlags(NamedTuple):
    """Compile-time switches."""

    SILU: bool
    BIAS: bool
    PAST: bool
    PACKED: bool
    DLAST: bool


@triton.jit
def sigmoid(z):
    """exp may overflow, and 1 / inf is 0."""
    return 1.0 / (1.0 + tl.exp(-z))


@triton.jit
def find_rows(slot, p_offsets, sizes, BT: tl.constexpr, BEFORE: tl.constexpr, PACKED: tl.constexpr):
    """The tile of BT rows in a slot: ((number, first of all rows, rows) of its sequence, its first row in there).

    A sequence has BEFORE rows before its first one. Packed sequence s owns the slots from s + begin // BT on, begin
    its offset and the BEFORE rows of all sequences before it: enough for its rows, and at least one, whatever the
    lengths are. The grid therefore follows from shapes alone, and the host never reads an offset.
    """
    if PACKED:
        owners = 0
        for start in range(0, sizes.sequences, SEARCH):
            s = start + tl.arange(0, SEARCH)
            begins = tl.load(p_offsets + s, mask=s < sizes.sequences, other=0).to(tl.int64)
            owned = ((begins + s * BEFORE) // BT + s <= slot) & (s < sizes.sequences)
            owners += tl.sum(owned.to(tl.int32))
        number = owners - 1
        begin = tl.load(p_offsets + number).to(tl.int64)
        length = (tl.load(p_offsets + number + 1).to(tl.int64) - begin).to(tl.int32)
        # mutant: convolution-slots-of-packed-sequences
        tile = slot - ((begin + number * BEFORE) // BT).to(tl.int32) - number
    else:
        tiles = tl.maximum(tl.cdiv(sizes.T + BEFORE, BT), 1)
        number = slot // tiles
        begin = number.to(tl.int64) * sizes.T
        length = sizes.T
        tile = slot % tiles
    return (number, begin, length), tile * BT - BEFORE


@triton.jit
def load_input(inputs, sequence, first, u, j, DIMS: tl.constexpr, PAST: tl.constexpr):
    """Rows u of a sequence, columns j: of x, of `past` before it if this is a tile where it may be, 0 elsewhere."""
    x = load_rows(inputs.x, inputs.x_stride, sequence, u, j, DIMS)
    if PAST:  # noqa: SIM102  (a compile-time switch around a branch)
        if first <= 0:
            # mutant: past-of-another-row
            p = inputs.past + (sequence[0].to(tl.int64) * (DIMS.W - 1) + DIMS.W - 1 + u) * DIMS.D + j
            before = (u < 0) & (u >= 1 - DIMS.W) & (j < DIMS.D)
            x = tl.where(u < 0, tl.load(p, mask=before, other=0.0), x)
    return x


@triton.jit
def load_rows(p, stride, sequence, u, j, DIMS: tl.constexpr):
    """Rows u of a sequence, columns j, of a tensor that has the rows of x; 0 beyond them."""
    _, begin, length = sequence
    here = (u >= 0) & (u < length) & (j < DIMS.D)
    return tl.load(p + (begin + u) * stride + j, mask=here, other=0.0)


@triton.jit
def load_weights(inputs, j, DIMS: tl.constexpr, BIAS: tl.constexpr):
    """A tuple of W rows [1, BD] in float32, the token's own last, and after them the bias."""
    W: tl.constexpr = DIMS.W
    ws = ()
    for i in tl.static_range(W):
        ws = ws + (tl.load(inputs.weight + j * W + i, mask=j < DIMS.D, other=0.0).to(tl.float32),)
    if BIAS:
        ws = ws + (tl.load(inputs.bias + j, mask=j < DIMS.D, other=0.0).to(tl.float32),)
    return ws


@triton.jit
def convolved(xs, ws, r: tl.constexpr, W: tl.constexpr, BIAS: tl.constexpr):
    """z [N, BD] of row r, whose own input is tile r + W - 1."""
    z = xs[r + W - 1].to(tl.float32) * ws[W - 1]
    for i in tl.static_range(1, W):
        # mutant: taps-in-reverse
        z += xs[r + W - 1 - i].to(tl.float32) * ws[W - 1 - i]
    if BIAS:
        z += ws[W]
    return z


@triton.jit
def program_tile(DIMS: tl.constexpr):
    """(slot, columns [1, BD], rows [N, 1] of the runs) of a program. The tiles of one row are neighbours."""
    tiles: tl.constexpr = (DIMS.D + DIMS.BD - 1) // DIMS.BD
    program = tl.program_id(0)
    j = (program % tiles) * DIMS.BD + tl.arange(0, DIMS.BD)[None, :]
    return program // tiles, j, tl.arange(0, DIMS.N)[:, None] * DIMS.R


@triton.jit(do_not_specialize=["sizes"])
def convolve_kernel(inputs, p_y, p_last, sizes, DIMS: tl.constexpr, FLAGS: tl.constexpr):
    """y of N R rows and BD channels; the first tile of a sequence stores its last inputs. Grid (slots * cdiv(D, BD),).

    Registers hold R + W - 1 tiles [N, BD] of x in its type and W rows of weights in float32.
    """
    W: tl.constexpr = DIMS.W
    R: tl.constexpr = DIMS.R
    slot, j, runs = program_tile(DIMS)
    sequence, first = find_rows(slot, inputs.offsets, sizes, DIMS.N * R, 0, FLAGS.PACKED)
    number, begin, length = sequence
    ws = load_weights(inputs, j, DIMS, FLAGS.BIAS)
    xs = ()
    for r in tl.static_range(R + W - 1):  # all loads before the first store, so that they overlap
        xs = xs + (load_input(inputs, sequence, first, first + runs + (r - W + 1), j, DIMS, FLAGS.PAST and r < W - 1),)
    for r in tl.static_range(R):
        y = convolved(xs, ws, r, W, FLAGS.BIAS)
        if FLAGS.SILU:
            y = y * sigmoid(y)
        u = first + runs + r
        p = p_y + (begin + u) * DIMS.D + j
        tl.store(p, y.to(p_y.dtype.element_ty), mask=(u < length) & (j < DIMS.D))
    if first == 0:
        for m in tl.static_range(W - 1):
            # mutant: last-inputs-of-the-wrong-row
            row = length - (W - 1) + m + tl.zeros([1, 1], tl.int32)
            p_row = p_last + (number.to(tl.int64) * (W - 1) + m) * DIMS.D + j
            tl.store(p_row, load_input(inputs, sequence, 0, row, j, DIMS, FLAGS.PAST), mask=j < DIMS.D)


@triton.jit(do_not_specialize=["sizes"])
def convolve_backward_kernel(inputs, grads, sizes, DIMS: tl.constexpr, FLAGS: tl.constexpr):
    """dx of N R rows and BD channels, those of `past` among them, and their part of dw and db. Grid as above.

    Registers hold R + 2 (W - 1) tiles of x and R + W - 1 of dy in their type, W tiles of dz and rows of weights and
    W + 1 sums in float32. z is computed again, for the W - 1 rows after a run twice.
    """
    W: tl.constexpr = DIMS.W
    N: tl.constexpr = DIMS.N
    BD: tl.constexpr = DIMS.BD
    R: tl.constexpr = DIMS.R
    BT: tl.constexpr = N * R
    BEFORE: tl.constexpr = (W - 1) if FLAGS.PAST else 0
    slot, j, runs = program_tile(DIMS)
    sequence, first = find_rows(slot, inputs.offsets, sizes, BT, BEFORE, FLAGS.PACKED)
    ws = load_weights(inputs, j, DIMS, FLAGS.BIAS)
    xs, dys, dzs = (), (), ()
    for r in tl.static_range(R + 2 * (W - 1)):
        u = first + runs + (r - W + 1)
        xs = xs + (load_input(inputs, sequence, first, u, j, DIMS, FLAGS.PAST and r < 2 * (W - 1)),)
    for r in tl.static_range(R + W - 1):
        dys = dys + (load_rows(grads.dy, grads.dy_stride, sequence, first + runs + r, j, DIMS),)
    totals = (tl.zeros([N, BD], tl.float32),) * (W + 1)
    for r in tl.static_range(R + W - 1):
        dz = dys[r].to(tl.float32)
        if FLAGS.SILU:
            z = convolved(xs, ws, r, W, FLAGS.BIAS)
            s = sigmoid(z)
            # mutant: slope-of-the-sigmoid-alone
            dz *= s * (1.0 + z * (1.0 - s))
        dzs = dzs + (dz,)
        if r < R:
            totals = add_products(totals, dz, xs, r, W)
        if r >= W - 1:  # the W rows of dz that dx of row r - W + 1 needs are computed
            dx = dzs[r - W + 1] * ws[W - 1]
            for i in tl.static_range(1, W):
                # mutant: dx-of-earlier-tokens
                dx += dzs[r - W + 1 + i] * ws[W - 1 - i]
            store_input_gradient(grads, sequence, first, first + runs + (r - W + 1), j, dx, DIMS, FLAGS)
    p = grads.sums + slot.to(tl.int64) * (W + 1) * DIMS.D + j
    for i in tl.static_range((W + 1) if FLAGS.BIAS else W):
        tl.store(p + i * DIMS.D, tl.sum(totals[i], 0)[None, :], mask=j < DIMS.D)


@triton.jit
def add_products(totals, dz, xs, r: tl.constexpr, W: tl.constexpr):
    """The sums for dw and db with those of row r."""
    sums = ()
    for i in tl.static_range(W):
        # mutant: dweight-of-the-wrong-tap
        sums = sums + (totals[i] + dz * xs[r + i].to(tl.float32),)
    return sums + (totals[W] + dz,)


@triton.jit
def store_input_gradient(grads, sequence, first, u, j, dx, DIMS: tl.constexpr, FLAGS: tl.constexpr):
    """Add dlast to the gradient [N, BD] of rows u and store it in dx, and in dpast for rows before the first one."""
    W: tl.constexpr = DIMS.W
    number, begin, length = sequence
    if FLAGS.DLAST:  # noqa: SIM102  (a compile-time switch around a branch)
        if first + DIMS.N * DIMS.R > length - (W - 1):
            # mutant: dlast-of-the-wrong-row
            m = u - length + (W - 1)
            p = grads.dlast + (number.to(tl.int64) * (W - 1) + m) * DIMS.D + j
            dx += tl.load(p, mask=(m >= 0) & (m < W - 1) & (j < DIMS.D), other=0.0).to(tl.float32)
    p = grads.dx + (begin + u) * DIMS.D + j
    tl.store(p, dx.to(grads.dx.dtype.element_ty), mask=(u >= 0) & (u < length) & (j < DIMS.D))
    if FLAGS.PAST:  # noqa: SIM102  (a compile-time switch around a branch)
        if first < 0:
            p = grads.dpast + (number.to(tl.int64) * (W - 1) + W - 1 + u) * DIMS.D + j
            # mutant: dpast-is-not-stored
            tl.store(p, dx.to(grads.dpast.dtype.element_ty), mask=(u < 0) & (j < DIMS.D))


@triton.jit
def convolve_step_kernel(
    p_x, x_stride, p_state, p_weight, p_bias, p_y, D: tl.constexpr, W: tl.constexpr, BD: tl.constexpr,
    SILU: tl.constexpr, BIAS: tl.constexpr,
):  # fmt: skip
    """One token of BD channels of one row; the state [B,D,W] moves on in place. Grid (B * cdiv(D, BD),).

    The state is loaded once and stored once: 2 W s and 2 s bytes a channel.
    """
    tiles: tl.constexpr = (D + BD - 1) // BD
    row = (tl.program_id(0) // tiles).to(tl.int64)
    j = (tl.program_id(0) % tiles) * BD + tl.arange(0, BD)
    valid = j < D
    state = p_state + (row * D + j) * W
    x = tl.load(p_x + row * x_stride + j, mask=valid, other=0.0)
    values = ()
    for i in tl.static_range(1, W):
        # mutant: step-without-shift
        values = values + (tl.load(state + i, mask=valid, other=0.0),)
    values = values + (x,)
    z = tl.zeros([BD], tl.float32)
    for i in tl.static_range(W):
        z += values[i].to(tl.float32) * tl.load(p_weight + j * W + i, mask=valid, other=0.0).to(tl.float32)
    if BIAS:
        z += tl.load(p_bias + j, mask=valid, other=0.0).to(tl.float32)
    if SILU:
        z = z * sigmoid(z)
    tl.debug_barrier()  # no thread stores where another one has yet to load
    for i in tl.static_range(W):
        tl.store(state + i, values[i], mask=valid)
    tl.store(p_y + row * D + j, z.to(p_y.dtype.element_ty), mask=valid)
