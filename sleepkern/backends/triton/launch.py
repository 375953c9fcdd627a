"""The launches in order. Every direction of every rule uses the same few kernels with other switches.

    forward    chunk factors, state pass            or one launch: decode (T <= 8), single chunk (T <= one chunk)
    backward   chunk factors, state pass, backward state pass, chunk backward      or one launch: single chunk

The first call of its kind makes the launches by `_forward` and `_backward`; later ones repeat them (held_launches.py).
What these two decide therefore follows from the problem, the other parts of the key and what tensors there are.

Nothing here waits for the device, so all of it can be captured in a CUDA graph.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...problems.gates import RawGates
from ...problems.recurrence import Problem, Tensors
from ..native.views import in_rows, on_device_of
from . import held_launches
from .assembler import assembling
from .call_tensors import MADE, GateForm, gate_form, parameter_gradients, rows_of
from .chunk_backward import chunk_backward_kernel, chunk_backward_values_kernel
from .chunk_factors import chunk_factors_kernel
from .common import ChunkFactors, DecodeStates, Dims, Flags, Gradients, Inputs, Sizes, StateGradients, States
from .decode import decode_kernel
from .held_launches import Recording
from .plan import DECODE_LIMIT, decode_tile, dividing, padded, plan_for, segments_of
from .plan_table import TABLE, WITH_DECAYS, Direction, Precision, Tile, TilePlan
from .ptxas import capability_of_plans
from .segments import join_segments_kernel, segment_maps_kernel
from .single_chunk import single_chunk_backward_kernel, single_chunk_kernel
from .state_pass import state_pass_kernel
from .state_pass_backward import state_pass_backward_kernel

GATES = {"none": 0, "head": 1, "channel": 2}


def forward(
    problem: Problem,
    x: Tensors,
    state: Tensor | None,
    output: bool,
    precision: Precision,
    final: Tensor | None = None,
    gates: RawGates | None = None,
    along: tuple[Tensor | None, ...] = (),
) -> tuple[Tensor | None, Tensor]:
    """Outputs o (None unless output) and final state of problem.passes passes; `final` may be `state` itself.

    along: with state_every, the states along the sequences, which are written, and where those of packed ones begin.
    """
    p = problem
    o = torch.empty_like(x.v, memory_format=torch.contiguous_format) if output else None
    if final is None:
        final = torch.empty((p.sequences, p.HV, p.K, p.V), dtype=torch.float32, device=x.k.device)
    if state is not None:
        state = state.contiguous()
    rows, strides = rows_of(p, x, output)
    form, parameters = gate_form(gates)
    key = (_forward, p, precision, output, strides, form, TABLE.version)
    with on_device_of(x.k):
        held_launches.run(
            key, (*rows, state, final, o, *parameters, *along), partial(_forward, p, precision, output, form), x.k
        )
    return o, final


def _forward(
    problem: Problem, precision: Precision, output: bool, form: GateForm, recording: Recording, tensors: Sequence[Any]
) -> None:
    """The launches of a forward. tensors: as in Tensors, then final, o, A_log, dt_bias and the two of `along`."""
    p, x = problem, Tensors._make((*tensors[:5], None, tensors[5]))
    state, final, o, *parameters = tensors[6:11]
    job = Job(p, x, output, precision, "forward", recording, form, parameters)
    states = States(state, final, o, None, None, *tensors[11:])
    more: dict[str, Any] = {"states": states, "HAS_STATE": state is not None, "REPLAY": p.passes > 1, "SAVE": False}
    if p.T <= DECODE_LIMIT and p.passes == 1 and not p.packed:
        tile = job.plan.decode or decode_tile(p.K, p.V)
        job.launch(decode_kernel, job.columns(tile), tile, **more)
        return
    more["factors"] = job.factors(save=False)
    if job.one_chunk:
        grid = (p.sequences * p.HV,)
        job.launch(single_chunk_kernel, grid, job.plan.single_chunk, **more, HAS_FACTORS=job.has_factors)
        return
    if job.has_factors:
        job.launch(chunk_factors_kernel, (job.slots, p.HV), job.plan.chunk_factors, **more)
    job.state_pass(more)


def backward(
    problem: Problem,
    x: Tensors,
    state: Tensor | None,
    do: Tensor | None,
    dstate: Tensor | None,
    precision: Precision,
    gates: RawGates | None = None,
    along: tuple[Tensor | None, ...] = (),
) -> list[Tensor | None]:
    """Gradients of q, k, v, g, beta and of the state that one pass starts from, None where there is no such tensor.

    With raw gates the gradients of A_log and dt_bias follow. along: as of `forward`, the gradients of the states.
    """
    p, output = problem, do is not None and x.q is not None
    grads = [None if t is None else torch.empty_like(t, memory_format=torch.contiguous_format) for t in x[:5]]
    if not output and grads[0] is not None:
        grads[0].zero_()
    dinitial = torch.empty((p.sequences, p.HV, p.K, p.V), dtype=torch.float32, device=x.k.device)
    rows, strides = rows_of(p, x, output)
    do, do_stride = in_rows(do, p.HV * p.V) if output and do is not None else (None, 0)
    state, dstate = (None if t is None else t.contiguous() for t in (state, dstate))
    form, parameters = gate_form(gates)
    sums = _gate_sums(p, precision, x.k.device) if form.RAW else (None, None)
    key = (_backward, p, precision, output, strides, do_stride, form, TABLE.version)
    with on_device_of(x.k):
        tensors = (*rows, state, do, dstate, dinitial, *grads, *parameters, *sums, *along)
        held_launches.run(key, tensors, partial(_backward, p, precision, output, do_stride, form), x.k)
    grads = [
        d if d is None or t is None or d.dtype == t.dtype else d.to(t.dtype) for d, t in zip(grads, x, strict=False)
    ]
    grads.append(None if x.state is None else dinitial)  # empty_like has given the others the types of the inputs
    return grads if gates is None else [*grads, *parameter_gradients(gates, *sums)]


def _backward(
    problem: Problem, precision: Precision, output: bool, do_stride: int, form: GateForm, recording: Recording,
    tensors: Sequence[Any],
) -> None:  # fmt: skip
    """The launches of a backward. tensors: as in Tensors, then do, dstate, dinitial, five gradients, A_log, dt_bias,
    the sums of both, and the two of `along`."""
    p, x = problem, Tensors._make((*tensors[:5], None, tensors[5]))
    state, do, dstate, dinitial = tensors[6:10]
    grads, parameters, gate_sums = tensors[10:15], tensors[15:17], tensors[17:19]
    job = Job(p, x, output, precision, "backward", recording, form, parameters)
    factors = job.factors(save=True)
    states = job.states(state)
    back = job.state_gradients(do, do_stride, dstate, dinitial)
    sums = p.HV > p.H or p.normalize
    dq_sum, dk_sum = (
        job.empty(job.rows, p.H, p.K, dtype=torch.float32) if sums and d is not None else d for d in grads[:2]
    )
    last = job.plan.chunk_backward
    split = last.variant == "products" and not job.one_chunk
    parts = [job.empty(job.rows, p.HV, dtype=torch.float32) if split else None for _ in range(2)]
    more: dict[str, Any] = {
        "factors": factors, "states": states, "back": back,
        "grads": Gradients._make((*grads, dq_sum, dk_sum, factors.U if p.rule.delta else back.dVn, *gate_sums, *parts)),
        "SAVE": True, "HAS_STATE": state is not None, "REPLAY": False, "HAS_DSTATE": dstate is not None, "SUMS": sums,
        "HAS_FACTORS": job.has_factors,
    }  # fmt: skip
    if job.one_chunk:
        job.launch(single_chunk_backward_kernel, (p.sequences * p.H,), job.plan.single_chunk, **more)
        return
    back_tile = job.plan.state_pass_backward
    if job.has_factors:
        job.launch(chunk_factors_kernel, (job.slots, p.HV), job.plan.chunk_factors, **more)
    job.state_pass({**more, "FLAGS": job.flags._replace(OUTPUT=False)})
    scan = {**more, "back": StateGradients(*back[:6], *tensors[19:]), "EVERY": job.every}
    job.launch(state_pass_backward_kernel, job.columns(back_tile), back_tile, **scan)
    if split:
        job.launch(chunk_backward_values_kernel, (job.slots, p.HV), last, **more)
    job.launch(chunk_backward_kernel, (job.slots, p.H), last, **more, SPLIT=split)


def decode(
    problem: Problem, x: Tensors, precision: Precision, indices: Tensor | None, out: Tensor | None = None,
    out_indices: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """Outputs of a few tokens from the states of x.state [n,HV,K,V] at indices [B], by default from all in order.

    Without `out` x.state is updated; else the states after each token go to `out` (DecodeStates). Each [K,V] of both is
    contiguous.
    """
    p, state = problem, x.state
    assert state is not None
    o = torch.empty_like(x.v, memory_format=torch.contiguous_format)
    rows, strides = rows_of(p, x, True)
    pool = [state.stride(0), state.stride(1)]
    if out is not None:
        pool += [out.stride(0), 0 if out.dim() == 4 else out.stride(1), out.stride(-3)]
    indices, out_indices = (None if i is None else i.to(torch.int64).contiguous() for i in (indices, out_indices))
    key = (_decode, p, precision, strides, *pool, TABLE.version)
    with on_device_of(x.k):
        tensors = (*rows, state, o, indices, out, out_indices)
        held_launches.run(key, tensors, partial(_decode, p, precision, pool), x.k)
    return o


def _decode(
    problem: Problem, precision: Precision, strides: Sequence[int], recording: Recording, tensors: Sequence[Any]
) -> None:
    """The launch of `decode`. tensors: as in Tensors, then o, indices, out and out_indices."""
    x = Tensors._make((*tensors[:5], None, tensors[5]))
    state, o, indices, out, out_indices = tensors[6:]
    job = Job(problem, x, True, precision, "forward", recording)
    tile = job.plan.decode or decode_tile(problem.K, problem.V)
    more: dict[str, Any] = {
        "states": States(state, state if out is None else None, o, None, None),
        "POOL": True,
        "AFTER_EACH": out is not None,
        "pool": DecodeStates(indices, strides[0], strides[1], out, out_indices, *strides[2:]),
    }
    job.launch(decode_kernel, job.columns(tile), tile, **more, HAS_STATE=True)


def plan_of(problem: Problem, precision: Precision, direction: Direction) -> TilePlan:
    """The plan of a problem on the current device."""
    p = problem
    found = capability_of_plans(torch.cuda.get_device_capability()) if p.device == "cuda" else 0
    return plan_for(p.K, p.V, precision, p.rule.gate == "channel", p.T, direction, found)


def chunk_plan(problem: Problem, precision: Precision, direction: Direction) -> TilePlan:
    """The plan of a problem, with chunks that divide state_every."""
    return dividing(plan_of(problem, precision, direction), problem)


def slots_of(problem: Problem, chunk: int) -> int:
    """The number of slots of chunks, all of which kernels have a program for (`find_chunk`)."""
    p = problem
    return p.T // chunk + p.sequences if p.packed else triton.cdiv(p.T, chunk) * p.B


def _gate_sums(problem: Problem, precision: Precision, device: torch.device) -> tuple[Tensor, Tensor]:
    """The sums of each chunk for A_log and dt_bias; zero for the slots that hold no chunk."""
    p = problem
    width = p.K if p.rule.gate == "channel" else 1
    slots = slots_of(p, chunk_plan(p, precision, "backward").chunk)
    of_rate, of_bias = torch.zeros((2, slots, p.HV, width), dtype=torch.float32, device=device).unbind()
    return of_rate, of_bias


class Job:
    """Groups of arguments and scratch of the launches of one call."""

    problem: Problem
    output: bool
    type: torch.dtype
    plan: TilePlan
    slots: int
    rows: int
    one_chunk: bool
    every: int
    has_factors: bool
    recording: Recording
    capability: tuple[int, int]
    flags: Flags
    values: dict[str, Inputs | Sizes | Dims | Flags]

    def __init__(
        self, problem: Problem, x: Tensors, output: bool, precision: Precision, direction: Direction,
        recording: Recording | None = None, form: GateForm = MADE, parameters: Sequence[Any] = (None, None),
    ) -> None:  # fmt: skip
        p, rule = problem, problem.rule
        self.problem, self.output = problem, output
        self.recording = Recording((), x.k) if recording is None else recording
        self.type = torch.bfloat16 if precision == "bf16" else torch.float32
        self.plan = chunk_plan(problem, precision, direction)
        chunk = self.plan.chunk
        self.every = (p.state_every or 0) // chunk
        self.slots = slots_of(p, chunk)
        self.rows = p.B * p.T
        self.one_chunk = not p.packed and p.T <= chunk
        self.has_factors = rule.delta or output or rule.gate == "channel"
        self.capability = torch.cuda.get_device_capability() if p.device == "cuda" else (0, 0)
        self.flags = Flags(
            GATE=GATES[rule.gate],
            DELTA=rule.delta,
            HAS_BETA=x.beta is not None,
            NORMALIZE=p.normalize,
            OUTPUT=output,
            PACKED=p.packed,
            DT=tl.bfloat16 if precision == "bf16" else tl.float32,
            PRECISION="ieee" if precision == "ieee" else "tf32",
            WIDE=precision == "ieee",
            **form._asdict(),
        )
        rows, strides = rows_of(problem, x, output)
        self.values = {
            "inputs": Inputs(*rows, *strides, *parameters),
            "sizes": Sizes(p.T, p.sequences, p.passes, p.scale),
            "DIMS": Dims(p.HV, p.HV // p.H, p.K, p.V, chunk, padded(p.K)),
            "FLAGS": self.flags,
        }

    def factors(self, save: bool) -> ChunkFactors:
        """Scratch for what chunk_factors_kernel stores; X and kk when save."""
        p, delta, channel = self.problem, self.problem.rule.delta, self.problem.rule.gate == "channel"
        rows, C = (self.rows, p.HV), self.plan.chunk
        return ChunkFactors(
            P=self.empty(*rows, C) if self.output else None,
            X=self.empty(*rows, C) if save and delta else None,
            kk=self.empty(*rows, C) if save and delta else None,
            W=self.empty(*rows, p.K) if delta else None,
            U=self.empty(*rows, p.V) if delta else None,
            Kt=self.empty(*rows, p.K) if channel else None,
            Qe=self.empty(*rows, p.K) if channel and self.output else None,
            G_end=self.empty(self.slots, p.HV, p.K, dtype=torch.float32) if channel else None,
            **self.row_decays(),
        )

    def row_decays(self) -> dict[str, Tensor]:
        """Scratch for the factors of the rows that state passes of variant "decays" load."""
        p, shape = self.problem, (self.rows, self.problem.HV)
        if not self.decays:
            return {}
        sizes = {"from_start": shape, "to_end": shape, "chunk_decay": (self.slots, p.HV)}
        return {name: self.empty(*size, dtype=torch.float32) for name, size in sizes.items()}

    @property
    def decays(self) -> bool:
        """Tells whether chunk_factors_kernel stores the factors of the rows."""
        passes = (self.plan.state_pass, self.plan.state_pass_backward)
        wanted = any(tile.variant in WITH_DECAYS for tile in passes)
        return wanted and self.has_factors and not self.one_chunk and self.problem.rule.gate != "channel"

    def states(self, initial: Tensor | None) -> States:
        """The initial state, and scratch for the states and Vn of all chunks."""
        p = self.problem
        return States(
            initial=initial,
            final=self.empty(p.sequences, p.HV, p.K, p.V, dtype=torch.float32),
            o=None,
            starts=self.empty(self.slots, p.HV, p.K, p.V),
            Vn=self.empty(self.rows, p.HV, p.V),
        )

    def state_gradients(
        self, do: Tensor | None, do_stride: int, dstate: Tensor | None, dinitial: Tensor
    ) -> StateGradients:
        """The gradients that come from above, the initial state's gradient, and scratch for those of all chunks."""
        p = self.problem
        ends, dVn = self.empty(self.slots, p.HV, p.K, p.V), self.empty(self.rows, p.HV, p.V)
        return StateGradients(do, dstate, dinitial, ends, dVn, do_stride)

    def state_pass(self, more: dict[str, Any]) -> None:
        """The state pass, on two levels (segments.py) where the plan wants it and the call has few heads."""
        p, tile, states = self.problem, self.plan.state_pass, more["states"]
        segments = segments_of(p, self.plan)
        if segments == 1:
            self.launch(state_pass_kernel, self.columns(tile), tile, **more, EVERY=0 if more["SAVE"] else self.every)
            return
        size = (p.sequences * segments, p.HV, p.K)
        maps = self.empty(*size, p.K + p.V, dtype=torch.float32)
        starts, ends = (self.empty(*size, p.V, dtype=torch.float32) for _ in range(2))
        more = {**more, "sizes": Sizes(p.T // segments, p.sequences * segments, 1, p.scale), "maps": maps}
        grid = (p.sequences * segments * p.HV * triton.cdiv(p.K + p.V, tile.values),)
        self.launch(segment_maps_kernel, grid, tile, **more)
        few = tile._replace(values=16)
        self.launch(join_segments_kernel, self.columns(few), few, **more, starts=starts, segments=segments)
        more = {**more, "states": states._replace(initial=starts, final=ends), "HAS_STATE": True}
        self.launch(state_pass_kernel, (self.columns(tile)[0] * segments,), tile, **more)

    def columns(self, tile: Tile) -> tuple[int]:
        """The grid of kernels whose programs take `tile.values` value columns of one bh."""
        return (self.problem.sequences * self.problem.HV * triton.cdiv(self.problem.V, tile.values),)

    def empty(self, *size: int, dtype: torch.dtype | None = None) -> Tensor:
        """Scratch on the device of the inputs, in the type of the operands unless another is named."""
        return self.recording.empty(size, dtype or self.type)

    def launch(self, kernel: Any, grid: tuple[int, ...], tile: Tile, **more: Any) -> None:
        """Launch a kernel with the arguments that it names."""
        with assembling(self.capability) as options:
            all_options = {**self.compile_options(tile), **options}
            self.recording.launch(kernel, grid, self.arguments(kernel, tile, **more), all_options)

    def compile_options(self, tile: Tile) -> dict[str, Any]:
        """Triton's options for a tile. A kernel without warp-group products is lowered as for sm_80 on a Hopper."""
        plain = not tile.warp_groups and self.capability[0] == 9
        return {"num_warps": tile.warps, "num_stages": tile.stages} | ({"arch": "sm80"} if plain else {})

    def arguments(self, kernel: Any, tile: Tile, **more: Any) -> dict[str, Any]:
        """The arguments that a kernel names, from the call's, the launch's and the tile's."""
        decays = self.decays and (kernel is chunk_factors_kernel or tile.variant in WITH_DECAYS)
        plain = {"EVERY": 0, "pool": None, "POOL": False, "AFTER_EACH": False}
        values = self.values | plain | {"BK": tile.keys, "BV": tile.values, "DECAYS": decays} | more
        return {name: values[name] for name in kernel.arg_names}
