"""N passes over a window, as far as they concern memory: all of a sleep but what is said of it."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint as checkpointed

from ..backends.modules import change_of, repeat
from ..state import KVState, RecurrentState, State
from .protocols import Memory, Stack, Whole, put_back
from .settings import ConvState, Eviction, Feedback
from .text import joined, own


class Passing:
    """What a SleepSession does with a window; the settings are explained there."""

    model: nn.Module | Stack
    stack: Stack
    memory: Memory
    looped: range
    passes: int
    eviction: Eviction
    feedback: Feedback
    conv_state: ConvState
    settled: float | None
    checkpoint: bool
    differentiable: bool
    kept_mask: Tensor | None

    def pass_through(self, ids: Tensor, mask: Tensor | None, first: int | Tensor) -> Tensor:
        """A sleep as far as it concerns memory, all of it or none; changes [N]. first: position of the first token."""
        memory = self.memory
        before, kept = memory.fast(), memory.slow()
        low, high = self.looped[0], self.looped[-1] + 1
        with put_back(memory, before, kept):
            h, calls = self._open(ids, mask, memory, first)
            for call in calls[:low]:
                h = call(h)
            if isinstance(self.stack, Whole) and self._why_not_whole(h, mask) is None:
                h, changes = self.stack.sleep(h, self.looped, memory, self.passes, self.feedback, self.conv_state)
            else:
                h, changes = self._passes(calls[low:high], h, before, kept)
            for call in calls[high:]:
                h = call(h)
            self._evict(ids.shape[1], mask)
        return changes

    def explain(self) -> str:
        """How a sleep over a window without padding runs: in one call, or block by block and why."""
        example = next(iter(self._parameters()), torch.empty(0))
        reason = self._why_not_whole(example, None)
        if reason is not None:
            return f"block by block: {reason}"
        return f"all passes in one call, {'one launch' if example.is_cuda else 'of C++'}"

    def _why_not_whole(self, h: Tensor, mask: Tensor | None) -> str | None:
        """None where all passes over h are one call (`sleep_blocks`), else the sentence why each block is called."""
        if not isinstance(self.stack, Whole):
            return "only the blocks of a SleepLM run in one call"
        if mask is not None or self.kept_mask is not None:
            return "padding"
        if self.settled is not None:
            return "whether another pass follows depends on numbers (settled)"
        if self.feedback == "replay":
            return "a replay repeats the recurrence alone"
        recorded = self.differentiable and not self.checkpoint and torch.is_grad_enabled()
        if recorded and any(p.requires_grad for p in self._parameters()):
            return "gradients; with checkpoint=True each pass is run again for them instead"
        return self.stack.why_not(h, self.looped)

    def _parameters(self) -> list[Tensor]:
        return list(self.model.parameters()) if isinstance(self.model, nn.Module) else []

    def _passes(
        self, looped: list[Any], h: Tensor, before: dict[int, RecurrentState], kept: dict[int, KVState]
    ) -> tuple[Tensor, Tensor]:
        """Block by block: h after the last pass, and changes [N]."""
        passes, first = self.passes, True
        if self.feedback == "replay":
            looped, passes = [partial(call, replays=passes) for call in looped], 1

        def one_pass(h: Tensor, states: list[State]) -> tuple[Tensor, list[State], Tensor]:
            nonlocal first
            if not first:
                self._carry_in(states)
            first = False
            h = self._run(looped, h)
            after = self._carried(self.memory.fast(), self.memory.slow())
            self._check_remembered(after)
            return h, after, change_of(states, after)

        began, carry = self._carried(before, kept), self.conv_state == "carry"
        h, _, changes = repeat(one_pass, h, began, passes, self.feedback == "reinject", carry, self.settled)
        return h, changes

    def _looped(self) -> tuple[list[int], list[int]]:
        """The looped blocks with a fast weight, and those with keys and values."""
        memory = self.memory
        return [i for i in memory.recurrent if i in self.looped], [i for i in memory.attention if i in self.looped]

    def _carried(self, fast: dict[int, RecurrentState], slow: dict[int, KVState]) -> list[State]:
        """What the looped blocks have of these: fast weights first, then keys and values."""
        recurrent, attention = self._looped()
        return [*(fast.get(i) for i in recurrent), *(slow.get(i) for i in attention)]

    def _carry_in(self, states: list[State]) -> None:
        """Let the looped blocks have these, in the order of `_carried`; the others keep what they have."""
        memory, (recurrent, attention) = self.memory, self._looped()
        fast = {i: x for i, x in memory.fast().items() if i not in self.looped}
        slow = {i: x for i, x in memory.slow().items() if i not in self.looped}
        for i, state in zip((*recurrent, *attention), states, strict=True):
            if isinstance(state, RecurrentState):
                fast[i] = state
            elif state is not None:
                slow[i] = state
        memory.set_slow(slow)
        memory.set_fast(fast)

    def _run(self, calls: list[Any], h: Tensor) -> Tensor:
        """The looped blocks once."""
        if self.checkpoint and torch.is_grad_enabled():
            return self._run_checkpointed(calls, h)
        for call in calls:
            h = call(h)
        return h

    def _run_checkpointed(self, calls: list[Any], h: Tensor) -> Tensor:
        """The same as a function of h and the fast weights, which gives both anew and leaves memory as it was.

        The backward calls it again, when memory has long gone on.
        """
        memory, fast, slow = self.memory, self.memory.fast(), self.memory.slow()
        before = sorted(i for i in fast if i in self.looped)
        after = [i for i in memory.recurrent if i in self.looped]
        kept = [i for i in memory.attention if i in self.looped and self.eviction == "sliding"]

        def once(h: Tensor, *states: Tensor) -> tuple[Tensor, ...]:
            aside = memory.fast(), memory.slow()
            try:
                memory.set_fast({i: RecurrentState(*states[2 * n : 2 * n + 2]) for n, i in enumerate(before)})
                memory.set_slow(slow)
                for call in calls:
                    h = call(h)
                made = [*(memory.fast()[i] for i in after), *(memory.slow()[i] for i in kept)]
            finally:  # the backward leaves early, by an exception, once it has what it needs
                memory.set_fast(aside[0])
                memory.set_slow(aside[1])
            return (h, *(t for pair in made for t in pair))

        h, *made = checkpointed(once, h, *(t for i in before for t in fast[i]), use_reentrant=False)
        pairs = list(zip(made[::2], made[1::2], strict=True))
        memory.set_fast(fast | {i: RecurrentState(*pair) for i, pair in zip(after, pairs, strict=False)})
        memory.set_slow(slow | {i: KVState(*pair) for i, pair in zip(kept, pairs[len(after) :], strict=True)})
        return h

    def _check_remembered(self, after: list[State]) -> None:
        """
        Raises:
            ValueError: looped blocks that should have left a fast weight and did not.
        """
        lost = [i for i, state in zip(self._looped()[0], after, strict=False) if state is None]
        if lost:
            raise ValueError(
                f"memory: got no fast weights of blocks {lost} after a pass; expected those of all `recurrent` blocks, "
                "written into what the model was opened with"
            )

    def _evict(self, tokens: int, mask: Tensor | None) -> None:
        if self.eviction == "hard":
            self.memory.set_slow({})
            return
        kept = {i: KVState(*(t[..., -tokens:, :] for t in x)) for i, x in self.memory.slow().items()}
        self.memory.set_slow(kept)
        self.kept_mask = own(mask) if kept else None

    def _open(self, ids: Tensor, mask: Tensor | None, memory: Memory, first: int | Tensor) -> tuple[Tensor, list[Any]]:
        mask = self._mask_with_kept(ids, mask)
        mask = None if mask is None or bool(mask.all()) else mask
        return self.stack.open(ids, first, memory, mask)

    def _mask_with_kept(self, ids: Tensor, mask: Tensor | None) -> Tensor | None:
        """[B, kept keys + T]; None where nothing is padded, so that a GPU need not be asked."""
        kept = next((slow.keys.shape[-2] for slow in self.memory.slow().values()), 0)
        return joined(ids.new_ones(ids.shape[0], kept), self.kept_mask, ids, mask)
