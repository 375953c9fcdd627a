"""States along a sequence: which chunks end with one, and where it is stored.

A call with `state_every` n has a state after every n tokens of a sequence and one after its last token. A chunk divides
n, so a state is always the one that some chunk ends with:

    states of a sequence [ceil(T/n),HV,K,V]; the i-th is that after chunk min((i + 1) n / C, chunks) - 1

A batch has them sequence after sequence, packed sequences too (an empty one has none). Kernels are compiled for EVERY,
the chunks from one state to the next; 0 stands for a call without them, which has none of this code.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .common import load_tile, store_tile


@triton.jit
def first_along(sequence, offsets, total, C: tl.constexpr, PACKED: tl.constexpr, EVERY: tl.constexpr):
    """The index of the first state of a sequence among the states of all sequences."""
    if PACKED:
        # mutant: states-of-packed-sequences
        first = tl.load(offsets + sequence)
    else:
        first = sequence.to(tl.int64) * tl.cdiv(total, EVERY * C)
    return first


@triton.jit
def keys_along(chunk, chunks, K: tl.constexpr, EVERY: tl.constexpr):
    """K where the chunk ends with a state, else 0: rows that are stored or loaded without a branch in the loop."""
    # mutant: no-state-at-the-end-of-a-sequence
    ends = ((chunk + 1) % EVERY == 0) | (chunk + 1 == chunks)
    return tl.where(ends, K, 0)


@triton.jit
def store_along(p, S, first, chunk, chunks, head, col, BV: tl.constexpr, DIMS: tl.constexpr, EVERY: tl.constexpr):
    """Store S [KP, BV] of a bh, as the chunk leaves it, where the chunk ends with a state."""
    # mutant: state-of-the-wrong-chunk
    at = (first + chunk // EVERY) * DIMS.HV + head
    rows = keys_along(chunk, chunks, DIMS.K, EVERY)
    store_tile(p + at * DIMS.K * DIMS.V, DIMS.V, rows, col, S, DIMS.V, DIMS.KP, BV)


@triton.jit
def load_along(p, first, chunk, chunks, head, col, BV: tl.constexpr, DIMS: tl.constexpr, EVERY: tl.constexpr):
    """[KP, BV] of the gradient of the state that the chunk ends with; 0 where it ends with none."""
    at = (first + chunk // EVERY) * DIMS.HV + head
    rows = keys_along(chunk, chunks, DIMS.K, EVERY)
    return load_tile(p + at * DIMS.K * DIMS.V, DIMS.V, rows, col, DIMS.V, DIMS.KP, BV)
