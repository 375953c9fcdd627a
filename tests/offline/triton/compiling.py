"""Compile Triton launches for a GPU that is not there, and read what the machine code needs.

The launches are those of the product: launch.py runs on meta tensors with `Job.launch` recording instead of launching,
and each record is compiled as Triton's just-in-time compiler would specialise it.
"""

from __future__ import annotations

import math
import os
import re
import subprocess
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from sleepkern.backends.triton import launch
from sleepkern.backends.triton.assembler import machine_code
from sleepkern.backends.triton.plan import plan_for
from sleepkern.backends.triton.plan_table import Direction, Precision, TilePlan, Variant
from sleepkern.backends.triton.ptxas import Assembler
from sleepkern.problems.gates import RawGates
from sleepkern.problems.recurrence import Problem, Tensors, describe
from sleepkern.rules import Rule
from sleepkern.testing import Shape

TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
TYPES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32", torch.int64: "i64", torch.int32: "i32"}
PTX_VERSION = 86
"""What Triton 3.6 writes for Hopper, which both of its assemblers and those of later versions read."""
FLAGS = ("-lineinfo",) if os.environ.get("TRITON_DEFAULT_FP_FUSION", "1") == "1" else ("-lineinfo", "--fmad=false")
TRANSPOSED_PRODUCT = r"tt\.trans [^\n]*? : tensor<[^,>\n]*, #mma"
"""A transpose of registers that hold a product; those of loaded tiles (#blocked) are sound."""
OPCODES = {
    "tensor": r"\b(?:HMMA|HGMMA|UTC\w*MMA)",
    "HGMMA": r"\bHGMMA",
    "spill": r"\b(?:STL|LDL)",
    "async": r"\bLDGSTS",
}


@dataclass(frozen=True)
class Launch:
    """One recorded launch."""

    kernel: Any
    arguments: dict[str, Any]
    warps: int
    stages: int
    programs: int = 1
    warp_groups: bool = True

    @property
    def name(self) -> str:
        """The kernel's name."""
        return str(self.kernel.__name__)


@dataclass(frozen=True)
class Compiled:
    """What the machine code of one launch needs.

    spills counts instructions that go to local memory; transposes are those of a product's registers, which
    is what Triton 3.4 to 3.7.0 makes wrong code of on Hopper when they feed a product.
    """

    seconds: float
    shared: int
    registers: int
    stack: int
    tensor_memory: int
    tensor_instructions: int
    wgmma: int
    spills: int
    instructions: int
    transposes: int
    assembly: str


def record(
    rule: Rule,
    shape: Shape,
    precision: Precision,
    direction: Direction,
    normalize: bool = False,
    passes: int = 1,
    output: bool = True,
    raw: bool = False,
    state_every: int | None = None,
) -> list[Launch]:
    """The launches of a call of this shape; `raw`: its kernels make both gates.

    state_every also gives its states, and their gradients, of which there are one for each sequence more than needed.
    """
    seen: list[Launch] = []
    x = _inputs(rule, shape, torch.bfloat16 if precision == "bf16" else torch.float32)
    problem = describe(rule, x, shape.K**-0.5, normalize, passes, state_every=state_every)
    along = _along(problem, x)
    gates = _gates(rule, shape) if raw else None
    with mock.patch.object(launch.Job, "launch", _noting(seen)):
        if direction == "backward":
            assert x.state is not None
            do, dstate = torch.empty_like(x.v), torch.empty_like(x.state)
            launch.backward(problem, x, x.state, do, dstate, precision, gates, along)
        else:
            launch.forward(problem, x, x.state, output, precision, gates=gates, along=along)
    return seen


def record_decode(rule: Rule, shape: Shape, states: torch.dtype, pool: bool, after_each: bool) -> list[Launch]:
    """The launch of a decode of bf16 tokens on states of this type; `after_each`: the state after each is stored."""
    seen: list[Launch] = []
    x = _inputs(rule, shape, torch.bfloat16)
    heads = (shape.HV, shape.K, shape.V)
    x = x._replace(state=torch.empty(4096 if pool else shape.B, *heads, dtype=states, device="meta"))
    problem = describe(rule, x, shape.K**-0.5, True)._replace(state_bf16=states == torch.bfloat16)
    out = torch.empty(*((4096,) if pool else (shape.B, shape.T)), *heads, dtype=states, device="meta")
    indices = torch.empty(shape.B, dtype=torch.int64, device="meta") if pool else None
    targets = torch.empty(shape.B, shape.T, dtype=torch.int64, device="meta") if pool else None
    with mock.patch.object(launch.Job, "launch", _noting(seen)):
        launch.decode(problem, x, "bf16", indices, *((out, targets) if after_each else ()))
    return seen


def _noting(seen: list[Launch]) -> Any:
    """A function in the place of `Job.launch` that notes the launches."""

    def note(job: Any, kernel: Any, grid: Any, tile: Any, **more: Any) -> None:
        arguments = job.arguments(kernel, tile, **more)
        seen.append(Launch(kernel, arguments, tile.warps, tile.stages, math.prod(grid), tile.warp_groups))

    return note


def _along(problem: Problem, x: Tensors) -> tuple[torch.Tensor | None, ...]:
    """The states along the sequences, or their gradients, and their offsets when packed."""
    p = problem
    if p.state_every is None:
        return ()
    count = p.B * -(-p.T // p.state_every) + p.sequences
    states = torch.empty(1, count, p.HV, p.K, p.V, dtype=torch.float32, device="meta")
    return states, None if x.cu_seqlens is None else torch.empty(p.sequences + 1, dtype=torch.int64, device="meta")


@contextmanager
def on_device(capability: int, variants: Mapping[str, Variant] | None = None) -> Iterator[None]:
    """Plans are looked up as on a device of this capability, and get these variants by stage."""

    def plan_of(problem: Problem, precision: Precision, direction: Direction) -> TilePlan:
        p = problem
        plan = plan_for(p.K, p.V, precision, p.rule.gate == "channel", p.T, direction, capability)
        tiles: dict[str, Any] = {
            stage: getattr(plan, stage)._replace(variant=variant) for stage, variant in (variants or {}).items()
        }
        return replace(plan, **tiles)

    with mock.patch.object(launch, "plan_of", plan_of):
        yield


def compile_launch(one: Launch, capability: int, assembler: Assembler | None = None) -> Compiled:
    """Compile for compute capability 80, 90 or 100 and look at the machine code, on a Hopper by this assembler."""
    signature: dict[str, Any] = {}
    constants: dict[tuple[int, ...], Any] = {}
    attributes: dict[tuple[int, ...], Any] = {}
    for i, parameter in enumerate(one.kernel.params):
        value = one.arguments[parameter.name]
        signature[parameter.name] = _specialise(value, parameter, (i,), constants, attributes)
    source = ASTSource(fn=one.kernel, signature=signature, constexprs=constants, attrs=attributes)
    begin = time.perf_counter()
    options: dict[str, Any] = {"num_warps": one.warps, "num_stages": one.stages}
    if capability == 90:
        options |= {"ptx_version": PTX_VERSION} | ({} if one.warp_groups else {"arch": "sm80"})
    made = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    cubin = made.asm["cubin"] if assembler is None else machine_code(made.asm["ptx"], assembler, FLAGS)
    seconds = time.perf_counter() - begin
    registers, stack, assembly = _machine_code(cubin)
    transposes = len(re.findall(TRANSPOSED_PRODUCT, made.asm["ttgir"]))
    count = {name: len(re.findall(pattern, assembly)) for name, pattern in OPCODES.items()}
    return Compiled(
        seconds, made.metadata.shared, registers, stack, getattr(made.metadata, "tmem_size", 0) or 0,
        count["tensor"], count["HGMMA"], count["spill"], assembly.count(";"), transposes, assembly,
    )  # fmt: skip


def _gates(rule: Rule, s: Shape) -> RawGates:
    bias = (s.HV, s.K) if rule.gate == "channel" else (s.HV,)
    A_log, dt_bias = (torch.empty(size, device="meta") for size in ((s.HV,), bias))
    return RawGates(A_log, dt_bias, None, True, 1.0)


def _inputs(rule: Rule, s: Shape, dtype: torch.dtype) -> Tensors:
    def meta(*size: int, dtype: torch.dtype = dtype) -> torch.Tensor:
        return torch.empty(size, dtype=dtype, device="meta")

    gate = None if rule.gate == "none" else (s.B, s.T, s.HV) if rule.gate == "head" else (s.B, s.T, s.HV, s.K)
    return Tensors(
        meta(s.B, s.T, s.H, s.K), meta(s.B, s.T, s.H, s.K), meta(s.B, s.T, s.HV, s.V),
        None if gate is None else meta(*gate, dtype=torch.float32), meta(s.B, s.T, s.HV),
        meta(s.sequences, s.HV, s.K, s.V, dtype=torch.float32),
        None if s.lengths is None else meta(len(s.lengths) + 1, dtype=torch.int64),
    )  # fmt: skip


def _specialise(
    value: Any, parameter: Any, path: tuple[int, ...], constants: dict[tuple[int, ...], Any],
    attributes: dict[tuple[int, ...], Any],
) -> Any:  # fmt: skip
    """The type of an argument, a tuple of types for a group of arguments; notes constants and divisible values."""
    if isinstance(value, tuple) and not parameter.is_constexpr:
        kinds = [_specialise(v, parameter, (*path, i), constants, attributes) for i, v in enumerate(value)]
        return type(value)(*kinds)  # type: ignore[call-arg]
    kind = "constexpr" if parameter.is_constexpr or value is None else _kind(value, parameter)
    if kind == "constexpr":
        constants[path] = value
    elif _divisible(value, parameter):
        attributes[path] = [["tt.divisibility", 16]]
    return kind


def _kind(value: Any, parameter: Any) -> str:
    if isinstance(value, torch.Tensor):
        return "*" + TYPES[value.dtype]
    if isinstance(value, float):
        return "fp32"
    return "constexpr" if value == 1 and not parameter.do_not_specialize else "i32"


def _divisible(value: Any, parameter: Any) -> bool:
    if isinstance(value, torch.Tensor):
        return True
    return isinstance(value, int) and value % 16 == 0 and not parameter.do_not_specialize


def _machine_code(cubin: bytes) -> tuple[int, int, str]:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage = _tool("cuobjdump", "--dump-resource-usage", file.name)
        assembly = _tool("nvdisasm", "-c", file.name)
    found = re.search(r"REG:(\d+) STACK:(\d+)", usage)
    assert found is not None, usage
    return int(found[1]), int(found[2]), assembly


def _tool(name: str, *arguments: str) -> str:
    return subprocess.run([TOOLS / name, *arguments], capture_output=True, text=True, check=True).stdout
