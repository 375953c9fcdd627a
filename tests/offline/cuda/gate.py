"""The CUDA kernels of the built module, taken apart and held to their budgets; no GPU is needed.

    python -m tests.offline.cuda.gate

Prints what each kernel needs on each architecture and exits with 1 if one is missing, spills registers, is too large
for a multiprocessor, or lacks the instructions it is written for: matrix units, matrix loads from shared memory,
asynchronous copies (by threads on sm_80, by the bulk engine from sm_90 on). A kernel that is made to spill must be seen
to do so.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import torch  # noqa: F401  before the extension
import triton
from rich.console import Console
from rich.table import Table

from sleepkern import _C
from sleepkern.backends.cuda import blocks_plan as planning
from sleepkern.backends.cuda.device import Device

MOST_MEGABYTES = 9.0
"""Size of the module: 8.2 of kernels and CPU code, 0.3 of bindings that take fields by name; the rest is room."""
ROOT = Path(__file__).resolve().parents[3]
TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
SHARED = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024}
"""Bytes of shared memory a CTA may have, by architecture: one build for each."""
REGISTERS = 65536
MODES = ("bf16", "fp32x3")
WIDTHS = (64, 128)
STATES = {"f": "float32", "t": "bfloat16"}
"""Types of a decode's states by their letter in a mangled name."""
POWERS = ("powers", "powers_backward")
BLOCKS = {
    (2, 64): (1, 24, 256, 4), (5, 64): (1, 75, 512, 8), (8, 64): (1, 128, 256, 4),
    (2, 128): (1, 24, 256, 2), (5, 128): (1, 75, 256, 2), (8, 128): (1, 128, 96, 1),
}  # fmt: skip
"""B, L, d and heads of a stack of blocks by the tiles of 16 rows that its windows take and the widest head."""
COPIES = {80: "LDGSTS", 90: "UBLKCP", 100: "UBLKCP"}


class Kernel(NamedTuple):
    """name, products, widest K, whether it is for channel decay, of `blocks` tiles of 16 rows, and of decode the type
    of its states."""

    name: str
    mode: str = ""
    width: int = 0
    channel: bool = False
    tiles: int = 0
    states: str = ""

    def threads(self) -> int:
        """The threads of a CTA."""
        return 128 if self.name == "decode" else 256

    def together(self) -> int:
        """The CTAs that a multiprocessor holds at once by the kernel's launch bounds."""
        if self.name == "decode":
            return {64: 4, 128: 3, 256: 2}[self.width]
        return 2 if self.name == "chunk_factors" else 1

    def shared(self, capability: int) -> int:
        """Bytes of shared memory of its smallest plan with outputs, on an architecture."""
        mode = MODES.index(self.mode) if self.mode else 0
        if self.name in ("single_chunk", "chunk_factors"):
            return int(_C.cuda_single_chunk_memory(mode=mode, K=self.width, output=True, channel=self.channel))
        if self.name in ("state_pass", "affine"):
            output, block = self.name == "state_pass", _C.cuda_widest_block
            return int(_C.cuda_multi_chunk_memory(mode=mode, K=self.width, output=output, block=block, slots=1))
        if self.name == "blocks":
            return blocks_memory(capability, *BLOCKS[self.tiles, self.width])
        if self.name in POWERS:
            return int(_C.cuda_powers_memory(K=self.width, backward=self.name == "powers_backward"))
        return 0


def blocks_memory(capability: int, B: int, L: int, d: int, heads: int) -> int:
    """Bytes of shared memory of a stack that alternates attention and gated DeltaNet, with an MLP of factor 4."""
    shapes = tuple(planning.LayerShape(r, heads, heads, d // heads, d // heads, 4, 4 * d) for r in (False, True))
    plan = planning.plan(B, L, d, shapes, Device((capability // 10, 0), SHARED[capability], 132))
    assert plan is not None
    return int(_C.cuda_blocks_memory(planning.call_of(plan, L), [planning.share(s, plan.cluster) for s in shapes]))


COLUMNS = ["kernel", "rows", "products", "K to", "of", "sm", "registers", "stack", "shared", "mma", "instructions"]
"""The columns of the table, whose last one is the fault. of: a decay, or the type of states."""
REFUSED = {(Kernel(name, "fp32x3", 128, True), 80) for name in ("single_chunk", "chunk_factors")}
"""Kernels whose shared memory an architecture does not have: `why_not` says so there."""


class Built(NamedTuple):
    """A kernel of the built module on one architecture."""

    registers: int
    stack: int
    opcodes: Counter[str]


def expected() -> Iterator[Kernel]:
    """Every kernel the launches of csrc/cuda choose from."""
    for mode in MODES:
        for width in WIDTHS:
            for channel in (False, True):
                yield Kernel("single_chunk", mode, width, channel)
                yield Kernel("chunk_factors", mode, width, channel)
            yield Kernel("state_pass", mode, width)
            yield Kernel("affine", mode, width)
    for width in WIDTHS:
        yield Kernel("powers", "", width)
        yield Kernel("powers_backward", "", width)
    for width in (64, 128, 256):
        for states in STATES.values():
            yield Kernel("decode", "", width, states=states)
    for tiles in _C.CudaBlocksConstants.TILES:
        for width in WIDTHS:
            yield Kernel("blocks", "", width, tiles=tiles)


def take_apart(module: Path) -> dict[tuple[Kernel, int], Built]:
    """All kernels of a file with device code, by kernel and architecture."""
    found: dict[tuple[Kernel, int], Built] = {}
    with tempfile.TemporaryDirectory() as folder:
        _tool("cuobjdump", "-xelf", "all", str(module.resolve()), cwd=folder)
        with ThreadPoolExecutor(2) as pool:
            for part in pool.map(_take_apart_elf, sorted(Path(folder).glob("*.cubin"))):
                found |= part
    return found


def _take_apart_elf(path: Path) -> dict[tuple[Kernel, int], Built]:
    match = re.search(r"sm_(\d+)", path.name)
    assert match is not None, path
    capability = int(match[1])
    usage = re.findall(r"Function (\w+):\s+REG:(\d+) STACK:(\d+)", _tool("cuobjdump", "-res-usage", str(path)))
    opcodes: dict[str, Counter[str]] = {}
    count: Counter[str] = Counter()
    for line in _tool("nvdisasm", "-c", str(path)).splitlines():
        if line.startswith(".text."):
            count = opcodes.setdefault(line[len(".text.") :].rstrip(":"), Counter())
        elif match := re.match(r"\s+/\*[0-9a-f]+\*/\s+(?:@!?U?P\w+\s+)?([A-Z0-9_]+)", line):
            count[match[1]] += 1
    return {
        (kernel, capability): Built(int(registers), int(stack), opcodes[name])
        for name, registers, stack in usage
        if (kernel := _kernel(name)) is not None
    }


def _kernel(mangled: str) -> Kernel | None:
    match = re.search(r"\d+([a-z_]+)_kernelI(?:LNS\d?_4ModeE(\d)E)?((?:Li\d+E)+)(?:Lb(\d)E)?([ft])?", mangled)
    if match is None:
        return None
    name, mode, numbers, channel, states = match.groups()
    *tiles, width = (int(n) for n in re.findall(r"\d+", numbers))
    width *= 8 if name == "decode" else 1  # an eighth of the rows a lane
    of_decode = STATES[states or "f"] if name == "decode" else ""
    return Kernel(name, MODES[int(mode)] if mode else "", width, channel == "1", *tiles, states=of_decode)


def faults(kernel: Kernel, capability: int, built: Built | None) -> Iterator[str]:
    """Yield the faults of a kernel."""
    if built is None:
        yield "missing"
        return
    ops = built.opcodes
    if built.stack > 0 or ops["STL"] + ops["LDL"] > 0:
        yield f"spills: a stack of {built.stack} bytes"
    if -(-built.registers // 8) * 8 * kernel.threads() * kernel.together() > REGISTERS:
        yield f"{built.registers} registers x {kernel.threads()} threads x {kernel.together()} CTAs"
    if ops.total() < 500:
        yield f"an empty body ({ops.total()} instructions)"
    if kernel.shared(capability) > SHARED[capability] and (kernel, capability) not in REFUSED:
        yield f"{kernel.shared(capability)} bytes of shared memory"
    if kernel.name != "decode" and (ops["HMMA"] == 0 or ops["LDSM"] == 0):
        yield "no matrix units, or no matrix loads"
    if kernel.name in ("state_pass", "affine", "blocks"):
        for copy in set(COPIES.values()):
            if (ops[copy] > 0) != (copy == COPIES[capability]):
                yield f"{ops[copy]} {copy}"
    if kernel.name == "blocks" and capability >= 90 and ops["UCGABAR_WAIT"] == 0:
        yield "no cluster's barrier"
    if any(ops[double] for double in ("DADD", "DMUL", "DFMA")):
        yield "double precision"


SPILLING = """
namespace sleepkern::cuda {
template <int ROWS>
__global__ void __launch_bounds__(1024, 2) decode_kernel(float* x, int rounds) {
  float S[2 * ROWS];
  for (int r = 0; r < 2 * ROWS; ++r) S[r] = x[r * 1024 + threadIdx.x];
  for (int i = 0; i < rounds; ++i) {
    for (int r = 0; r < 2 * ROWS; ++r) S[r] += S[(r + 7) % (2 * ROWS)] * S[(r + 31) % (2 * ROWS)];
  }
  for (int r = 0; r < 2 * ROWS; ++r) x[r * 1024 + threadIdx.x] = S[r];
}
template __global__ void decode_kernel<32>(float*, int);
}
"""
"""64 numbers a thread where there are registers for 32."""


def sees_a_spill() -> bool:
    """Whether a kernel that has too few registers is found to spill."""
    with tempfile.TemporaryDirectory() as folder:
        source, target = Path(folder) / "decode.cu", Path(folder) / "decode.sm_80.cubin"
        source.write_text(SPILLING)
        subprocess.run(["nvcc", "-arch=sm_80", "-cubin", str(source), "-o", str(target)], check=True)
        built = _take_apart_elf(target)
    kernel = Kernel("decode", "", 256, states="float32")
    return any(fault.startswith("spills") for fault in faults(kernel, 80, built[kernel, 80]))


def _tool(name: str, *arguments: str, cwd: str | None = None) -> str:
    command = [str(TOOLS / name), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True, cwd=cwd).stdout


def main() -> int:
    """Print the table, return 1 if a kernel is faulty or a planted spill goes unseen."""
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    console = Console(width=150)
    if not _C.has_cuda:
        console.print("sleepkern._C was built without CUDA: no kernels to check")
        return 0
    table = Table(title="CUDA kernels of the built module")
    for column in COLUMNS:
        table.add_column(column, justify="left" if column in ("kernel", "products", "of") else "right")
    table.add_column("fault")
    module, faulty = Path(_C.__file__), 0
    found = take_apart(module)
    for kernel in expected():
        for capability in SHARED:
            if capability < 90 and kernel.tiles > _C.CudaBlocksConstants.TILES[0]:
                continue
            built = found.get((kernel, capability))
            fault = "; ".join(faults(kernel, capability, built))
            faulty += bool(fault)
            numbers = [""] * 5
            if built is not None:
                counts = (
                    built.registers,
                    built.stack,
                    kernel.shared(capability),
                    built.opcodes["HMMA"],
                    built.opcodes.total(),
                )
                numbers = [str(n) for n in counts]
            decay = "channel" if kernel.channel else "head, none"
            if kernel.name not in ("single_chunk", "chunk_factors"):
                decay = kernel.states
            what = (kernel.name, str(16 * kernel.tiles or ""), kernel.mode, str(kernel.width), decay, str(capability))
            table.add_row(*what, *numbers, f"[red]{fault}[/]")
    console.print(table)
    seen, size = sees_a_spill(), module.stat().st_size / 1e6
    console.print(
        f"{len(found)} kernels, {faulty} faulty; the module has {size:.1f} MB; "
        f"the planted spill was {'seen' if seen else 'NOT seen'}"
    )
    return int(faulty > 0 or size > MOST_MEGABYTES or not seen)


if __name__ == "__main__":
    sys.exit(main())
