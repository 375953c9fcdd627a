"""The chunks that Triton's kernels find in the slots are those of the rule in sleepkern/rules.py."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from helpers.slots import LENGTHS, offsets_of, slots
from hypothesis import given, settings
from hypothesis import strategies as st

from sleepkern.backends.triton.common import Inputs, Sizes, find_chunk, find_sequence
from sleepkern.backends.triton.launch import Job
from sleepkern.problems.recurrence import Tensors, describe
from sleepkern.rules import GATED_DELTA_RULE
from sleepkern.testing import Shape, make_inputs


@triton.jit
def chunks_kernel(p_first, p_rows, inputs, sizes, C: tl.constexpr):
    """first, rows = find_chunk of each slot."""
    slot = tl.program_id(0)
    first, rows = find_chunk(slot, inputs, sizes, C, True)
    tl.store(p_first + slot, first)
    tl.store(p_rows + slot, rows)


@triton.jit
def sequences_kernel(p_slot, inputs, sizes, C: tl.constexpr):
    """The first slot of each sequence."""
    sequence = tl.program_id(0)
    _, _, slot = find_sequence(sequence, inputs, sizes, C, True)
    tl.store(p_slot + sequence, slot)


@settings(max_examples=25)
@given(lengths=LENGTHS, C=st.sampled_from([16, 32, 64]))
def test_kernels_find_the_chunk_of_each_slot(lengths: list[int], C: int) -> None:
    expected, offsets, n = slots(lengths, C), offsets_of(lengths), len(lengths)
    inputs = Inputs(*[None] * 5, torch.tensor(offsets), *[0] * 5)
    sizes = Sizes(*[offsets[-1] if name == "T" else n if name == "sequences" else 1 for name in Sizes._fields])
    count = offsets[-1] // C + n
    first, rows = torch.zeros(count, dtype=torch.int64), torch.zeros(count, dtype=torch.int32)
    chunks_kernel[(count,)](first, rows, inputs, sizes, C=C)
    found = {slot: (int(first[slot]), int(rows[slot])) for slot in range(count) if rows[slot] > 0}
    assert found == {slot: (row, left) for slot, (_, row, left) in expected.items()}
    begins = torch.zeros(n, dtype=torch.int32)
    sequences_kernel[(n,)](begins, inputs, sizes, C=C)
    assert begins.tolist() == [begin // C + s for s, begin in enumerate(offsets[:-1])]


@settings(max_examples=25)
@given(lengths=LENGTHS)
def test_the_launch_has_a_program_for_each_slot(lengths: list[int]) -> None:
    x = Tensors(*make_inputs(GATED_DELTA_RULE, Shape(H=1, HV=1, K=4, V=4, lengths=tuple(lengths))).values())
    job = Job(describe(GATED_DELTA_RULE, x, None, False), x, True, "ieee", "forward")
    assert job.slots > max(slots(lengths, job.plan.chunk), default=-1)
