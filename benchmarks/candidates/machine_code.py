"""What a kernel's machine code issues: its loops, and the instructions of each kind when loops run their trips."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

LINE = re.compile(r"^\s*/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]*)(.*)$")
LABEL = re.compile(r"^(\.L_\w+):")
TARGET = re.compile(r"`\((\.L_\w+)\)")


@dataclass
class Loop:
    """The instructions from a label to the last branch back to it, and the loops among them."""

    first: int
    last: int
    inner: list[Loop] = field(default_factory=list)


@dataclass(frozen=True)
class Trips:
    """How often a loop of the source runs, the loops in its body, and whether the compiler does not know the count."""

    count: float
    inner: tuple[Trips, ...] = ()
    unknown: bool = False

    def looped(self) -> list[Trips]:
        """This loop, or those in its body where it runs once and the compiler knows it."""
        if self.count > 1 or self.unknown:
            return [self]
        return [found for one in self.inner for found in one.looped()] if self.count == 1 else []


@dataclass(frozen=True)
class Code:
    """Opcodes in order, and the outermost loops."""

    opcodes: tuple[str, ...]
    loops: tuple[Loop, ...]

    def issued(self, trips: Sequence[Trips]) -> dict[str, float]:
        """Instructions of a warp by opcode when each loop runs its trips.

        Branches are taken as if every instruction outside of loops were issued once.

        Raises:
            ValueError: the source has other loops than the machine code.
        """
        weight = [1.0] * len(self.opcodes)
        for loop, count in matched(self.loops, trips):
            for i in range(loop.first, loop.last + 1):
                weight[i] *= count
        total: dict[str, float] = {}
        for opcode, times in zip(self.opcodes, weight, strict=True):
            name = opcode.split(".")[0]
            total[name] = total.get(name, 0.0) + times
        return total


def matched(loops: Sequence[Loop], trips: Sequence[Trips]) -> Iterator[tuple[Loop, float]]:
    """Each loop of the machine code with the trips of its counterpart in the source.

    A loop that runs once is none in the machine code. Where a body has no loops at all, the compiler has unrolled them.
    """
    wanted = [found for one in trips for found in one.looped()]
    if not loops:
        return
    if len(loops) != len(wanted):
        raise ValueError(f"{len(loops)} loops in the machine code, {len(wanted)} in the source")
    for loop, one in zip(loops, wanted, strict=True):
        yield loop, one.count
        yield from matched(loop.inner, one.inner)


def read(assembly: str) -> Code:
    """The code of one kernel, from nvdisasm's listing."""
    opcodes: list[str] = []
    labels: dict[str, int] = {}
    back: dict[str, int] = {}
    for line in assembly.splitlines():
        label = LABEL.match(line)
        if label:
            labels[label[1]] = len(opcodes)
        found = LINE.match(line)
        if not found:
            continue
        opcodes.append(found[1])
        target = TARGET.search(found[2])
        if found[1].startswith("BRA") and target and target[1] in labels and labels[target[1]] < len(opcodes) - 1:
            back[target[1]] = len(opcodes) - 1
    spans = sorted((Loop(labels[name], last) for name, last in back.items()), key=lambda one: (one.first, -one.last))
    outermost: list[Loop] = []
    stack: list[Loop] = []
    for loop in spans:
        while stack and loop.first > stack[-1].last:
            stack.pop()
        (stack[-1].inner if stack else outermost).append(loop)
        stack.append(loop)
    return Code(tuple(opcodes), tuple(outermost))
