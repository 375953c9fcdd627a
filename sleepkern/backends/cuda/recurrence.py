"""Hand-written CUDA: looped ingestion with the window in shared memory for all passes, and decode.

A single pass over many tokens is an ordinary forward or backward, which this backend leaves to the backends after it.
For the gradients of a replay it calls one of them itself. Kernels: csrc/cuda, docs/kernels/cuda_replay.md.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from ...problems.recurrence import Problem, RecurrenceResult, Tensors
from ...rules import DELTA_RULE, GATED_DELTA_RULE, GLA, KDA, SIMPLE_GLA
from .. import chunked, triton
from ..cpu import recurrence as cpu
from ..interface import REPLAY, Ordinary, refusal
from ..native.module import _C, TYPE_CODES
from ..native.views import address, on_device_of, stream_of
from ..replay import backward as replay_backward
from ..replay import costs
from . import device as gpu
from .decode import DECODE_LIMIT as DECODE_LIMIT
from .decode import decode, inputs_of, sizes_of
from .decode import step as step
from .decode import step_in_pool as step_in_pool
from .decode import step_states as step_states
from .decode import try_fast_decode as try_fast_decode
from .device import Device

NAME = "cuda"
SUPPORTS = frozenset({GATED_DELTA_RULE, KDA, DELTA_RULE, SIMPLE_GLA, GLA})
OPTIONS = REPLAY | {"state_bf16"}
why_not_on: Callable[[str], str | None] = gpu.why_not_on
"""The fast path asks it whether the backend takes tensors of the CPU (backends/interface.py)."""
ORDINARY: tuple[Ordinary, ...] = (triton, cpu, chunked)
"""Backends that make the ordinary passes of a backward, best first."""
CudaReplay = Any
"""The struct of this name in sleepkern._C."""
_MODES = {"bf16": 0, "fp32x3": 1}
"""Codes of csrc/cuda/arch/mma_tiles.h Mode."""


class ReplayPlan(NamedTuple):
    """How a replay is cut.

    method        wy, affine or rank (csrc/cuda/recurrence/single_chunk.cuh, multi_chunk.cuh)
    single_chunk  one launch computes the chunk factors of the only chunk and makes the passes
    v_tile        value columns of a CTA
    slots         chunks that the shared memory of a CTA holds
    """

    method: Literal["wy", "affine", "rank"]
    single_chunk: bool
    v_tile: int
    slots: int


def why_not(problem: Problem) -> str | None:
    """None for replay by the delta rules and for a few tokens, on a GPU of compute capability 8.0 or more."""
    reason = gpu.why_not_on(problem.device)
    if reason is not None:
        return reason
    if problem.dtype not in TYPE_CODES:
        return f"no kernel for {problem.dtype}, only float32, bfloat16 and float16"
    if not _replays(problem):
        if problem.T > DECODE_LIMIT or problem.packed or not problem.output:
            return f"one pass is its own only with outputs of at most {DECODE_LIMIT} tokens, not packed"
        if max(problem.K, problem.V) > _C.head_limit:
            return f"heads of at most {_C.head_limit}, got K = {problem.K}, V = {problem.V}"
        return None
    if not problem.rule.delta:
        return "rules without delta replay in closed form, which needs no kernel"
    if problem.method == "repeat":
        return "replays by wy, affine or rank, not by repeat"
    if problem.T == 0:
        return "there are no tokens"
    if problem.K > _C.cuda_widest_key:
        return f"replay with K of at most {_C.cuda_widest_key}, got {problem.K}"
    if problem.tol is not None and problem.V > _C.cuda_widest_block:
        return f"tol looks at a whole head in one CTA, V of at most {_C.cuda_widest_block}, got {problem.V}"
    reason = costs.refuse(problem, _C.cuda_chunk, packs=False)
    if reason is not None:
        return reason
    return None if _plan(problem) else _does_not_fit(problem)


def kernel(problem: Problem) -> str:
    """Describe in one line the code that runs."""
    if not _replays(problem):
        return "CUDA, token by token"
    plan = _plan(problem)
    if plan is None:
        return "CUDA"
    where = "one launch" if plan.single_chunk else f"{plan.slots} chunks in shared memory"
    return f"CUDA, {_mode(problem)} products, replay by {plan.method}, {where}, {plan.v_tile} value columns a CTA"


def method_of(problem: Problem) -> str:
    """Name the replay method."""
    plan = _plan(problem) if _replays(problem) else None
    return "wy" if plan is None else plan.method


def forward(problem: Problem, x: Tensors) -> RecurrenceResult:
    """Compute the output of the last of `problem.passes` passes and the state after it."""
    size = (problem.sequences, problem.HV, problem.K, problem.V)
    if not _replays(problem):
        dense = torch.contiguous_format
        new = x.k.new_zeros(size, dtype=torch.float32) if x.state is None else x.state.clone(memory_format=dense)
        return RecurrenceResult(decode(problem, x, new, None), new)
    return _replay(problem, x)


def backward(
    problem: Problem, x: Tensors, do: Tensor | None, dstate: Tensor | None, dstates: Tensor | None = None
) -> list[Tensor | None]:
    """Compute the gradients of q, k, v, g, beta and the state."""
    ordinary = _ordinary(problem)
    if not _replays(problem):
        return ordinary.backward(problem, x, do, dstate)
    passes_done = None
    if problem.tol is not None:
        passes_done = forward(problem._replace(output=False), x._replace(q=None)).passes
    one_pass, one_backward = ordinary.pieces(problem)
    fits = _C.cuda_powers_memory(K=problem.K, backward=True) <= gpu.current_device().shared_memory
    chain = replay_backward.Chain(powers, powers_backward) if fits else replay_backward.TORCH
    return replay_backward.backward(problem, x, do, dstate, passes_done, one_pass, one_backward, chain)


def powers(A: Tensor, start: Tensor, after: Tensor, passes: int) -> Tensor:
    """Compute S_0 ... S_(passes-1) [passes,n,HV,K,V] of S <- A S + B from S_0 and S_1; A [n,HV,K,K], all float32."""
    n, HV, K, V = start.shape
    A, start, after = A.contiguous(), start.contiguous(), after.contiguous()
    states = start.new_empty((passes, n, HV, K, V))
    with on_device_of(start):
        _C.cuda_powers(
            heads=n * HV, K=K, V=V, passes=passes, block=_v_tile(n * HV, V), A=A.data_ptr(), states=states.data_ptr(),
            start=start.data_ptr(), after=after.data_ptr(), stream=stream_of(start),
        )  # fmt: skip
    return states


def powers_backward(
    A: Tensor, states: Tensor, last: Tensor, passes_done: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute dA, dB and the gradient of S_0 from `last`, the gradient of the state before each head's last pass."""
    passes, n, HV, K, V = states.shape
    A, last = A.contiguous(), last.contiguous()
    passes_done = None if passes_done is None else passes_done.to(torch.int32).contiguous()
    v_tile = _v_tile(n * HV, V)
    dA = last.new_empty((-(-V // v_tile), n, HV, K, K))
    dB, dstart = torch.empty_like(last), torch.empty_like(last)
    with on_device_of(last):
        _C.cuda_powers_backward(
            heads=n * HV, K=K, V=V, passes=passes, block=v_tile, A=A.data_ptr(), states=states.data_ptr(),
            passes_done=address(passes_done), last=last.data_ptr(), dA=dA.data_ptr(), dB=dB.data_ptr(),
            dstart=dstart.data_ptr(), stream=stream_of(last),
        )  # fmt: skip
    return dA.sum(0), dB, dstart


@lru_cache(maxsize=1024)
def _replay_call(problem: Problem, plan: ReplayPlan) -> CudaReplay:
    """Describe a replay for _C in the same way."""
    call = _C.CudaReplay()
    call.problem = sizes_of(problem)
    call.mode = _MODES[_mode(problem)]
    call.passes = problem.passes
    call.tol = problem.tol or 0.0
    call.affine = plan.method == "affine"
    call.token_space = plan.method == "rank"
    call.single_chunk = plan.single_chunk
    call.block = plan.v_tile
    call.slots = plan.slots
    return call


def _replay(problem: Problem, x: Tensors) -> RecurrenceResult:
    p, plan = problem, _plan(problem)
    assert plan is not None
    heads = (p.sequences, p.HV)
    final = x.k.new_empty((*heads, p.K, p.V), dtype=torch.float32)
    o = torch.empty_like(x.v, memory_format=torch.contiguous_format) if p.output else None
    before_last = torch.empty_like(final) if plan.method == "affine" and p.output else None
    residual = passes_done = None
    if p.tol is not None:
        residual = x.k.new_empty(heads, dtype=torch.float32)
        passes_done = x.k.new_empty(heads, dtype=torch.int32)
    state = None if x.state is None else x.state.contiguous()
    offsets = None if x.cu_seqlens is None else x.cu_seqlens.to(x.k.device, torch.int64).contiguous()
    tiles, chunk_decay, U, queries = (None,) * 4 if plan.single_chunk else _chunk_factors(p, x.k)
    inputs, _alive = inputs_of(p, x, p.output)
    with on_device_of(x.k):
        _C.cuda_replay(
            _replay_call(p, plan), inputs=inputs, offsets=address(offsets), state=address(state), o=address(o),
            final_state=final.data_ptr(), residual=address(residual), passes_done=address(passes_done),
            before_last=address(before_last), tiles=address(tiles), chunk_decay=address(chunk_decay), U=address(U),
            queries=address(queries), stream=stream_of(x.k),
        )  # fmt: skip
    return RecurrenceResult(o, final, residual, passes_done)


def _chunk_factors(p: Problem, like: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Allocate the chunk factors (csrc/cuda/recurrence/params.h ChunkFactors) between the two launches of a replay."""
    width = 64 if p.K <= 64 else 128
    n, C, dtype = _chunks(p) * p.HV, _C.cuda_chunk, torch.bfloat16 if _mode(p) == "bf16" else torch.float32
    return (
        like.new_empty(n * 2 * C * width, dtype=dtype),
        like.new_empty(n * width, dtype=torch.float32),
        like.new_empty(n * -(-p.V // 16) * 16 * C, dtype=torch.float32),
        like.new_empty(n * (C * width + C * C), dtype=dtype) if p.output else None,
    )


def _plan(problem: Problem) -> ReplayPlan | None:
    """The plan of a replay; None where shared memory does not hold it."""
    return _plan_on(problem, gpu.current_device())


@lru_cache(maxsize=1024)
def _plan_on(problem: Problem, device: Device) -> ReplayPlan | None:
    p, mode = problem, _mode(problem)
    width = 64 if p.K <= 64 else 128
    if _SINGLE_CHUNK[mode, width, p.output, p.rule.gate == "channel"] > device.shared_memory:
        return None
    v_tile = _v_tile(p.sequences * p.HV, p.V, whole=p.tol is not None, device=device)
    if _one_chunk(p) and p.method != "affine" and (mode == "bf16" or p.tol is None or v_tile <= _C.cuda_value_tile):
        v_tile = v_tile if mode == "bf16" else min(v_tile, _C.cuda_value_tile)
        rank = p.rule.gate != "channel" and p.tol is None and (p.method == "rank" or (p.passes > 2 and 2 * p.T <= p.K))
        return ReplayPlan("rank" if rank and p.method != "wy" else "wy", True, v_tile, 0)
    chunks = -(-p.T // _C.cuda_chunk)  # of the longest sequence there can be
    fixed, each = _MULTI_CHUNK[mode, width, p.output, v_tile]
    slots = min((device.shared_memory - fixed) // each, chunks, 16)
    if slots < 1:
        return None
    resident = slots == chunks
    if p.method == "wy":
        return ReplayPlan("wy", False, v_tile, slots) if resident or p.tol is None else None
    T, K, V = p.T, p.K, p.V
    method = p.method
    if method == "auto":
        affine = costs.affine(costs.state_pass(T, K, K), K, V)  # the first pass leaves B
        method = costs.cheapest(p, wy=costs.wy(T, K, V) if resident else None, affine=affine)
    return ReplayPlan("wy" if method == "wy" else "affine", False, v_tile, slots)


def _v_tile(heads: int, V: int, whole: bool = False, device: Device | None = None) -> int:
    """Value columns of a CTA: as many as give three of four multiprocessors a CTA, at least 32."""
    device = device or gpu.current_device()
    v_tile: int = min(_C.cuda_widest_block, -(-V // 16) * 16)
    while not whole and v_tile > 32 and 4 * heads * -(-V // v_tile) < 3 * device.multiprocessors:
        v_tile = max(32, v_tile // 32 * 16)
    return v_tile


def _multi_chunk_table() -> dict[tuple[str, int, bool, int], tuple[int, int]]:
    """Bytes of shared memory, fixed and of a slot, of a replay in two launches: by mode, width, output and v-tile."""
    table = {}
    for mode, code in _MODES.items():
        for width in (64, 128):
            for output in (False, True):
                for v_tile in range(16, _C.cuda_widest_block + 1, 16):
                    one, two = (
                        _C.cuda_multi_chunk_memory(mode=code, K=width, output=output, block=v_tile, slots=slots)
                        for slots in (1, 2)
                    )
                    table[mode, width, output, v_tile] = 2 * one - two, two - one
    return table


def _single_chunk_table() -> dict[tuple[str, int, bool, bool], int]:
    """Bytes of shared memory of a replay in one launch, by mode, width, output and channel decay."""
    flags = (False, True)
    return {
        (mode, width, output, channel): _C.cuda_single_chunk_memory(mode=code, K=width, output=output, channel=channel)
        for mode, code in _MODES.items() for width in (64, 128) for output in flags for channel in flags
    }  # fmt: skip


_CUDA = _C is not None and _C.has_cuda
_MULTI_CHUNK = _multi_chunk_table() if _CUDA else {}
_SINGLE_CHUNK = _single_chunk_table() if _CUDA else {}


def _does_not_fit(problem: Problem) -> str:
    limit = gpu.current_device().shared_memory
    if problem.method == "wy" and problem.tol is not None:
        return "wy with tol needs a window whose chunks all stay in shared memory; affine does not"
    return f"K = {problem.K} with {_mode(problem)} products needs more than a CTA's {limit} bytes of shared memory"


def _replays(problem: Problem) -> bool:
    return problem.passes > 1 or problem.tol is not None


def _one_chunk(problem: Problem) -> bool:
    limit: int = _C.cuda_chunk
    return not problem.packed and problem.T <= limit


def _chunks(problem: Problem) -> int:
    """Slots of the chunks of all sequences (sleepkern/rules.py); packed sequences may leave some slots empty."""
    p, C = problem, _C.cuda_chunk
    return int(p.T // C + p.sequences if p.packed else -(-p.T // C) * p.sequences)


def _mode(problem: Problem) -> str:
    """How products are computed: in bf16 for bf16 inputs, else in three tf32 products, which keep float32's digits."""
    return "bf16" if problem.dtype == torch.bfloat16 else "fp32x3"


def _ordinary(problem: Problem) -> Ordinary:
    one = problem._replace(passes=1, tol=None, method="auto")
    return next(backend for backend in ORDINARY if refusal(backend, one) is None)
