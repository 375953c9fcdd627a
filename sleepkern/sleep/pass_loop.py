"""The pass loop of a session: N passes over one window, what the passes write into memory, and the eviction after."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint as checkpointed

from ..backends.modules import change_of, repeat
from ..state import KVState, RecurrentState, State
from .attention import attention_of
from .protocols import FusedModelAdapter, LayerCache, ModelAdapter, restored_on_error
from .settings import ConvState, Eviction, Feedback
from .window_buffer import copy_of_tokens, joined_mask


class PassLoop:
    """The part of a SleepSession that runs a window; SleepSession documents the settings."""

    model: nn.Module | ModelAdapter
    adapter: ModelAdapter
    memory: LayerCache
    window: int
    looped: range
    passes: int
    eviction: Eviction
    feedback: Feedback
    conv_state: ConvState
    tol: float | None
    backend: str | None
    checkpoint: bool
    differentiable: bool
    kept_mask: Tensor | None

    def pass_through(self, ids: Tensor, mask: Tensor | None, first: int | Tensor) -> Tensor:
        """Run a window through the model and evict its keys. On an exception memory is as it was.

        Args:
            ids: tokens [B,T] of the window.
            mask: [B,T] with 0 for padding, None where no token is padded.
            first: position of the first token in the whole text.

        Returns:
            The relative change [N] of the fast weights in each pass.

        Raises:
            ValueError: `backend` names one that cannot run this window.
        """
        memory = self.memory
        before, kept = memory.fast(), memory.slow()
        low, high = self.looped[0], self.looped[-1] + 1
        with restored_on_error(memory, before, kept):
            h, calls = self._open(ids, mask, memory, first)
            for call in calls[:low]:
                h = call(h)
            if isinstance(self.adapter, FusedModelAdapter) and self._why_not_fused(h, mask) is None:
                h, changes = self.adapter.sleep(
                    h, self.looped, memory, self.passes, self.feedback, self.conv_state, self.backend
                )
            else:
                h, changes = self._run_passes(calls[low:high], h, before, kept)
            for call in calls[high:]:
                h = call(h)
            self._evict(ids.shape[1], mask)
        return changes

    def explain(self) -> str:
        """How a sleep over a full window without padding runs.

        Returns:
            What `explain_blocks` says of the window where all passes are one call, else a sentence why the session
            runs block by block and, where the model says so, a line on its attention.

        Raises:
            ValueError: `backend` names one that cannot run such a window.
        """
        example = next(iter(self._parameters()), torch.empty(0))
        reason = self._why_not_fused(example, None)
        if reason is not None:
            attention = attention_of(self.model)
            return f"block by block: {reason}" + (f"\nattention: {attention}" if attention else "")
        assert isinstance(self.adapter, FusedModelAdapter)
        return f"all passes in one call\n{self.adapter.explain(self.window, self.looped, self.backend)}"

    def _why_not_fused(self, h: Tensor, mask: Tensor | None) -> str | None:
        """None where one call of `sleep_blocks` runs all passes over h, else a sentence why each block is called.

        Raises:
            ValueError: the reason forbids the backend that the session names.
        """
        if self.backend == "modules":
            return "backend='modules'"
        reason = self._why_not_one_call(mask)
        if self.backend is None and reason is None and isinstance(self.adapter, FusedModelAdapter):
            return self.adapter.why_not(h, self.looped)
        if self.backend is not None and reason is not None:
            raise ValueError(f"backend: got {self.backend!r}, which cannot run this window: {reason}")
        return reason

    def _why_not_one_call(self, mask: Tensor | None) -> str | None:
        """The reasons that do not depend on h."""
        if not isinstance(self.adapter, FusedModelAdapter):
            return "only the blocks of a SleepLM run in one call"
        if mask is not None or self.kept_mask is not None:
            return "padding"
        if self.tol is not None:
            return "whether another pass follows depends on values (tol)"
        if self.feedback == "replay":
            return "a replay repeats the recurrence alone"
        recorded = self.differentiable and not self.checkpoint and torch.is_grad_enabled()
        if recorded and any(p.requires_grad for p in self._parameters()):
            return "gradients; with checkpoint=True the backward runs each pass again instead"
        return None

    def _parameters(self) -> list[Tensor]:
        return list(self.model.parameters()) if isinstance(self.model, nn.Module) else []

    def _run_passes(
        self, looped: list[Any], h: Tensor, before: dict[int, RecurrentState], kept: dict[int, KVState]
    ) -> tuple[Tensor, Tensor]:
        """Call the looped blocks one by one in each pass; h after the last pass, and changes [N]."""
        passes, first = self.passes, True
        if self.feedback == "replay":
            looped, passes = [partial(call, replays=passes) for call in looped], 1

        def one_pass(h: Tensor, states: list[State]) -> tuple[Tensor, list[State], Tensor]:
            nonlocal first
            if not first:
                self._set_states(states)
            first = False
            h = self._run_blocks(looped, h)
            after = self._states_of(self.memory.fast(), self.memory.slow())
            self._check_states(after)
            return h, after, change_of(states, after)

        began, carry = self._states_of(before, kept), self.conv_state == "carry"
        h, _, changes = repeat(one_pass, h, began, passes, self.feedback == "reinject", carry, self.tol)
        return h, changes

    def _looped_layers(self) -> tuple[list[int], list[int]]:
        """The looped blocks with a fast weight, and those with keys and values."""
        memory = self.memory
        return [i for i in memory.recurrent if i in self.looped], [i for i in memory.attention if i in self.looped]

    def _states_of(self, fast: dict[int, RecurrentState], slow: dict[int, KVState]) -> list[State]:
        """The states of the looped blocks: first the fast weights, then the keys and values."""
        recurrent, attention = self._looped_layers()
        return [*(fast.get(i) for i in recurrent), *(slow.get(i) for i in attention)]

    def _set_states(self, states: list[State]) -> None:
        """Give the looped blocks these states, in the order of `_states_of`; the other blocks keep their states."""
        memory, (recurrent, attention) = self.memory, self._looped_layers()
        fast = {i: x for i, x in memory.fast().items() if i not in self.looped}
        slow = {i: x for i, x in memory.slow().items() if i not in self.looped}
        for i, state in zip((*recurrent, *attention), states, strict=True):
            if isinstance(state, RecurrentState):
                fast[i] = state
            elif state is not None:
                slow[i] = state
        memory.set_slow(slow)
        memory.set_fast(fast)

    def _run_blocks(self, calls: list[Any], h: Tensor) -> Tensor:
        """Run the looped blocks once."""
        if self.checkpoint and torch.is_grad_enabled():
            return self._run_checkpointed(calls, h)
        for call in calls:
            h = call(h)
        return h

    def _run_checkpointed(self, calls: list[Any], h: Tensor) -> Tensor:
        """Run the looped blocks once, and keep only h and the fast weights for the backward.

        `once` is a function of h and the fast weights, returns both, and leaves memory as it was: the backward calls
        `once` again when memory has long gone on.
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
                found = [*(memory.fast()[i] for i in after), *(memory.slow()[i] for i in kept)]
            finally:  # the backward leaves early, by an exception, once it has what it needs
                memory.set_fast(aside[0])
                memory.set_slow(aside[1])
            return (h, *(t for pair in found for t in pair))

        h, *flat = checkpointed(once, h, *(t for i in before for t in fast[i]), use_reentrant=False)
        pairs = list(zip(flat[::2], flat[1::2], strict=True))
        memory.set_fast(fast | {i: RecurrentState(*pair) for i, pair in zip(after, pairs, strict=False)})
        memory.set_slow(slow | {i: KVState(*pair) for i, pair in zip(kept, pairs[len(after) :], strict=True)})
        return h

    def _check_states(self, after: list[State]) -> None:
        """Check that every looped block with a recurrence has left a fast weight.

        Raises:
            ValueError: the indices of those that have not.
        """
        lost = [i for i, state in zip(self._looped_layers()[0], after, strict=False) if state is None]
        if lost:
            raise ValueError(
                f"memory: got no fast weights of blocks {lost} after a pass; expected those of all `recurrent` blocks, "
                "written into what the model was opened with"
            )

    def _evict(self, tokens: int, mask: Tensor | None) -> None:
        """Drop keys and values: all, or all but those of the last window."""
        if self.eviction == "hard":
            self.memory.set_slow({})
            return
        kept = {i: KVState(*(t[..., -tokens:, :] for t in x)) for i, x in self.memory.slow().items()}
        self.memory.set_slow(kept)
        self.kept_mask = copy_of_tokens(mask) if kept else None

    def _open(
        self, ids: Tensor, mask: Tensor | None, memory: LayerCache, first: int | Tensor
    ) -> tuple[Tensor, list[Any]]:
        mask = self._mask_with_kept(ids, mask)
        mask = None if mask is None or bool(mask.all()) else mask
        return self.adapter.open(ids, first, memory, mask)

    def _mask_with_kept(self, ids: Tensor, mask: Tensor | None) -> Tensor | None:
        """The mask [B, kept keys + T]; None where no token is padded, so that the host need not wait for a GPU."""
        kept = next((slow.keys.shape[-2] for slow in self.memory.slow().values()), 0)
        return joined_mask(ids.new_ones(ids.shape[0], kept), self.kept_mask, ids, mask)
