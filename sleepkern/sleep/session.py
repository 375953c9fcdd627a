"""A session: a text of any length goes in; each window is slept over, then its attention cache is dropped."""

from __future__ import annotations

import time
from functools import partial
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from .capture import Captures
from .memory import Fast, Memory, Slow, Stack, Whole, copied, put_back, stack_of
from .passes import normalised, relative_change

Eviction = Literal["hard", "sliding"]
Feedback = Literal["raw", "reinject", "replay"]
ConvState = Literal["rewind", "carry"]
CHOICES = {
    "eviction": ("hard", "sliding"),
    "feedback": ("raw", "reinject", "replay"),
    "conv_state": ("rewind", "carry"),
}


class SleepReport(NamedTuple):
    """One sleep.

    first    position of the window's first token
    tokens   of the window
    changes  for each pass made the norm of what it changed in the fast weights, relative to their norm after it
    seconds  until all of it was done, or on a GPU handed to the device, which nothing here waits for
    """

    first: int
    tokens: int
    changes: Tensor
    seconds: float


class SleepSession:
    """A hybrid model that sleeps.

    Windows of `window` tokens go through the model's blocks; those of `blocks` run `passes` times, each on what the one
    before left, with the fast weights carried from pass to pass. Then keys and values of the window are dropped: memory
    does not grow with the text. Answers read the fast weights in one ordinary pass (arXiv 2605.26099).

    Args:
        model: a SleepLM (sleepkern.nn), a causal language model of transformers that has layers with a recurrence (or
            was given some by `retrofit`), or a Stack of any other (docs/models.md). Its weights are not changed.
        window: tokens between two sleeps.
        passes: N, runs of the blocks over a window; 1 is reading with eviction.
        eviction: "hard" drops all keys and values after each sleep; "sliding" keeps those of the last window, so that
            the next one sees it.
        blocks: which blocks run N times, default all; the others run once.
        feedback: what a pass starts from: "raw", what the pass before left (the paper's formula); "reinject", that
            normalised, plus what the first pass started from; "replay", the same input as the first: blocks run once,
            and only their recurrences make N passes, over the keys, values and gates of the first (SleepLM only).
        conv_state: what the short convolutions see before the window in a pass after the first: "rewind", what preceded
            the window, or "carry", the window's own end.
        settled: end a sleep after the first pass that changed the fast weights by less than this (see SleepReport), all
            rows of the batch together; on a GPU the host then waits for each pass. Default: always N passes.
        checkpoint: under autograd keep only what lies between passes, and run each again in the backward.
        capture: on a CUDA device, and without gradients and padding, record a sleep over a whole window as a CUDA graph
            and replay it for the windows after (`Captures` says when not). The model's weights have to stay in place.

    Raises:
        ValueError: an argument out of range, or a model without such layers.
    """

    def __init__(
        self,
        model: nn.Module | Stack,
        window: int,
        passes: int = 1,
        eviction: Eviction = "hard",
        blocks: slice | None = None,
        feedback: Feedback = "raw",
        conv_state: ConvState = "rewind",
        settled: float | None = None,
        checkpoint: bool = False,
        capture: bool = False,
    ) -> None:
        given = {"eviction": eviction, "feedback": feedback, "conv_state": conv_state}
        for name, choices in CHOICES.items():
            if given[name] not in choices:
                raise ValueError(f"{name}: got {given[name]!r}; expected one of {', '.join(choices)}")
        for name, number in (("window", window), ("passes", passes)):
            if number < 1:
                raise ValueError(f"{name}: got {number}; expected at least 1")
        self.stack = stack_of(model)
        self.looped = range(len(self.stack))[blocks or slice(None)]
        if self.looped.step != 1 or len(self.looped) == 0:
            raise ValueError(f"blocks: got {blocks}; expected neighbours out of {len(self.stack)} blocks")
        self.model, self.window, self.passes = model, window, passes
        self.eviction, self.feedback, self.conv_state = eviction, feedback, conv_state
        self.settled, self.checkpoint = settled, checkpoint
        self.captures = Captures() if capture else None
        self.memory: Memory = self.stack.memory()
        if not self.memory.recurrent:
            raise ValueError(f"model: got a {type(model).__name__}; expected one with layers that have a recurrence")
        if feedback == "replay" and not self.stack.replays:
            raise ValueError(
                f"feedback: got 'replay' for a {type(model).__name__}; expected a SleepLM, whose blocks can repeat "
                "their recurrence alone"
            )
        if settled is not None and (settled < 0 or feedback == "replay"):
            raise ValueError(f"settled: got {settled} with feedback {feedback!r}; expected >= 0 and raw or reinject")
        self.position = 0
        self.waiting: Tensor | None = None
        self.waiting_mask: Tensor | None = None
        self.kept_mask: Tensor | None = None
        self.reports: list[SleepReport] = []

    def ingest(self, ids: Tensor, attention_mask: Tensor | None = None) -> SleepSession:
        """Take in tokens [B,T] of any length; whole windows are slept over, the rest waits for more.

        If a window fails, those before it have been slept over and all from it on waits; if the first does, nothing was
        taken. So `position` and what waits always say how far the text went in.

        attention_mask [B,T]: 0 where a row is padded, on the left of its text.
        """
        self._check(ids, attention_mask)
        ids, mask = self._with_waiting(ids, attention_mask)
        return self._sleep_over(ids, mask, ids.shape[1] // self.window * self.window)

    def sleep(self) -> SleepSession:
        """Sleep over the tokens that wait, though they do not fill a window."""
        if self._waiting() > 0:
            assert self.waiting is not None
            self._sleep_over(self.waiting, self.waiting_mask, self._waiting())
        return self

    def read(self, ids: Tensor) -> Tensor:
        """Logits [B,T,vocabulary] of tokens after all that was ingested, in one pass; the session does not change."""
        self._check(ids, None)
        if ids.shape[1] == 0:  # any token gives the width of the vocabulary
            h, _ = self.stack.open(ids.new_zeros(ids.shape[0], 1), 0, self.stack.memory(), None)
            return self.stack.logits(h)[:, :0]
        ids, mask = self._with_waiting(ids)
        memory = copied(self.stack, self.memory)
        h, calls = self._open(ids, mask, memory, self.position)
        for call in calls:
            h = call(h)
        return self.stack.logits(h[:, self._waiting() :])

    def generate(self, ids: Tensor, **options: Any) -> Any:
        """ids [B,T] and what follows them after all that was ingested, in one pass.

        options go to the model's own `generate`, beams too; SleepLM has max_new_tokens, do_sample and temperature. With
        return_dict_in_generate they are the `sequences` of what that returns. The session does not change, so many
        questions can be asked of one text, by threads on forks of it too.
        """
        self._check(ids, None)
        full, mask = self._with_waiting(ids)
        mask = self._mask_with_kept(full, torch.ones_like(full) if mask is None else mask)
        assert mask is not None
        made: Any = self.stack.generate(full, mask, self.position, self.memory, **options)
        if isinstance(made, Tensor):
            return made[:, self._waiting() :]
        made.sequences = made.sequences[:, self._waiting() :]
        return made

    def fork(self) -> SleepSession:
        """A session that goes on from here on its own; the model is shared, memory is copied when it changes."""
        other = object.__new__(SleepSession)
        other.__dict__ |= self.__dict__
        other.reports = list(self.reports)
        other.memory = copied(self.stack, self.memory)
        return other

    def state_dict(self) -> dict[str, Tensor]:
        """All that the session remembers, as tensors (for safetensors); not the model, not the settings."""
        found = {"position": torch.tensor(self.position)}
        for i, fast in self.memory.fast().items():
            found |= {f"{i}.conv": fast.conv.contiguous(), f"{i}.state": fast.state.contiguous()}
        for i, slow in self.memory.slow().items():
            found |= {f"{i}.keys": slow.keys.contiguous(), f"{i}.values": slow.values.contiguous()}
        masks = {"waiting": self.waiting, "waiting_mask": self.waiting_mask, "kept_mask": self.kept_mask}
        return found | {name: t.contiguous() for name, t in masks.items() if t is not None}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Go on from what `state_dict` gave, of a session with the same model and settings."""
        layers = {int(name.split(".")[0]) for name in state if "." in name}
        unknown = layers - {*self.memory.recurrent, *self.memory.attention}
        if "position" not in state or unknown:
            raise ValueError(f"state: got layers {sorted(unknown)}; expected the state_dict of a session of this model")
        self.memory = self.stack.memory()
        self.memory.set_fast({i: Fast(state[f"{i}.conv"], state[f"{i}.state"]) for i in layers if f"{i}.conv" in state})
        self.memory.set_slow(
            {i: Slow(state[f"{i}.keys"], state[f"{i}.values"]) for i in layers if f"{i}.keys" in state}
        )
        self.position = int(state["position"])
        self.waiting, self.waiting_mask = state.get("waiting"), state.get("waiting_mask")
        self.kept_mask = state.get("kept_mask")

    def _sleep_over(self, ids: Tensor, mask: Tensor | None, end: int) -> SleepSession:
        """Window by window up to token `end`; what follows waits."""
        if end == 0:
            self.waiting, self.waiting_mask = ids, mask
        try:
            for start in range(0, end, self.window):
                self._sleep(ids, mask, slice(start, min(start + self.window, end)))
        finally:
            self.waiting, self.waiting_mask = _own(self.waiting), _own(self.waiting_mask)
        return self

    def _sleep(self, ids: Tensor, mask: Tensor | None, part: slice) -> None:
        """Over one window of ids; from then on what follows it waits."""
        began, window, padding = time.perf_counter(), ids[:, part], None if mask is None else mask[:, part]
        if self.captures is not None and self.captures.why_not(self, window, padding) is None:
            changes = self.captures.sleep(self, window)
        else:
            changes = self.pass_through(window, padding, self.position)
        first, self.position = self.position, self.position + window.shape[1]
        self.waiting, self.waiting_mask = ids[:, part.stop :], None if mask is None else mask[:, part.stop :]
        self.reports.append(SleepReport(first, window.shape[1], changes, time.perf_counter() - began))

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
        if torch.is_grad_enabled() and not self.checkpoint and any(p.requires_grad for p in self._parameters()):
            return "gradients; with checkpoint=True each pass is run again for them instead"
        return self.stack.why_not(h, self.looped)

    def _parameters(self) -> list[Tensor]:
        return list(self.model.parameters()) if isinstance(self.model, nn.Module) else []

    def _passes(
        self, looped: list[Any], h: Tensor, before: dict[int, Fast], kept: dict[int, Slow]
    ) -> tuple[Tensor, Tensor]:
        """Block by block: h after the last pass, and changes [N]."""
        memory, passes = self.memory, self.passes
        if self.feedback == "replay":
            looped, passes = [partial(call, replays=passes) for call in looped], 1
        start, changes = h, []
        for done in range(passes):
            if done > 0:
                self._start_pass(before, kept)
                h = h if self.feedback == "raw" else normalised(h) + start
            fast = {i: x for i, x in memory.fast().items() if i in self.looped}
            h = self._run(looped, h)
            after = {i: x.state for i, x in memory.fast().items() if i in self.looped}
            changes.append(relative_change((fast[i].state if i in fast else None, S) for i, S in after.items()))
            if self.settled is not None and float(changes[-1]) < self.settled:
                break
        return h, torch.stack(changes)

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
                memory.set_fast({i: Fast(*states[2 * n : 2 * n + 2]) for n, i in enumerate(before)})
                memory.set_slow(slow)
                for call in calls:
                    h = call(h)
                made = [*(memory.fast()[i] for i in after), *(memory.slow()[i] for i in kept)]
            finally:  # the backward leaves early, by an exception, once it has what it needs
                memory.set_fast(aside[0])
                memory.set_slow(aside[1])
            return (h, *(t for pair in made for t in pair))

        h, *made = checkpoint(once, h, *(t for i in before for t in fast[i]), use_reentrant=False)
        pairs = list(zip(made[::2], made[1::2], strict=True))
        memory.set_fast(fast | {i: Fast(*pair) for i, pair in zip(after, pairs, strict=False)})
        memory.set_slow(slow | {i: Slow(*pair) for i, pair in zip(kept, pairs[len(after) :], strict=True)})
        return h

    def _start_pass(self, before: dict[int, Fast], kept: dict[int, Slow]) -> None:
        """Attention starts a pass from what it had before the window, in the looped blocks; so may convolutions."""
        slow = {i: x for i, x in self.memory.slow().items() if i not in self.looped}
        self.memory.set_slow(slow | {i: x for i, x in kept.items() if i in self.looped})
        if self.conv_state == "rewind":
            fast = self.memory.fast()
            for i in fast.keys() & set(self.looped):
                conv = before[i].conv if i in before else torch.zeros_like(fast[i].conv)
                fast[i] = Fast(conv, fast[i].state)
            self.memory.set_fast(fast)

    def _evict(self, tokens: int, mask: Tensor | None) -> None:
        if self.eviction == "hard":
            self.memory.set_slow({})
            return
        self.memory.set_slow({i: Slow(*(t[..., -tokens:, :] for t in x)) for i, x in self.memory.slow().items()})
        self.kept_mask = _own(mask)

    def _open(self, ids: Tensor, mask: Tensor | None, memory: Memory, first: int | Tensor) -> tuple[Tensor, list[Any]]:
        mask = self._mask_with_kept(ids, mask)
        mask = None if mask is None or bool(mask.all()) else mask
        return self.stack.open(ids, first, memory, mask)

    def _mask_with_kept(self, ids: Tensor, mask: Tensor | None) -> Tensor | None:
        """[B, kept keys + T]; None where nothing is padded, so that a GPU need not be asked."""
        kept = next((slow.keys.shape[-2] for slow in self.memory.slow().values()), 0)
        return _joined(ids.new_ones(ids.shape[0], kept), self.kept_mask, ids, mask)

    def _with_waiting(self, ids: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        if self.waiting is None:
            return ids, mask
        return torch.cat([self.waiting, ids], dim=1), _joined(self.waiting, self.waiting_mask, ids, mask)

    def _waiting(self) -> int:
        return 0 if self.waiting is None else self.waiting.shape[1]

    def _check(self, ids: Tensor, mask: Tensor | None) -> None:
        if ids.ndim != 2 or ids.is_floating_point():
            raise ValueError(f"ids: got {ids.dtype} {list(ids.shape)}; expected integers [B,T]")
        rows = next((x.state.shape[0] for x in self.memory.fast().values()), None)
        rows = self.waiting.shape[0] if rows is None and self.waiting is not None else rows
        if rows not in (None, ids.shape[0]):
            raise ValueError(f"ids: got {ids.shape[0]} rows; expected {rows}, as before")
        if mask is not None and mask.shape != ids.shape:
            raise ValueError(f"attention_mask: got {list(mask.shape)}; expected {list(ids.shape)}, as ids")
        if mask is not None and bool((mask[:, 1:] < mask[:, :-1]).any()):
            raise ValueError("attention_mask: got padding behind text; expected it on the left")


def _joined(first: Tensor, first_mask: Tensor | None, second: Tensor, mask: Tensor | None) -> Tensor | None:
    """The mask of tokens [B,T1] and [B,T2] one after the other; None means that none is padded."""
    if first_mask is None and mask is None:
        return None
    pairs = ((first, first_mask), (second, mask))
    return torch.cat([torch.ones_like(ids) if mask is None else mask for ids, mask in pairs], dim=1)


def _own(ids: Tensor | None) -> Tensor | None:
    """A copy, or None of nothing: a view would keep a whole text, and change with what it is a view of."""
    return None if ids is None or ids.shape[1] == 0 else ids.clone()
