"""The launches in order. Every direction of every rule is the same few kernels with other switches.

    forward    prepare, ingest                         or one launch: step (T <= 8), window (T <= one chunk)
    backward   prepare, ingest, adjoint, gradients     or one launch: window

Nothing here waits for the device, so all of it can be captured in a CUDA graph.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...problems.recurrence import Problem, Tensors
from ..native.views import in_rows, on_device_of
from .chunk_backward import gradient_kernel
from .chunk_factors import prepare_kernel
from .decode import step_kernel
from .plan import STEP_LIMIT, Direction, Operands, Plan, Tile, padded, plan_for, step_tile
from .ptxas import capability_of_plans
from .single_chunk import window_gradient_kernel, window_kernel
from .state_pass import ingest_kernel
from .state_pass_backward import adjoint_kernel

GATES = {"none": 0, "head": 1, "channel": 2}


def forward(
    problem: Problem, x: Tensors, state: Tensor | None, output: bool, operands: Operands, final: Tensor | None = None
) -> tuple[Tensor | None, Tensor]:
    """Readouts (None unless output) and final state of problem.passes passes; `final` may be `state` itself."""
    p = problem
    job = Job(problem, x, output, operands, "forward")
    o = torch.empty_like(x.v, memory_format=torch.contiguous_format) if output else None
    if final is None:
        final = job.empty(p.sequences, p.HV, p.K, p.V, dtype=torch.float32)
    state = None if state is None else state.contiguous()
    given = {"p_state": state, "p_o": o, "p_final": final, "p_starts": None, "p_Vn": None}
    switches = {"HAS_STATE": state is not None, "REPLAY": p.passes > 1, "KEEP": False}
    lanes = p.sequences * p.HV
    with on_device_of(x.k):
        if p.T <= STEP_LIMIT and p.passes == 1 and not p.packed:
            tile = step_tile(p.K, p.V)
            job.launch(step_kernel, (lanes * triton.cdiv(p.V, tile.values),), tile, **given, **switches)
            return o, final
        given |= job.factors(inverse=False)
        tile = job.plan.ingest
        if job.one_chunk:
            job.launch(window_kernel, (lanes,), job.plan.window, **given, **switches, FACTORS=job.prepares)
            return o, final
        if job.prepares:
            job.launch(prepare_kernel, (job.slots, p.HV), job.plan.prepare, **given, **switches)
        job.launch(ingest_kernel, (lanes * triton.cdiv(p.V, tile.values),), tile, **given, **switches)
    return o, final


def relaunched(problem: Problem, x: Tensors, operands: Operands) -> Tensor:
    """The state after problem.passes passes of a launch each, prepared once: the baseline of kernels that stay on chip.

    Only `bench` takes it.
    """
    p = problem._replace(passes=1)
    job = Job(p, x, False, operands, "forward")
    final = job.empty(p.sequences, p.HV, p.K, p.V, dtype=torch.float32)
    given = {**job.factors(inverse=False), "p_o": None, "p_final": final, "p_starts": None, "p_Vn": None}
    tile = job.plan.ingest
    grid = (p.sequences * p.HV * triton.cdiv(p.V, tile.values),)
    with on_device_of(x.k):
        if job.prepares:
            job.launch(prepare_kernel, (job.slots, p.HV), job.plan.prepare, **given, KEEP=False)
        for done in range(problem.passes):
            state = final if done else x.state
            switches = {"p_state": state, "HAS_STATE": state is not None, "REPLAY": False, "KEEP": False}
            job.launch(ingest_kernel, grid, tile, **given, **switches)
    return final


def backward(
    problem: Problem, x: Tensors, state: Tensor | None, do: Tensor | None, dstate: Tensor | None, operands: Operands
) -> list[Tensor | None]:
    """Gradients of q, k, v, g, beta and of the state that one pass starts from, None where there is no such tensor."""
    p = problem
    reads = do is not None and x.q is not None
    job = Job(problem, x, reads, operands, "backward")
    state = None if state is None else state.contiguous()
    dstate = None if dstate is None else dstate.contiguous()
    grads = [None if t is None else torch.empty_like(t, memory_format=torch.contiguous_format) for t in x[:5]]
    size = (p.HV, p.K, p.V)
    dinitial = job.empty(p.sequences, *size, dtype=torch.float32)
    given: dict[str, Any] = {
        **job.factors(inverse=True),
        "p_state": state, "p_final": job.empty(p.sequences, *size, dtype=torch.float32), "p_o": None,
        "p_starts": job.empty(job.slots, *size), "p_Vn": job.empty(job.rows, p.HV, p.V),
        "p_ends": job.empty(job.slots, *size), "p_dVn": job.empty(job.rows, p.HV, p.V),
        "p_dstate": dstate, "p_dinitial": dinitial,
    }  # fmt: skip
    given |= dict(zip(("p_dq", "p_dk", "p_dv", "p_dg", "p_dbeta"), grads, strict=True))
    given["p_dR"] = given["p_U"] if p.rule.delta else given["p_dVn"]
    given["SUMS"] = sums = p.HV > p.H or p.normalize
    for name, d in (("p_dq_sum", grads[0]), ("p_dk_sum", grads[1])):
        given[name] = d if d is None or not sums else job.empty(job.rows, p.H, p.K, dtype=torch.float32)
    given["p_do"], given["do_stride"] = in_rows(do, p.HV * p.V) if reads and do is not None else (None, 0)
    if not reads and grads[0] is not None:
        grads[0].zero_()
    lanes = p.sequences * p.HV
    with on_device_of(x.k):
        if job.one_chunk:
            job.launch(
                window_gradient_kernel, (p.sequences * p.H,), job.plan.window, **given,
                HAS_STATE=state is not None, HAS_DSTATE=dstate is not None, FACTORS=job.prepares,
            )  # fmt: skip
        else:
            walk, back = job.plan.ingest, job.plan.adjoint
            if job.prepares:
                job.launch(prepare_kernel, (job.slots, p.HV), job.plan.prepare, **given, KEEP=True)
            job.launch(
                ingest_kernel, (lanes * triton.cdiv(p.V, walk.values),), walk, **given | {"READS": False},
                KEEP=True, HAS_STATE=state is not None, REPLAY=False,
            )  # fmt: skip
            job.launch(
                adjoint_kernel, (lanes * triton.cdiv(p.V, back.values),), back, **given, HAS_STATE=dstate is not None
            )
            job.launch(gradient_kernel, (job.slots, p.H), job.plan.gradients, **given)
    grads = [d if d is None or t is None else d.to(t.dtype) for d, t in zip(grads, x, strict=False)]
    return [*grads, None if x.state is None else dinitial]


def plan_of(problem: Problem, operands: Operands, direction: Direction) -> Plan:
    """The plan of a problem on the device at hand."""
    p = problem
    found = capability_of_plans(torch.cuda.get_device_capability()) if p.device == "cuda" else 0
    return plan_for(p.K, p.V, operands, p.rule.gate == "channel", p.T, direction, found)


class Job:
    """Sizes, switches and scratch of the launches of one call."""

    def __init__(self, problem: Problem, x: Tensors, reads: bool, operands: Operands, direction: Direction) -> None:
        p, rule = problem, problem.rule
        channel = rule.gate == "channel"
        self.problem, self.reads = problem, reads
        self.type = torch.bfloat16 if operands == "bf16" else torch.float32
        self.plan = plan_of(problem, operands, direction)
        chunk = self.plan.chunk
        self.slots = p.T // chunk + p.sequences if p.packed else triton.cdiv(p.T, chunk) * p.B
        self.rows = p.B * p.T
        self.one_chunk = not p.packed and p.T <= chunk
        self.prepares = rule.delta or reads or channel
        self.where = x.k.device
        self.values = {
            **_pointers(problem, x, reads),
            "T": p.T, "sequences": p.sequences, "scale": p.scale, "passes": p.passes,
            "HV": p.HV, "GROUP": p.HV // p.H, "K": p.K, "V": p.V, "C": chunk, "KP": padded(p.K),
            "GATE": GATES[rule.gate], "DELTA": rule.delta, "HAS_BETA": x.beta is not None, "NORMALIZE": p.normalize,
            "READS": reads, "PACKED": p.packed,
            "DT": tl.bfloat16 if operands == "bf16" else tl.float32,
            "PRECISION": "ieee" if operands == "exact" else "tf32", "WIDE": operands == "exact",
        }  # fmt: skip

    def factors(self, inverse: bool) -> dict[str, Tensor | None]:
        """Scratch for what prepare leaves (shapes: prepare_kernel), None where the rule or the call has none."""
        p, C = self.problem, self.plan.chunk
        rows, delta, channel = (self.rows, p.HV), p.rule.delta, p.rule.gate == "channel"
        return {
            "p_P": self.empty(*rows, C) if self.reads else None,
            "p_X": self.empty(*rows, C) if inverse and delta else None,
            "p_kk": self.empty(*rows, C) if inverse and delta else None,
            "p_W": self.empty(*rows, p.K) if delta else None,
            "p_U": self.empty(*rows, p.V) if delta else None,
            "p_Kt": self.empty(*rows, p.K) if channel else None,
            "p_Qe": self.empty(*rows, p.K) if channel and self.reads else None,
            "p_end": self.empty(self.slots, p.HV, p.K, dtype=torch.float32) if channel else None,
        }

    def empty(self, *size: int, dtype: torch.dtype | None = None) -> Tensor:
        """Scratch where the tensors are, in the type of the operands unless another is named."""
        return torch.empty(size, dtype=dtype or self.type, device=self.where)

    def launch(self, kernel: Any, grid: tuple[int, ...], tile: Tile, **more: Any) -> None:
        """Launch a kernel with the arguments that it names."""
        kernel[grid](**self.arguments(kernel, tile, **more), num_warps=tile.warps, num_stages=tile.stages)

    def arguments(self, kernel: Any, tile: Tile, **more: Any) -> dict[str, Any]:
        """What a kernel names, out of the job's values, those of the launch and the tile's."""
        values = self.values | more | {"BK": tile.keys, "BV": tile.values}
        return {name: values[name] for name in kernel.arg_names}


def _pointers(problem: Problem, x: Tensors, reads: bool) -> dict[str, Any]:
    p = problem
    keys, values = p.H * p.K, p.HV * p.V
    widths = (keys, keys, values, p.HV * p.K if p.rule.gate == "channel" else p.HV, p.HV)
    found: dict[str, Any] = {"p_offsets": x.cu_seqlens}
    if x.cu_seqlens is not None:
        found["p_offsets"] = x.cu_seqlens.to(x.k.device, non_blocking=True).contiguous()
    for name, t, width in zip(("q", "k", "v", "g", "beta"), x, widths, strict=False):
        if t is None or (name == "q" and not reads):
            found[f"p_{name}"], found[f"{name}_stride"] = None, 0
            continue
        t = t.float() if t.dtype == torch.float64 else t
        found[f"p_{name}"], found[f"{name}_stride"] = in_rows(t, width)
    return found
