"""A prediction of a kernel's time on an H200 from its machine code, without a device.

    cycles of a program = 2.9 x instructions of a warp + 78 x barriers
    time = rounds x cycles / clock + 1.39 x bytes / bandwidth        kernels that wait for their loads
    time = max(rounds x cycles / clock, bytes through L2 / its rate) kernels that copy ahead into shared memory

A round is what all multiprocessors hold at a time; registers and shared memory say how much that is. The three
constants are fitted to MEASURED, ten kernels that were timed on one H200 (docs/kernels/triton.md). `calibration` says
how far each is off, also when it is left out of the fit.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

MULTIPROCESSORS = 132
SCHEDULERS = 4
REGISTERS = 65536
SHARED_MEMORY = 228 * 1024
SHARED_MEMORY_OF_THE_SYSTEM = 1024
"""What a CTA takes beside its own."""
WARPS = 64
PROGRAMS = 32
CYCLES_PER_US = 1755.0
"""The clock under load."""
MEMORY_BYTES_PER_US = 4.26e6
"""Large copies, measured."""
L2_BYTES_PER_US = 6.0e6
"""The state pass of the plain plan moved as much, measured."""


class Costs(NamedTuple):
    """The constants of the model: cycles of an instruction and of a barrier, and the factor of the bytes."""

    instruction: float
    barrier: float
    bytes: float


COSTS = Costs(2.9, 78.0, 1.39)


@dataclass(frozen=True)
class Kernel:
    """What the model knows of one launch.

    counts are the instructions of a warp by opcode, loops included. copies_ahead says whether loads are issued ahead
    into shared memory; l2_bytes are those of all programs together.
    """

    programs: int
    warps: int
    registers: int
    shared: int
    counts: dict[str, float]
    bytes: float
    l2_bytes: float
    copies_ahead: bool

    @property
    def resident(self) -> int:
        """CTAs that a multiprocessor holds at a time."""
        registers = REGISTERS // (32 * self.warps * (8 * math.ceil(self.registers / 8)))
        shared = SHARED_MEMORY // (self.shared + SHARED_MEMORY_OF_THE_SYSTEM)
        return max(1, min(registers, shared, WARPS // self.warps, PROGRAMS))

    @property
    def rounds(self) -> float:
        """Rounds of CTAs on the device: whole ones where there are few, as the last is not full."""
        rounds = self.programs / (MULTIPROCESSORS * self.resident)
        return float(math.ceil(rounds)) if rounds < 4 else rounds

    @property
    def warps_of_a_scheduler(self) -> float:
        """Warps that share one scheduler while a round is full."""
        held = min(self.resident, math.ceil(self.programs / MULTIPROCESSORS))
        return held * self.warps / SCHEDULERS

    def of(self, *opcodes: str) -> float:
        """Instructions of a warp with one of these opcodes, modifiers aside."""
        return sum(self.counts.get(opcode, 0.0) for opcode in opcodes)

    @property
    def instructions(self) -> float:
        """All instructions of a warp."""
        return float(sum(self.counts.values()))

    def cycles(self, costs: Costs = COSTS) -> float:
        """Cycles of one program; a scheduler issues at most one instruction a cycle for all its warps."""
        instruction = max(costs.instruction, self.warps_of_a_scheduler)
        return instruction * self.instructions + costs.barrier * self.of("BAR")

    def microseconds(self, costs: Costs = COSTS) -> float:
        """The predicted time of the launch."""
        chain = self.rounds * self.cycles(costs) / CYCLES_PER_US
        memory = self.bytes / MEMORY_BYTES_PER_US
        if self.copies_ahead:
            return max(chain, memory, self.l2_bytes / L2_BYTES_PER_US)
        return chain + costs.bytes * memory


def fitted(kernels: Sequence[tuple[Kernel, float]], steps: int = 400) -> Costs:
    """The costs that make the squared relative errors of (kernel, microseconds) least, by coordinates.

    Every coordinate is divided or multiplied by a factor that shrinks; the errors decide.
    """
    costs, factor = COSTS, 1.3

    def error(candidate: Costs) -> float:
        return sum((k.microseconds(candidate) / us - 1) ** 2 for k, us in kernels)

    for _ in range(steps):
        tried = [
            costs._replace(**{name: getattr(costs, name) * f}) for name in Costs._fields for f in (factor, 1 / factor)
        ]
        best = min(tried, key=error)
        if error(best) < error(costs):
            costs = best
        else:
            factor = math.sqrt(factor)
    return costs
