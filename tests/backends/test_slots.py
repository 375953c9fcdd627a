"""Packed sequences never share the slot of a chunk, in the launch code of Python and in csrc/cuda alike.

Triton's kernels have the same test in tests/backends/triton_interpreted/test_interpreted_slots.py.
"""

from __future__ import annotations

import ctypes
import subprocess
from pathlib import Path

import pytest
from helpers.slots import LENGTHS, offsets_of, slots
from hypothesis import given
from hypothesis import strategies as st

from sleepkern.backends.cuda import recurrence as cuda
from sleepkern.backends.native.module import _C
from sleepkern.problems.recurrence import Tensors, describe
from sleepkern.rules import GATED_DELTA_RULE
from sleepkern.testing import Shape, make_inputs

ROOT = Path(__file__).resolve().parents[2]
SOURCE = r"""
#include "cuda_on_cpu.h"
#include "cuda/recurrence/tokens.cuh"
extern "C" void slots(const int64_t* offsets, int64_t sequences, int64_t T, int64_t* first, int64_t* count) {
  sleepkern::Problem p{};
  p.offsets = offsets, p.sequences = sequences, p.T = T;
  for (int64_t s = 0; s < sequences; ++s) first[s] = sleepkern::cuda::first_slot(p, s);
  *count = sleepkern::cuda::slots_of(p);
}
"""


@pytest.fixture(scope="module")
def native(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    """The two functions of csrc/cuda/recurrence/tokens.cuh, compiled for the CPU."""
    folder = tmp_path_factory.mktemp("slots")
    (folder / "slots.cpp").write_text(SOURCE)
    includes = [f"-I{ROOT / 'csrc'}", f"-I{ROOT / 'tests' / 'backends' / 'cuda_emulated'}"]
    command = ["g++", "-O0", "-std=c++17", "-shared", "-fPIC", "-w", "-DSLEEPKERN_CUDA_ON_CPU", *includes]
    done = subprocess.run(
        [*command, "slots.cpp", "-o", "slots.so"], cwd=folder, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return ctypes.CDLL(str(folder / "slots.so"))


@given(lengths=LENGTHS, C=st.sampled_from([16, 32, 64]))
def test_no_two_sequences_share_a_slot(lengths: list[int], C: int) -> None:
    assert len(slots(lengths, C)) == sum(-(-length // C) for length in lengths)


@pytest.mark.skipif(_C is None, reason="sleepkern._C is not built")
@given(lengths=LENGTHS)
def test_cuda_has_the_slots_of_the_rule(native: ctypes.CDLL, lengths: list[int]) -> None:
    offsets, n, C = offsets_of(lengths), len(lengths), _C.cuda_chunk
    first, count = (ctypes.c_int64 * n)(), ctypes.c_int64()
    whole = (ctypes.c_int64 * (n + 1))(*offsets)
    native.slots(whole, ctypes.c_int64(n), ctypes.c_int64(offsets[-1]), first, ctypes.byref(count))
    assert list(first) == [begin // C + s for s, begin in enumerate(offsets[:-1])]
    x = Tensors(*make_inputs(GATED_DELTA_RULE, Shape(H=1, HV=1, K=4, V=4, lengths=tuple(lengths))).values())
    assert count.value == cuda._chunks(describe(GATED_DELTA_RULE, x, None, False))
    assert count.value > max(slots(lengths, C), default=-1)
