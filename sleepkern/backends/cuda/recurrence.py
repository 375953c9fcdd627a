"""Hand-written CUDA: looped ingestion with the window in shared memory for all passes, and decode.

What it does not do, a single pass over many tokens, is an ordinary forward or backward, which it leaves to the backends
after it; through the gradients of a replay it calls one of them itself. Kernels: csrc/cuda, docs/looped_ingestion.md.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from ...problems.recurrence import Problem, RecurrenceResult, Tensors
from ...rules import DELTA_RULE, GATED_DELTA_RULE, GLA, KDA, SIMPLE_GLA
from .. import chunked, triton
from ..cpu import recurrence as cpu
from ..interface import REPLAY, Ordinary, refusal
from ..native.module import _C, GATE_CODES, TYPE_CODES
from ..native.views import Rows, address, on_device_of, rows, stream_of
from ..replay import backward as replay_backward
from ..replay import costs

NAME = "cuda"
SUPPORTS = frozenset({GATED_DELTA_RULE, KDA, DELTA_RULE, SIMPLE_GLA, GLA})
OPTIONS = REPLAY
STEP_LIMIT = 8
"""Tokens that are stepped one by one."""
WIDEST = 256
"""Of a state that is stepped; replay has K up to 128."""
ORDINARY: tuple[Ordinary, ...] = (triton, cpu, chunked)
"""Where the ordinary passes of a backward are made, best first."""
_MODES = {"bf16": 0, "exact": 1}


class Device(NamedTuple):
    """What plans depend on."""

    capability: tuple[int, int]
    shared_memory: int
    """Bytes that a block may have."""
    multiprocessors: int


class Plan(NamedTuple):
    """How a replay is cut.

    method  wy, affine or rank (csrc/cuda/recurrence/single_chunk.cuh, multi_chunk.cuh)
    window  one chunk, prepared and replayed in one launch
    block   value columns of a block
    slots   chunks that its shared memory holds
    """

    method: Literal["wy", "affine", "rank"]
    window: bool
    block: int
    slots: int


def why_not(problem: Problem) -> str | None:
    """None for replay by the delta rules and for a few tokens, on a GPU of compute capability 8.0 or more."""
    reason = why_not_on(problem.device)
    if reason is not None:
        return reason
    if problem.dtype not in TYPE_CODES:
        return f"no kernel for {problem.dtype}, only float32, bfloat16 and float16"
    if not _replays(problem):
        if problem.T > STEP_LIMIT or problem.packed or not problem.output:
            return f"one pass is its own only with readouts of at most {STEP_LIMIT} tokens, not packed"
        if max(problem.K, problem.V) > WIDEST:
            return f"heads of at most {WIDEST}, got K = {problem.K}, V = {problem.V}"
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
        return f"tol looks at a whole head in one block, V of at most {_C.cuda_widest_block}, got {problem.V}"
    reason = costs.refuse(problem, _C.cuda_chunk, packs=False)
    if reason is not None:
        return reason
    return None if _plan(problem) else _does_not_fit(problem)


def why_not_on(device: str) -> str | None:
    """None, or the sentence why nothing can run on a type of device."""
    if _C is None or not _C.has_cuda:
        return "sleepkern._C was built without CUDA"
    if device != "cuda":
        return f"runs on a GPU, the tensors are on {device}"
    if device_at_hand().capability < (8, 0):
        return f"needs compute capability 8.0, got {'.'.join(map(str, device_at_hand().capability))}"
    return None


why_not_on._dynamo_marked_constant = True  # type: ignore[attr-defined]  # see backends/triton/__init__.py


def device_at_hand() -> Device:
    """The current GPU; where there is none (`explain` asks about one), an H100."""
    return _device(torch.cuda.current_device()) if _gpu_is_there() else Device((9, 0), 232448, 132)


device_at_hand._dynamo_marked_constant = True  # type: ignore[attr-defined]


@lru_cache(maxsize=1)
def _gpu_is_there() -> bool:
    return torch.cuda.is_available()


@lru_cache(maxsize=64)
def _device(index: int) -> Device:
    found = _C.cuda_devices()[index]
    return Device(tuple(found["capability"]), found["shared_memory"], found["multiprocessors"])


def kernel(problem: Problem) -> str:
    """One line on the code that runs."""
    if not _replays(problem):
        return "CUDA, token by token"
    plan = _plan(problem)
    if plan is None:
        return "CUDA"
    where = "one launch" if plan.window else f"{plan.slots} chunks in shared memory"
    return f"CUDA, {_mode(problem)} products, replay by {plan.method}, {where}, {plan.block} value columns a block"


def method_of(problem: Problem) -> str:
    """The replay method."""
    plan = _plan(problem) if _replays(problem) else None
    return "wy" if plan is None else plan.method


def forward(problem: Problem, x: Tensors) -> RecurrenceResult:
    """Readouts and final state of `problem.passes` passes."""
    size = (problem.sequences, problem.HV, problem.K, problem.V)
    if not _replays(problem):
        dense = torch.contiguous_format
        new = x.k.new_zeros(size, dtype=torch.float32) if x.state is None else x.state.clone(memory_format=dense)
        return RecurrenceResult(_step(problem, x, new, None), new)
    return _replay(problem, x)


def backward(problem: Problem, x: Tensors, do: Tensor | None, dstate: Tensor | None) -> list[Tensor | None]:
    """Gradients of q, k, v, g, beta, state."""
    ordinary = _ordinary(problem)
    if not _replays(problem):
        return ordinary.backward(problem, x, do, dstate)
    made = None
    if problem.tol is not None:
        made = forward(problem._replace(output=False), x._replace(q=None)).passes
    one_pass, one_backward = ordinary.pieces(problem)
    fits = _C.cuda_chain_memory(problem.K, True) <= device_at_hand().shared_memory
    chain = replay_backward.Chain(powers, adjoint) if fits else replay_backward.TORCH
    return replay_backward.backward(problem, x, do, dstate, made, one_pass, one_backward, chain)


def step(problem: Problem, x: Tensors) -> Tensor:
    """Readouts [B,T,HV,V]; the state is updated in place."""
    return _step_on(problem, x, None)


def step_in_pool(problem: Problem, x: Tensors, places: Tensor) -> Tensor:
    """The same on the states at places [B] of a pool x.state [n,HV,K,V]; below 0: nowhere."""
    return _step_on(problem, x, places.to(torch.int64).contiguous())


def powers(A: Tensor, start: Tensor, after: Tensor, passes: int) -> Tensor:
    """S_0 ... S_(passes-1) [passes,n,HV,K,V] of S <- A S + B, from S_0 and S_1; A [n,HV,K,K], all float32."""
    n, HV, K, V = start.shape
    A, start, after = A.contiguous(), start.contiguous(), after.contiguous()
    states = start.new_empty((passes, n, HV, K, V))
    with on_device_of(start):
        _C.cuda_powers(
            n * HV, K, V, passes, _block(n * HV, V), A.data_ptr(), states.data_ptr(),
            start.data_ptr(), after.data_ptr(), stream_of(start),
        )  # fmt: skip
    return states


def adjoint(A: Tensor, states: Tensor, last: Tensor, made: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """dA, dB and the gradient of S_0, from `last`, that of the state before the last pass each head made."""
    passes, n, HV, K, V = states.shape
    A, last = A.contiguous(), last.contiguous()
    made = None if made is None else made.to(torch.int32).contiguous()
    block = _block(n * HV, V)
    dA = last.new_empty((-(-V // block), n, HV, K, K))
    dB, dstart = torch.empty_like(last), torch.empty_like(last)
    with on_device_of(last):
        _C.cuda_adjoint(
            n * HV, K, V, passes, block, A.data_ptr(), states.data_ptr(), address(made),
            last.data_ptr(), dA.data_ptr(), dB.data_ptr(), dstart.data_ptr(), stream_of(last),
        )  # fmt: skip
    return dA.sum(0), dB, dstart


def _replay(problem: Problem, x: Tensors) -> RecurrenceResult:
    p, plan = problem, _plan(problem)
    assert plan is not None
    mode, width = _mode(p), 64 if p.K <= 64 else 128
    heads = (p.sequences, p.HV)
    final = x.k.new_empty((*heads, p.K, p.V), dtype=torch.float32)
    o = torch.empty_like(x.v, memory_format=torch.contiguous_format) if p.output else None
    residual = made = before = None
    if plan.method == "affine" and p.output:
        before = torch.empty_like(final)
    if p.tol is not None:
        residual = x.k.new_empty(heads, dtype=torch.float32)
        made = x.k.new_empty(heads, dtype=torch.int32)
    state = None if x.state is None else x.state.contiguous()
    offsets = None if x.cu_seqlens is None else x.cu_seqlens.to(x.k.device, torch.int64).contiguous()
    scratch: list[Tensor | None] = [None] * 4
    if not plan.window:
        n, C, number = _chunks(p) * p.HV, _C.cuda_chunk, torch.bfloat16 if mode == "bf16" else torch.float32
        scratch = [
            x.k.new_empty(n * 2 * C * width, dtype=number),
            x.k.new_empty(n * width, dtype=torch.float32),
            x.k.new_empty(n * -(-p.V // 16) * 16 * C, dtype=torch.float32),
            x.k.new_empty(n * (C * width + C * C), dtype=number) if p.output else None,
        ]
    views, _alive = _views(p, x, p.output)
    with on_device_of(x.k):
        _C.cuda_replay(
            GATE_CODES[p.rule.gate], p.rule.delta, p.normalize, p.scale, p.sequences, p.T, p.H, p.HV, p.K, p.V,
            address(offsets), *views, address(state), address(o), final.data_ptr(), _MODES[mode], p.passes,
            p.tol or 0.0, address(residual), address(made), plan.method == "affine", plan.method == "rank",
            address(before), plan.block, plan.slots, tuple(map(address, scratch)), plan.window, stream_of(x.k),
        )  # fmt: skip
    return RecurrenceResult(o, final, residual, made)


def _step_on(problem: Problem, x: Tensors, places: Tensor | None) -> Tensor:
    """In place also where the state is not contiguous; the states of a pool may lie apart."""
    assert x.state is not None
    state = x.state if _dense_states(x.state) else x.state.contiguous()
    o = _step(problem, x, state, places)
    if state is not x.state:
        x.state.copy_(state)
    return o


def _dense_states(state: Tensor) -> bool:
    """Whether each is contiguous, and none of them lies in another."""
    n, HV, K, V = state.shape
    return n > 0 and state[0].is_contiguous() and (n == 1 or state.stride(0) >= HV * K * V)


def _step(problem: Problem, x: Tensors, state: Tensor, places: Tensor | None) -> Tensor:
    p = problem
    o = torch.empty_like(x.v, memory_format=torch.contiguous_format)
    if p.T == 0:
        return o
    views, _alive = _views(p, x, True)
    with on_device_of(x.k):
        _C.cuda_step(
            GATE_CODES[p.rule.gate], p.rule.delta, p.normalize, p.scale, p.sequences, p.T, p.H, p.HV, p.K, p.V,
            *views, state.data_ptr(), state.data_ptr(), o.data_ptr(), address(places), state.stride(0), stream_of(x.k),
        )  # fmt: skip
    return o


def _plan(problem: Problem) -> Plan | None:
    """The plan of a replay; None where shared memory does not hold it."""
    return _plan_on(problem, device_at_hand())


@lru_cache(maxsize=1024)
def _plan_on(problem: Problem, device: Device) -> Plan | None:
    p, mode = problem, _mode(problem)
    width = 64 if p.K <= 64 else 128
    if _WINDOW[mode, width, p.output, p.rule.gate == "channel"] > device.shared_memory:
        return None
    block = _block(p.sequences * p.HV, p.V, whole=p.tol is not None, device=device)
    if _one_chunk(p) and p.method != "affine" and (mode == "bf16" or p.tol is None or block <= _C.cuda_value_tile):
        block = block if mode == "bf16" else min(block, _C.cuda_value_tile)
        rank = p.rule.gate != "channel" and p.tol is None and (p.method == "rank" or (p.passes > 2 and 2 * p.T <= p.K))
        return Plan("rank" if rank and p.method != "wy" else "wy", True, block, 0)
    chunks = -(-p.T // _C.cuda_chunk)  # of the longest sequence there can be
    fixed, each = _REPLAY[mode, width, p.output, block]
    slots = min((device.shared_memory - fixed) // each, chunks, 16)
    if slots < 1:
        return None
    stays = slots == chunks
    if p.method == "wy":
        return Plan("wy", False, block, slots) if stays or p.tol is None else None
    T, K, V = p.T, p.K, p.V
    method = p.method
    if method == "auto":
        affine = costs.affine(costs.state_pass(T, K, K), K, V)  # the first pass leaves B
        method = costs.cheapest(p, wy=costs.wy(T, K, V) if stays else None, affine=affine)
    return Plan("wy" if method == "wy" else "affine", False, block, slots)


def _block(heads: int, V: int, whole: bool = False, device: Device | None = None) -> int:
    """Value columns of a block: as many as give three of four multiprocessors a block, at least 32."""
    device = device or device_at_hand()
    block: int = min(_C.cuda_widest_block, -(-V // 16) * 16)
    while not whole and block > 32 and 4 * heads * -(-V // block) < 3 * device.multiprocessors:
        block = max(32, block // 32 * 16)
    return block


def _replay_table() -> dict[tuple[str, int, bool, int], tuple[int, int]]:
    """Bytes of shared memory of a replay, fixed and a slot, by mode, width, readouts and block."""
    table = {}
    for mode, code in _MODES.items():
        for width in (64, 128):
            for reads in (False, True):
                for block in range(16, _C.cuda_widest_block + 1, 16):
                    one, two = (_C.cuda_replay_memory(code, width, reads, block, slots) for slots in (1, 2))
                    table[mode, width, reads, block] = 2 * one - two, two - one
    return table


def _window_table() -> dict[tuple[str, int, bool, bool], int]:
    flags = (False, True)
    return {
        (mode, width, reads, channel): _C.cuda_window_memory(code, width, reads, channel)
        for mode, code in _MODES.items() for width in (64, 128) for reads in flags for channel in flags
    }  # fmt: skip


_CUDA = _C is not None and _C.has_cuda
_REPLAY = _replay_table() if _CUDA else {}
_WINDOW = _window_table() if _CUDA else {}


def _does_not_fit(problem: Problem) -> str:
    limit = device_at_hand().shared_memory
    if problem.method == "wy" and problem.tol is not None:
        return "wy with tol needs a window whose chunks all stay in shared memory; affine does not"
    return f"K = {problem.K} with {_mode(problem)} products needs more than a block's {limit} bytes of shared memory"


def _replays(problem: Problem) -> bool:
    return problem.passes > 1 or problem.tol is not None


def _one_chunk(problem: Problem) -> bool:
    limit: int = _C.cuda_chunk
    return not problem.packed and problem.T <= limit


def _chunks(problem: Problem) -> int:
    """Chunks of all sequences; packed ones may leave some of their slots empty."""
    p, C = problem, _C.cuda_chunk
    return int(p.T // C + p.sequences if p.packed else -(-p.T // C) * p.sequences)


def _mode(problem: Problem) -> str:
    """bf16 products for bf16 inputs; others are split into two tf32 numbers, which keeps float32's precision."""
    return "bf16" if problem.dtype == torch.bfloat16 else "exact"


def _ordinary(problem: Problem) -> Ordinary:
    one = problem._replace(passes=1, tol=None, method="auto")
    return next(backend for backend in ORDINARY if refusal(backend, one) is None)


def _views(problem: Problem, x: Tensors, reads: bool) -> tuple[list[Rows], list[Tensor | None]]:
    """q, k, v, g, beta as _C takes them, and what must live while it runs."""
    p = problem
    widths = (p.H * p.K, p.H * p.K, p.HV * p.V, p.HV * p.K if p.rule.gate == "channel" else p.HV, p.HV)
    given = (x.q if reads else None, x.k, x.v, x.g, x.beta)
    found = [rows(t, width) for t, width in zip(given, widths, strict=True)]
    return [view for _, view in found], [t for t, _ in found]
