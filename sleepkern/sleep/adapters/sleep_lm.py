"""Our own SleepLM, block by block."""

from __future__ import annotations

from functools import partial
from typing import Any

from torch import Tensor

from ...nn import HybridBlock, SleepLM
from ...state import KVState, RecurrentState
from ..blocks import sleep_blocks, why_not
from ..generation import written
from ..protocols import Memory, copied


class OwnMemory:
    """Memory as two dictionaries: blocks return what they remember."""

    def __init__(self, model: SleepLM) -> None:
        kinds = [block.recurrent for block in model.blocks()]
        self.recurrent = [i for i, recurrent in enumerate(kinds) if recurrent]
        self.attention = [i for i, recurrent in enumerate(kinds) if not recurrent]
        self._kept: dict[int, Any] = {}

    def fast(self) -> dict[int, RecurrentState]:
        return {i: self._kept[i] for i in self.recurrent if i in self._kept}

    def set_fast(self, fast: dict[int, RecurrentState]) -> None:
        self._kept = self.slow() | fast

    def slow(self) -> dict[int, KVState]:
        return {i: self._kept[i] for i in self.attention if i in self._kept}

    def set_slow(self, slow: dict[int, KVState]) -> None:
        self._kept = self.fast() | slow

    def run(self, i: int, block: HybridBlock, mask: Tensor | None, h: Tensor, replays: int = 1) -> Tensor:
        """Block number i, from what it remembers to what it will; replays: passes of its recurrence alone."""
        if mask is not None and i in self.recurrent:
            mask = mask[:, -h.shape[1] :]
        h, self._kept[i] = block(h, self._kept.get(i), mask, replays)
        return h

    def of(self, blocks: range) -> list[Any]:
        """What each of them remembers."""
        return [self._kept.get(i) for i in blocks]

    def remember(self, blocks: range, states: list[RecurrentState | KVState]) -> None:
        """In the place of what they remembered."""
        self._kept |= dict(zip(blocks, states, strict=True))


class OwnStack:
    """The blocks of a SleepLM. A window's places count from its own start, whatever `first` is."""

    replays = True

    def __init__(self, model: SleepLM) -> None:
        self.model = model

    def __len__(self) -> int:
        return len(self.model.layers)

    @property
    def vocabulary(self) -> int | None:
        """Tokens, each of every kind."""
        return self.model.known()

    def memory(self) -> OwnMemory:
        return OwnMemory(self.model)

    def open(
        self, ids: Tensor, first: int | Tensor, memory: Memory, mask: Tensor | None = None, place: int = 0
    ) -> tuple[Tensor, list[Any]]:
        assert isinstance(memory, OwnMemory)
        blocks = [partial(memory.run, i, block, mask) for i, block in enumerate(self.model.blocks())]
        return self.model.embed(ids, place), blocks

    def why_not(self, h: Tensor, blocks: range) -> str | None:
        return why_not(h, self.model.blocks()[blocks.start : blocks.stop])

    def sleep(
        self, h: Tensor, blocks: range, memory: Memory, passes: int, feedback: Any, conv_state: Any
    ) -> tuple[Tensor, Tensor]:
        assert isinstance(memory, OwnMemory)
        chosen = self.model.blocks()[blocks.start : blocks.stop]
        slept = sleep_blocks(h, chosen, memory.of(blocks), passes, feedback, conv_state)
        memory.remember(blocks, slept.states)
        return slept.h, slept.changes

    def logits(self, h: Tensor) -> Tensor:
        return self.model.logits(h)

    def generate(self, ids: Tensor, mask: Tensor, first: int, memory: Memory, waiting: int, **options: Any) -> Tensor:
        """Greedy or drawn (`written`); at most what is left of a window."""
        memory = copied(self, memory)

        def opened(new: Tensor, place: int, padding: Tensor | None) -> tuple[Tensor, list[Any]]:
            return self.open(new, first, memory, padding, place)

        return written(opened, self.logits, ids, mask, waiting, self.model, options)
