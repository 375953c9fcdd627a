"""Every Triton kernel, with every row of the plan table, compiled for GPUs that are not there and held to their limits.

    python -m tests.offline.triton.gate [--jobs 2] [--quick]

Prints what each needs and exits with 1 if one exceeds a limit: shared memory and tensor memory of the architecture, a
budget of stack (spilled registers), tensor-core instructions where products are bf16 or tf32, no transposes of products
(see backends/triton/common.py), no warp-group products where a plan must do without (ptxas.py). Code for Hopper is
assembled by every assembler that is there: the two that Triton brings, of CUDA 12 and 13, and that of nvidia-cuda-nvcc
where it is installed. It must be a process of its own: under TRITON_INTERPRET Triton's own functions are interpreted
ones and nothing can be compiled.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))
os.environ.setdefault("TRITON_CACHE_DIR", tempfile.mkdtemp(prefix="sleepkern-triton-"))
os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")

import torch
import triton
import triton.language as tl
from compiling import TOOLS, Compiled, Launch, compile_launch, on_device, record, record_decode
from mixer import Operator, operators
from rich.console import Console
from rich.progress import track
from rich.table import Table

from sleepkern.backends.triton.plan_table import PLAIN_HOPPER, TABLE, Key, Variant
from sleepkern.backends.triton.ptxas import Assembler, packaged_assembler, tool
from sleepkern.rules import GATED_DELTA_RULE, GLA, KDA, SIMPLE_GLA, Rule
from sleepkern.testing import Shape

CAPABILITIES = (80, 90, 100)
SHARED = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024}
TENSOR_MEMORY = 512
LONG = 8192
STACK = {64: 640, 128: 640, 256: 704}
STACK_IEEE = {64: 1024, 128: 1024, 256: 8192}
STACK_PLAIN = {64: 640, 128: 640, 256: 1408}
"""Bytes of stack a thread may spill, by width of the head. Exact products take no matrix unit and hold more at a time:
they are there to check numbers by, not for speed. So do windows of two warps (PLAIN_HOPPER)."""
STACK_CHANNEL_BACKWARD = {64: 1024, 128: 1024, 256: 2048}
"""The same of gradients with a decay for each channel: dg is summed from pairs of tokens on both sides of each token,
whose tiles live side by side. A difference of two sums needs fewer, and loses all digits under strong decay."""


PLAIN = ("chunk_factors_kernel", "state_pass_kernel", "chunk_backward_kernel")
"""Kernels of a backward that gradients of states along the sequences do not change, where the plan is the usual one."""


@dataclass(frozen=True)
class Subject:
    """One kernel of one call; capability is that of its plan."""

    name: str
    rule: Rule
    shape: Shape
    key: Key
    kernel: str
    capability: int
    normalize: bool = False
    passes: int = 1
    raw: bool = False
    variants: tuple[tuple[str, Variant], ...] = ()
    state_every: int | None = None
    decode: tuple[torch.dtype, bool, bool] | None = None
    """The type of a decode's states, whether they are in a pool, and whether those after each token are stored."""

    @property
    def architecture(self) -> int:
        """What it is compiled for."""
        return abs(self.capability)

    def launch(self) -> Launch:
        """The launch that the product would make."""
        key = self.key
        with on_device(self.capability, dict(self.variants)):
            if self.decode is not None:
                return record_decode(self.rule, self.shape, *self.decode)[0]
            launches = record(
                self.rule, self.shape, key.precision, key.direction, self.normalize, self.passes, raw=self.raw,
                state_every=self.state_every,
            )  # fmt: skip
        return next(one for one in launches if one.name == self.kernel)


def subjects(quick: bool) -> Iterator[Subject]:
    """Every row of the table on every architecture; then switches that the rows do not show, on one.

    The two directions share prepare, which is compiled in the backward's form (it also keeps X). Windows of float32
    and exact products, which hold no architecture's matrix units, are compiled for sm_90 alone.
    """
    for key in TABLE:
        if quick and (key.width != 128 or key.precision != "bf16"):
            continue
        every, some = _capabilities(key)
        if quick:
            every, some = (tuple(c for c in chosen if abs(c) == 90) for chosen in (every, some))
        shape = Shape(T=LONG, H=16, HV=16, K=key.width, V=key.width)
        rule = KDA if key.channel else GATED_DELTA_RULE
        shared = () if key.direction == "backward" else ("chunk_factors_kernel",)
        yield from _of(rule, shape, key, every, without=shared)
        window = replace(shape, T=TABLE[key].chunk if key.precision == "bf16" else 16)
        yield from _of(rule, window, key, some, without=shared)
    yield from _switches(quick)
    yield from _states(quick)
    if not quick:
        yield from _variants(CAPABILITIES)


def _capabilities(key: Key) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The capabilities that the row of a key is compiled for, and those for its single chunk.

    A device with a row of its own needs no other; in tf32 Blackwell takes what Hopper takes.
    """
    if key.capability != 0:
        return (key.capability,), (key.capability,)
    wanted = {"bf16": CAPABILITIES, "tf32": (80, 90), "ieee": (90,)}[key.precision]
    every = tuple(c for c in wanted if key._replace(capability=c) not in TABLE)
    return every, every if key.precision == "bf16" else tuple(c for c in every if c == 90)


def _switches(quick: bool) -> Iterator[Subject]:
    step_capabilities = (90,) if quick else CAPABILITIES
    grouped = Shape(H=4, HV=16, K=96, V=192, lengths=(1000, 3000, 50))
    for rule in (GATED_DELTA_RULE, KDA) if quick else (GATED_DELTA_RULE, SIMPLE_GLA, GLA, KDA):
        for direction in ("forward", "backward"):
            key = Key(0, direction, "bf16", rule.gate == "channel", 128)
            yield from _of(rule, grouped, key, (90,), normalize=True)
        key = Key(0, "forward", "bf16", rule.gate == "channel", 128)
        yield from _of(rule, Shape(T=256, H=16, HV=16, K=128, V=128), key, (90,), passes=8)
        yield from _of(rule, Shape(T=1, H=16, HV=16, K=128, V=128), key, step_capabilities)
    for rule in (GATED_DELTA_RULE, KDA):
        for direction, T in (("forward", 1),) if quick else (("forward", 1), ("backward", LONG)):
            key = Key(0, direction, "bf16", rule.gate == "channel", 128)
            yield from _of(rule, Shape(T=T, H=16, HV=16, K=128, V=128), key, (90,), raw=True)


def _states(quick: bool) -> Iterator[Subject]:
    """Kernels with states along the sequences, whose chunks may be smaller than the table's, and decodes of states."""
    shape, packed = Shape(T=LONG, H=16, HV=16, K=128, V=128), Shape(H=4, HV=16, K=96, V=192, lengths=(1000, 3000, 50))
    for rule in (GATED_DELTA_RULE,) if quick else (GATED_DELTA_RULE, SIMPLE_GLA, GLA, KDA):
        capabilities = (90,) if quick or not rule.delta else CAPABILITIES
        for direction in ("forward", "backward"):
            key = Key(0, direction, "bf16", rule.gate == "channel", 128)
            for every, one in ((64, shape),) if quick else ((64, shape), (128, packed), (48, shape), (32, packed)):
                usual = every % 64 == 0
                without = () if not usual else PLAIN if direction == "backward" else PLAIN[:1]
                yield from _of(rule, one, key, capabilities, without=without, state_every=every)
        key = Key(0, "forward", "bf16", rule.gate == "channel", 128)
        for states in (torch.float32, torch.bfloat16):
            for pool, after_each in ((False, True), (True, False), (True, True)):
                if quick and (states == torch.float32 or not pool):
                    continue
                name = f"{rule.name} decode of {str(states)[6:]} states" + " in a pool" * pool + " of all" * after_each
                one = Shape(B=8, T=4, H=16, HV=16, K=128, V=128)
                for capability in capabilities:
                    made = (states, pool, after_each)
                    yield Subject(name, rule, one, key, "decode_kernel", capability, True, decode=made)


def _variants(capabilities: tuple[int, ...]) -> Iterator[Subject]:
    """The kernels that plans with variants take and others do not, with head and channel decay."""
    for rule, normalize in ((GATED_DELTA_RULE, True), (KDA, False)):
        shape = Shape(T=LONG, H=2, HV=2, K=128, V=128)
        for direction, variants, kernels in (
            ("forward", (("state_pass", "segments"),), ("segment_maps_kernel", "join_segments_kernel")),
            ("forward", (("state_pass", "decays"),), ("chunk_factors_kernel", "state_pass_kernel")),
            ("backward", (("state_pass_backward", "decays"),), ("state_pass_backward_kernel",)),
            ("backward", (("chunk_backward", "products"),), ("chunk_backward_values_kernel", "chunk_backward_kernel")),
        ):
            if rule.gate == "channel" and {"decays", "segments"} & set(dict(variants).values()):
                continue  # it has no decays of rows, and no candidate has segments, whose join spills
            key = Key(0, direction, "bf16", rule.gate == "channel", 128)
            name = f"{rule.name} {direction} {'/'.join(dict(variants).values())}"
            for capability in capabilities:
                for kernel in kernels:
                    yield Subject(name, rule, shape, key, kernel, capability, normalize, variants=variants)


def _of(
    rule: Rule, shape: Shape, key: Key, capabilities: tuple[int, ...] = CAPABILITIES, normalize: bool = False,
    passes: int = 1, without: tuple[str, ...] = (), raw: bool = False, state_every: int | None = None,
) -> Iterator[Subject]:  # fmt: skip
    name = f"{rule.name} {key.direction} {key.precision} T={shape.T} K={shape.K} V={shape.V}"
    name += " packed" * (shape.lengths is not None) + f" N={passes}" * (passes > 1) + " raw gates" * raw
    name += "" if state_every is None else f" states every {state_every}"
    for capability in capabilities:
        with on_device(capability):
            launches = record(
                rule, shape, key.precision, key.direction, normalize, passes, raw=raw, state_every=state_every
            )
        for one in launches:
            if one.name not in without:
                yield Subject(
                    name, rule, shape, key, one.name, capability, normalize, passes, raw, state_every=state_every
                )


Row = tuple[Subject | Operator, str, Compiled | None, str]
"""A kernel, the version of its assembler, what it needs, and what is wrong with it ('' if nothing)."""


def measure(subject: Subject | Operator) -> list[Row]:
    """The compiled kernel's needs, by each assembler."""
    return [_measured(subject, one) for one in (assemblers() if subject.architecture == 90 else (None,))]


def _measured(subject: Subject | Operator, assembler: Assembler | None) -> Row:
    label = "" if assembler is None else ".".join(assembler.version.split(".")[:2])
    try:
        made = compile_launch(subject.launch(), subject.architecture, assembler)
    except Exception as error:  # a compiler's failure is one red row, not the end of the table
        return subject, label, None, f"{type(error).__name__}: {str(error).splitlines()[-1][:80]}"
    faults = subject.faults(made) if isinstance(subject, Operator) else _faults(subject, made)
    return subject, label, made, "; ".join(faults)


@lru_cache(maxsize=1)
def assemblers() -> tuple[Assembler, ...]:
    """Those that code for Hopper may be assembled by, each version once."""
    own = (tool(str(TOOLS / name), "triton") for name in ("ptxas", "ptxas-blackwell"))
    return tuple({one.version: one for one in (*own, packaged_assembler()) if one is not None}.values())


def _faults(subject: Subject, made: Compiled) -> Iterator[str]:
    precision = subject.key.precision
    if made.shared > SHARED[subject.architecture]:
        yield f"shared memory {made.shared} > {SHARED[subject.architecture]}"
    budget = STACK_IEEE if precision == "ieee" else STACK_PLAIN if subject.capability < 0 else STACK
    stack = budget[subject.key.width]
    if subject.key.channel and subject.key.direction == "backward":
        stack = max(stack, STACK_CHANNEL_BACKWARD[subject.key.width])
    if made.stack > stack:
        yield f"stack {made.stack} > {stack}"
    if made.tensor_memory > TENSOR_MEMORY:
        yield f"tensor memory {made.tensor_memory} > {TENSOR_MEMORY}"
    if precision != "ieee" and subject.kernel != "decode_kernel" and made.tensor_instructions == 0:
        yield "no tensor-core instruction"
    if made.transposes and subject.architecture == 90:
        yield f"{made.transposes} transposes of products"
    if made.wgmma and not _may_have_warp_groups(subject):
        yield f"{made.wgmma} warp-group products"
    if made.instructions < 100:
        yield f"an empty body ({made.instructions} instructions)"


def _may_have_warp_groups(subject: Subject) -> bool:
    """Tells whether a plan may. Those of a Hopper without a sound assembler may not, nor may equal plans of another."""
    key = subject.key
    plain = TABLE.get(key._replace(capability=PLAIN_HOPPER))
    return subject.capability != PLAIN_HOPPER and not (key.capability == 90 and TABLE[key] == plain)


@triton.jit
def planted_kernel(p_x, C: tl.constexpr):
    """A product that takes the transpose of a product, to see that the gate sees it."""
    i = tl.arange(0, C)
    at = i[:, None] * C + i[None, :]
    x = tl.load(p_x + at)
    y = tl.dot(x, x).to(tl.bfloat16)
    tl.store(p_x + at, tl.dot(tl.trans(y), x).to(tl.bfloat16))


def sees_planted_fault() -> bool:
    """Whether a transposed product is found."""
    arguments = {"p_x": torch.empty(64, 64, dtype=torch.bfloat16, device="meta"), "C": 64}
    return compile_launch(Launch(planted_kernel, arguments, 4, 1), 90).transposes > 0


def main() -> int:
    """Compile all, print the table, return 1 if a kernel is faulty or the planted fault goes unseen."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--jobs", type=int, default=os.cpu_count())
    parser.add_argument("--quick", action="store_true", help="only the rows of bf16, K = 128, on sm_90")
    options = parser.parse_args()
    chosen = [*subjects(options.quick), *operators(options.quick, CAPABILITIES)]
    console = Console(width=170)
    table = Table(title="Triton kernels, compiled without a device")
    for column in (
        "call",
        "kernel",
        "sm",
        "ptxas",
        "registers",
        "stack",
        "shared",
        "tensor memory",
        "mma",
        "seconds",
        "fault",
    ):
        table.add_column(column, justify="left" if column in ("call", "kernel", "fault") else "right")
    faulty = 0
    with ProcessPoolExecutor(options.jobs) as pool:
        done = pool.map(measure, chosen)
        for subject, ptxas, made, fault in (row for rows in track(done, "compiling", len(chosen)) for row in rows):
            faulty += bool(fault)
            numbers = [""] * 6
            if made is not None:
                needs = (made.registers, made.stack, made.shared, made.tensor_memory, made.tensor_instructions)
                numbers = [*(str(n) for n in needs), f"{made.seconds:.1f}"]
            architecture = f"{subject.architecture}{' plain' * (subject.capability < 0)}"
            table.add_row(subject.name, subject.kernel, architecture, ptxas, *numbers, f"[red]{fault}[/]")
    console.print(table)
    seen = sees_planted_fault()
    names = ", ".join(f"{one.source}'s {one.version}" for one in assemblers())
    planted = "seen" if seen else "NOT seen"
    console.print(f"{len(chosen)} kernels, those of sm_90 by {names}: {faulty} faulty; the planted fault was {planted}")
    return int(faulty > 0 or not seen)


if __name__ == "__main__":
    sys.exit(main())
