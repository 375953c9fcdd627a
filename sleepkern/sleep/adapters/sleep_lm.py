"""The adapter of a SleepLM (sleepkern.nn)."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from ...nn import HybridBlock, SleepLM
from ...state import KVState, RecurrentState
from ..blocks import explain_blocks, sleep_blocks, why_not
from ..generation import generate
from ..protocols import LayerCache, copy_cache


class SleepLMCache:
    """A cache by block: the blocks of a SleepLM return their states."""

    recurrent: list[int]
    attention: list[int]

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
        """Run block i on its state, and keep the state after it; replays: passes of its recurrence alone."""
        if mask is not None and i in self.recurrent:
            mask = mask[:, -h.shape[1] :]
        h, self._kept[i] = block(h, self._kept.get(i), mask, replays)
        return h

    def states(self, blocks: range) -> list[Any]:
        """The state of each of these blocks, None where a block has none."""
        return [self._kept.get(i) for i in blocks]

    def set_states(self, blocks: range, states: list[RecurrentState | KVState]) -> None:
        """Replace the states of these blocks."""
        self._kept |= dict(zip(blocks, states, strict=True))


class SleepLMAdapter:
    """The blocks of a SleepLM. Positions count from the start of a window, whatever `first` is."""

    model: SleepLM

    replays = True

    def __init__(self, model: SleepLM) -> None:
        self.model = model

    def __len__(self) -> int:
        return len(self.model.layers)

    @property
    def vocabulary(self) -> int | None:
        """The number of tokens times the number of kinds."""
        return self.model.known()

    def memory(self) -> SleepLMCache:
        return SleepLMCache(self.model)

    def open(
        self, ids: Tensor, first: int | Tensor, memory: LayerCache, mask: Tensor | None = None, offset: int = 0
    ) -> tuple[Tensor, list[Any]]:
        """The adapter's `open`; offset: of the first token in its window."""
        assert isinstance(memory, SleepLMCache)
        blocks = [partial(memory.run, i, block, mask) for i, block in enumerate(self.model.blocks())]
        return self.model.embed(ids, offset), blocks

    def why_not(self, h: Tensor, blocks: range) -> str | None:
        return why_not(h, self.model.blocks()[blocks.start : blocks.stop])

    @torch.no_grad()
    def explain(self, tokens: int, blocks: range, backend: str | None) -> str:
        weight = next(self.model.parameters())
        h = self.model.embed(torch.zeros(1, min(tokens, self.model.window), dtype=torch.int64, device=weight.device))
        return str(explain_blocks(h, self.model.blocks()[blocks.start : blocks.stop], backend))

    def sleep(
        self,
        h: Tensor,
        blocks: range,
        memory: LayerCache,
        passes: int,
        feedback: Any,
        conv_state: Any,
        backend: str | None,
    ) -> tuple[Tensor, Tensor]:
        assert isinstance(memory, SleepLMCache)
        chosen = self.model.blocks()[blocks.start : blocks.stop]
        slept = sleep_blocks(h, chosen, memory.states(blocks), passes, feedback, conv_state, backend)
        memory.set_states(blocks, slept.states)
        return slept.h, slept.changes

    def logits(self, h: Tensor) -> Tensor:
        return self.model.logits(h)

    def generate(
        self, ids: Tensor, mask: Tensor, first: int, memory: LayerCache, pending: int, **options: Any
    ) -> Tensor:
        """Tokens by `generation.generate`; all of them have to fit into one window."""
        memory = copy_cache(self, memory)

        def open_at(new: Tensor, offset: int, padding: Tensor | None) -> tuple[Tensor, list[Any]]:
            return self.open(new, first, memory, padding, offset)

        return generate(open_at, self.logits, ids, mask, pending, self.model, options)
