"""A session: a text of any length goes in; each window is slept over, then its attention cache is dropped."""

from __future__ import annotations

import time
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .cuda_graph import Captures
from .generation_options import pad_of
from .pass_loop import Passing
from .protocols import Memory, Stack, copied, stack_of
from .saved_state import restored, saved
from .settings import ConvState, Eviction, Feedback, check_settings, looped_of
from .text import Questions, Text, by_length, joined, merged, own, text_of

REPORTS = 256
"""Sleeps whose reports a session keeps, the last ones."""


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


class SleepSession(Passing):
    """A hybrid model that sleeps.

    Windows of `window` tokens go through the model's blocks; those of `blocks` run `passes` times, each on what the one
    before left, with the fast weights carried from pass to pass. Then keys and values of the window are dropped: memory
    does not grow with the text. Answers read the fast weights in one ordinary pass (arXiv 2605.26099).

    Reading keeps nothing for gradients, whatever the mode of autograd. One session belongs to one thread at a time; a
    fork for each lets threads read and ask side by side.

    Args:
        model: a SleepLM (sleepkern.nn), a causal language model of transformers that has layers with a recurrence (or
            was given some by `retrofit`), such a model inside DataParallel, torch.compile or peft, the text model of a
            composite one, or a Stack of any other (docs/models.md). Its weights are not changed.
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
        checkpoint: for training, keep only what lies between passes, and run each again in the backward; implies
            differentiable.
        capture: on a CUDA device, and without gradients and padding, record a sleep over a whole window as a CUDA graph
            and replay it for the windows after (`Captures` says when not). The model's weights have to stay in place.
        differentiable: for training: where autograd is on, `ingest`, `sleep` and `read` keep what gradients through all
            that was ingested need, so that memory grows with the text.

    Attributes:
        position: tokens that were slept over; those after them wait for their window to fill.
        waiting: these, [B,tokens], or None.
        reports: a SleepReport of each of the last 256 sleeps.

    Raises:
        TypeError, ValueError: an argument of another type or out of range, or a model without such layers.
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
        differentiable: bool = False,
    ) -> None:
        counts, choices = (
            {"window": window, "passes": passes},
            {"eviction": eviction, "feedback": feedback, "conv_state": conv_state},
        )
        switches = {"checkpoint": checkpoint, "capture": capture, "differentiable": differentiable}
        check_settings(counts, choices, switches, settled, feedback)
        self.stack = stack_of(model)
        self.looped = looped_of(blocks, len(self.stack))
        self.model, self.window, self.passes = model, window, passes
        self.eviction, self.feedback, self.conv_state = eviction, feedback, conv_state
        self.settled, self.checkpoint, self.differentiable = settled, checkpoint, differentiable or checkpoint
        self.captures = Captures() if capture else None
        self.memory: Memory = self.stack.memory()
        if not self.memory.recurrent:
            raise ValueError(f"model: got a {type(model).__name__}; expected one with layers that have a recurrence")
        if feedback == "replay" and not self.stack.replays:
            raise ValueError(
                f"feedback: got 'replay' for a {type(model).__name__}; expected a SleepLM, whose blocks can repeat "
                "their recurrence alone"
            )
        self.position = self.batch = 0
        self.waiting: Tensor | None = None
        self.waiting_mask: Tensor | None = None
        self.kept_mask: Tensor | None = None
        self.reports: list[SleepReport] = []

    def __repr__(self) -> str:
        return (
            f"SleepSession({type(self.model).__name__}, window={self.window}, passes={self.passes}, "
            f"eviction={self.eviction!r}, feedback={self.feedback!r}): {self.position} tokens slept over, "
            f"{self._waiting()} waiting"
        )

    @property
    def vocabulary(self) -> int | None:
        """Tokens that the model knows, where that is known."""
        return getattr(self.stack, "vocabulary", None)

    def ingest(self, ids: Any, attention_mask: Tensor | None = None) -> SleepSession:
        """Take in tokens of any length; whole windows are slept over, the rest waits for more.

        If a window fails, those before it have been slept over and all from it on waits; if the first does, nothing was
        taken. So `position` and what waits always say how far the text went in.

        Args:
            ids: integers [B,T], or a mapping with input_ids (and attention_mask), as tokenizers of transformers give.
            attention_mask: [B,T], 0 where a row is padded, on the left of its text, else 1.

        Raises:
            TypeError, ValueError: other ids or another mask, also tokens that the model does not know.
        """
        text = text_of(ids, attention_mask, self.vocabulary)
        self._check_rows(text.ids)
        ids, mask = self._with_waiting(*text)
        with self._grad():
            return self._sleep_over(ids, mask, ids.shape[1] // self.window * self.window)

    def sleep(self) -> SleepSession:
        """Sleep over the tokens that wait, though they do not fill a window."""
        if self._waiting() > 0:
            assert self.waiting is not None
            with self._grad():
                self._sleep_over(self.waiting, self.waiting_mask, self._waiting())
        return self

    def read(self, ids: Any, attention_mask: Tensor | None = None) -> Tensor:
        """Logits [B,T,vocabulary] of tokens after all that was ingested, in one pass; the session does not change.

        A session of one row is asked as many questions as ids has rows. Those of one length run together, without their
        padding, where logits are 0. Arguments and errors as of `ingest`; a row needs a token.
        """
        text = self._question(ids, attention_mask)
        out: Tensor | None = None
        with self._grad():
            for part in by_length(text):
                logits = self._for(part)._read(part.ids)
                if part.rows is None:
                    return logits
                out = logits.new_zeros(*text.ids.shape, logits.shape[-1]) if out is None else out
                out[part.rows, text.ids.shape[1] - part.ids.shape[1] :] = logits
        assert out is not None
        return out

    @torch.no_grad()
    def generate(self, ids: Any, attention_mask: Tensor | None = None, **options: Any) -> Any:
        """ids [B,T] and what follows them after all that was ingested, in one pass.

        options are those of transformers' `generate`, beams too, and the model's generation_config holds; they count
        and see ids alone. SleepLM and RecordedStack have max_new_tokens, max_length, min_new_tokens, min_length,
        eos_token_id, pad_token_id, do_sample, temperature, top_k, top_p and generation_config. With
        return_dict_in_generate ids and what follows are the `sequences` of what that returns. The session does not
        change, so many questions can be asked of one text, by threads on forks of it too.

        A session of one row is asked as many questions as ids has rows. Those of one length run together, shortest
        first, and answers are filled with pad_token_id to the longest; for questions of several lengths there is no
        streamer and no return_dict_in_generate.

        Raises:
            TypeError, ValueError: as of `ingest`; no token; an option that a session cannot heed.
        """
        text = self._question(ids, attention_mask)
        if text.ids.shape[1] == 0:
            raise ValueError("ids: got no tokens; expected at least one, after which to go on")
        parts = by_length(text)
        single = [name for name in ("streamer", "return_dict_in_generate") if options.get(name)]
        if len(parts) > 1 and single:
            raise ValueError(f"options: got {', '.join(single)} for questions of several lengths; expected one length")
        made = [self._for(part)._generate(part.ids, options) for part in parts]
        if parts[0].rows is None:
            return made[0]
        pad = pad_of(getattr(self.stack, "model", None), options)
        if isinstance(made[0], Tensor):
            return merged(text.ids, parts, made, pad)
        made[0].sequences = merged(text.ids, parts, [made[0].sequences], pad)
        return made[0]

    def fork(self) -> SleepSession:
        """A session that goes on from here on its own; the model is shared, memory is copied when it changes."""
        return self._with_memory(copied(self.stack, self.memory))

    __copy__ = fork

    def __deepcopy__(self, memo: dict[int, Any]) -> SleepSession:
        raise TypeError("deepcopy: a session is copied by fork(), which shares the model; for another, load_state_dict")

    def state_dict(self) -> dict[str, Tensor]:
        """All that the session remembers, as its own tensors (for safetensors); not the model, not the settings."""
        return saved(self)

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Go on from copies of what `state_dict` gave, of a session with the same model and settings.

        Reads one token to see what the model remembers of it.

        Raises:
            TypeError, ValueError: names, sizes, types or a position that this session could not go on from; it is then
                as it was.
        """
        example = next(iter(self._parameters()), torch.empty(0))
        found = restored(self, state, example.device)
        self.memory, self.position, self.batch, self.waiting, self.waiting_mask, self.kept_mask = found

    def _grad(self) -> AbstractContextManager[Any]:
        """What reading runs in."""
        return nullcontext() if self.differentiable else torch.no_grad()

    def _with_memory(self, memory: Memory) -> SleepSession:
        other = object.__new__(SleepSession)
        other.__dict__ |= self.__dict__
        other.reports, other.memory = list(self.reports), memory
        return other

    def _for(self, part: Questions) -> SleepSession:
        """A session that remembers for each of these questions what it has to."""
        have, count = self._rows(), part.ids.shape[0]
        index = part.ids.new_zeros(count, dtype=torch.int64) if have == 1 and count > 1 else part.rows
        if have is None or index is None or (have == 1 and count == 1):
            return self
        other = self._with_memory(copied(self.stack, self.memory, index))
        other.batch = count
        for name in ("waiting", "waiting_mask", "kept_mask"):
            kept = getattr(self, name)
            setattr(other, name, None if kept is None else kept[index])
        return other

    def _read(self, ids: Tensor) -> Tensor:
        if ids.shape[1] == 0:  # any token gives the width of the vocabulary
            h, _ = self.stack.open(ids.new_zeros(ids.shape[0], 1), 0, self.stack.memory(), None)
            return self.stack.logits(h)[:, :0]
        ids, mask = self._with_waiting(ids)
        h, calls = self._open(ids, mask, copied(self.stack, self.memory), self.position)
        for call in calls:
            h = call(h)
        return self.stack.logits(h[:, self._waiting() :])

    def _generate(self, ids: Tensor, options: dict[str, Any]) -> Any:
        full, mask = self._with_waiting(ids)
        mask = self._mask_with_kept(full, torch.ones_like(full) if mask is None else mask)
        assert mask is not None
        return self.stack.generate(full, mask, self.position, self.memory, self._waiting(), **options)

    def _sleep_over(self, ids: Tensor, mask: Tensor | None, end: int) -> SleepSession:
        """Window by window up to token `end`; what follows waits."""
        self.batch = ids.shape[0]
        if end == 0:
            self.waiting, self.waiting_mask = ids, mask
        try:
            for start in range(0, end, self.window):
                self._sleep(ids, mask, slice(start, min(start + self.window, end)))
        finally:
            self.waiting, self.waiting_mask = own(self.waiting), own(self.waiting_mask)
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
        del self.reports[:-REPORTS]

    def _with_waiting(self, ids: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        if self.waiting is None:
            return ids, mask
        return torch.cat([self.waiting, ids], dim=1), joined(self.waiting, self.waiting_mask, ids, mask)

    def _waiting(self) -> int:
        return 0 if self.waiting is None else self.waiting.shape[1]

    def _rows(self) -> int | None:
        """Of the batch, None before there are any."""
        return None if self.position == 0 and self.waiting is None else self.batch

    def _check_rows(self, ids: Tensor, shared: bool = False) -> None:
        rows = self._rows()
        if rows not in (None, ids.shape[0]) and not (shared and rows == 1):
            raise ValueError(f"ids: got {ids.shape[0]} rows; expected {rows}, as before")

    def _question(self, ids: Any, attention_mask: Tensor | None) -> Text:
        text = text_of(ids, attention_mask, self.vocabulary)
        self._check_rows(text.ids, shared=True)
        return text
