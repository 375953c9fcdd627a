"""N passes of a stack of hybrid blocks over a window: in one call, module by module, and compiled by torch."""

from __future__ import annotations

import copy
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..nn import SleepLM
from ..rules import GATED_DELTA_RULE, Rule
from ..sleep.blocks import one_by_one, sleep_blocks
from ..testing import TOLERANCE, Shape, relative_error

MODULES, COMPILED = "ours, modules", "ours, compiled"
CHECKED = 3
"""Windows of a batch whose result is compared."""


class Prepared(NamedTuple):
    """The calls of a case to be timed, sleepkern's first, and the error of each on the inputs it is timed on."""

    calls: dict[str, Callable[[], Any]]
    errors: dict[str, float]


@dataclass(frozen=True)
class BlocksCase:
    """A stack of SleepLM's blocks, attention and gated DeltaNet in turns, MLP of factor 4.

    label    whose sizes
    L        tokens of the window
    width    d. heads, of width / heads. blocks: how many
    batch    windows
    passes   N
    threads  None, the bench's own
    dtype    of weights and window
    """

    label: str
    L: int
    width: int
    heads: int
    blocks: int
    batch: int
    passes: int = 4
    threads: int | None = None
    dtype: torch.dtype = torch.float32

    op = "blocks"

    @property
    def tolerance(self) -> float:
        """The largest error of a right result."""
        return TOLERANCE[self.dtype]

    @property
    def rule(self) -> Rule:
        """The name of its recurrence."""
        return GATED_DELTA_RULE

    @property
    def name(self) -> str:
        """Unique, e.g. "blocks rule 110 L=24 d=256 x4 B=1 N=4"."""
        name = f"blocks {self.label} L={self.L} d={self.width} x{self.blocks} B={self.batch} N={self.passes}"
        name += "" if self.dtype == torch.float32 else f" {str(self.dtype).removeprefix('torch.')}"
        return name + (f" threads={self.threads}" if self.threads is not None else "")

    @property
    def shape(self) -> Shape:
        """The sizes of its recurrence."""
        width = self.width // self.heads
        return Shape(B=self.batch, T=self.L, H=self.heads, HV=self.heads, K=width, V=width)

    @property
    def timed_tokens(self) -> int:
        """Tokens of a call, those of each pass counted."""
        return self.batch * self.L * self.passes

    @property
    def flops(self) -> int:
        """Operations of the products with weights; the rest of a pass is not counted."""
        d, f = self.width, 4 * self.width
        delta = (self.blocks // 2) * (5 * d * d + 2 * self.heads * d)
        attention = (self.blocks - self.blocks // 2) * 4 * d * d
        return 2 * self.timed_tokens * (delta + attention + self.blocks * 2 * d * f)

    def quietly(self) -> AbstractContextManager[Any]:
        """Run the case without gradients."""
        return torch.no_grad()

    def prepare(self, quick: bool) -> Prepared:
        """torch.compile takes a minute to compile and is left out when quick.

        Of each call all windows are computed, and CHECKED of them, spread over the batch, compared with float64.
        """
        torch.manual_seed(0)
        model = SleepLM(2, self.width, self.heads, self.blocks, self.L, factor=4).to(self.dtype)
        exact, blocks = copy.deepcopy(model).double(), model.blocks()
        h = torch.randn(self.batch, self.L, self.width, dtype=self.dtype)
        checked = torch.linspace(0, self.batch - 1, min(CHECKED, self.batch)).long()
        true = one_by_one(h[checked].double(), exact.blocks(), self.passes).h

        def modules(h: Tensor) -> Tensor:
            return one_by_one(h, blocks, self.passes).h

        calls: dict[str, Callable[[], Tensor]] = {
            "ours": lambda: sleep_blocks(h, blocks, passes=self.passes).h,
            MODULES: lambda: modules(h),
        }
        if not quick:
            torch.compiler.reset()
            compiled = torch.compile(modules, dynamic=False)
            calls[COMPILED] = lambda: compiled(h)
        return Prepared(calls, {name: relative_error(call()[checked], true) for name, call in calls.items()})


_RULE_110, _DEPO = ("rule 110", 24, 256, 4, 4), ("depo", 75, 512, 8, 10)
"""The stacks of the paper."""


def _cases(*batches: tuple[int, ...], **options: Any) -> tuple[BlocksCase, ...]:
    """Those of Rule 110 with the first batches, of Depo with the second."""
    sizes = zip((_RULE_110, _DEPO), batches, strict=True)
    return tuple(BlocksCase(*size, batch, **options) for size, some in sizes for batch in some)


CASES = _cases((1, 64), (1, 64)) + _cases((1, 64), (1,), dtype=torch.bfloat16) + _cases((1, 64), (1, 64), threads=2)
QUICK = (BlocksCase("rule 110", 24, 256, 4, 4, 1),)
