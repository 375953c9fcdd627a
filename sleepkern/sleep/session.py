"""A session reads a text of any length, sleeps over each of its windows, and then drops the attention cache."""

from __future__ import annotations

import time
import warnings
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .adapters.choose import adapter_of
from .cuda_graph import GraphCache
from .generation_options import pad_token
from .pass_loop import PassLoop
from .protocols import LayerCache, ModelAdapter, copy_cache
from .rewinding import Kept, Rewinding, check_keeping, set_state_type
from .saved_state import restored, saved
from .settings import ConvState, Eviction, Feedback, check_settings, looped_blocks, resolve_tol
from .text import Questions, Text, by_length, merge_answers, text_of
from .window_buffer import WindowBuffer

REPORTS = 256
"""Reports that a session keeps: those of its last sleeps."""
_RENAMED = {"waiting": "pending", "settled": "tol", "stack": "adapter"}
"""Former names of attributes of a session."""


class SleepReport(NamedTuple):
    """One sleep.

    first    position of the window's first token
    tokens   how many the window has
    changes  [N] for each pass |S_n - S_(n-1)| / |S_n| over the fast weights S of the looped blocks
    seconds  time until the sleep was done; on a GPU, time until the sleep was handed to the device
    """

    first: int
    tokens: int
    changes: Tensor
    seconds: float


class SleepSession(PassLoop, Rewinding):
    """A hybrid model that sleeps.

    Windows of `window` tokens go through the model's blocks. The blocks that `blocks` names run `passes` times over a
    window; each pass starts from the output of the pass before, and fast weights are carried from pass to pass. Then
    keys and values of the window are dropped, so that memory does not grow with the text. Answers read the fast weights
    in one ordinary pass (arXiv 2605.26099).

    Reading keeps nothing for gradients, whatever the mode of autograd. One session belongs to one thread at a time;
    with a fork for each, threads can read and answer side by side.

    Args:
        model: a SleepLM (sleepkern.nn), a causal language model of transformers that has layers with a recurrence (or
            was given some by `retrofit`), such a model inside DataParallel, torch.compile or peft, the text model of a
            composite one, or a ModelAdapter of any other (docs/guides/adapt_your_model.md). The session does not change
            the weights.
        window: tokens between two sleeps.
        passes: N, runs of the blocks over a window; 1 is reading with eviction.
        eviction: "hard" drops all keys and values after each sleep; "sliding" keeps those of the last window, so that
            the next window sees them.
        blocks: which blocks run N times, default all; the others run once.
        feedback: what a pass starts from. "raw": the output of the pass before (the paper's formula). "reinject": that
            output, normalised, plus the input of the first pass. "replay": the input of the first pass; the blocks run
            once, and only their recurrences make N passes, over the keys, values and gates of the first (SleepLM only).
        conv_state: what the short convolutions see before the window in a pass after the first: "rewind", the inputs
            before the window, or "carry", the window's own end.
        tol: end a sleep after the first pass whose change (see SleepReport) is less than this, all rows of the batch
            together; on a GPU the host then waits for each pass. Default: always N passes.
        checkpoint: for training, keep only the tensors between passes, and run each pass again in the backward; implies
            differentiable.
        capture: on a CUDA device, and without gradients and padding, record a sleep over a whole window as a CUDA graph
            and replay it for the windows after (`GraphCache.why_not` says when not). The model's weights have to stay
            at their addresses.
        differentiable: for training: where autograd is on, `ingest`, `sleep` and `read` keep what the gradients through
            the whole text need, so that memory grows with the text.
        backend: of `sleep_blocks`: "cuda", "cpu" or "modules" (block by block), default the first of these that can run
            a window; `explain` says which.
        settled: deprecated name of `tol`.
        keep_every: tokens, a multiple of window: the session keeps each position after so many, and `rewind` goes back
            to it. What is kept is the memory there, which is not copied.
        keep_last: the number of positions that are kept, the latest ones.
        state_dtype: torch.bfloat16 keeps fast weights in half the memory: each sleep computes in float32 and rounds
            them to nearest once. Default: float32.

    Attributes:
        position: the number of tokens that were slept over; later tokens are pending until their window is full.
        pending: the pending tokens [B,tokens], or None.
        reports: a SleepReport of each of the last 256 sleeps.
        kept_positions: the positions that `rewind` takes.

    Raises:
        TypeError, ValueError: an argument of another type or out of range, or a model without such layers.
    """

    adapter: ModelAdapter
    looped: range
    model: nn.Module | ModelAdapter
    window: int
    passes: int
    eviction: Eviction
    feedback: Feedback
    conv_state: ConvState
    tol: float | None
    checkpoint: bool
    differentiable: bool
    backend: str | None
    graph_cache: GraphCache | None
    position: int
    batch: int
    buffer: WindowBuffer
    keep_every: int | None
    keep_last: int
    state_dtype: torch.dtype | None

    def __init__(
        self,
        model: nn.Module | ModelAdapter,
        window: int,
        passes: int = 1,
        eviction: Eviction = "hard",
        blocks: slice | None = None,
        feedback: Feedback = "raw",
        conv_state: ConvState = "rewind",
        tol: float | None = None,
        checkpoint: bool = False,
        capture: bool = False,
        differentiable: bool = False,
        *,
        backend: str | None = None,
        settled: float | None = None,
        keep_every: int | None = None,
        keep_last: int = 16,
        state_dtype: torch.dtype | None = None,
    ) -> None:
        tol = resolve_tol(tol, settled)
        choices = {"eviction": eviction, "feedback": feedback, "conv_state": conv_state, "backend": backend}
        switches = {"checkpoint": checkpoint, "capture": capture, "differentiable": differentiable}
        check_settings({"window": window, "passes": passes}, choices, switches, tol, feedback)
        check_keeping(keep_every, keep_last, window, state_dtype)
        self.adapter = adapter_of(model)
        self.looped = looped_blocks(blocks, len(self.adapter))
        self.model, self.window, self.passes = model, window, passes
        self.eviction, self.feedback, self.conv_state = eviction, feedback, conv_state
        self.tol, self.checkpoint, self.differentiable = tol, checkpoint, differentiable or checkpoint
        self.backend = backend
        self.graph_cache = GraphCache() if capture else None
        self.memory: LayerCache = self.adapter.memory()
        if not self.memory.recurrent:
            raise ValueError(f"model: got a {type(model).__name__}; expected one with layers that have a recurrence")
        if feedback == "replay" and not self.adapter.replays:
            raise ValueError(
                f"feedback: got 'replay' for a {type(model).__name__}; expected a SleepLM, whose blocks can repeat "
                "their recurrence alone"
            )
        self.position = self.batch = 0
        self.buffer = WindowBuffer()
        self.kept_mask: Tensor | None = None
        self.reports: list[SleepReport] = []
        self.keep_every, self.keep_last = keep_every, keep_last
        self.state_dtype = None if state_dtype == torch.float32 else state_dtype
        self.kept: dict[int, Kept] = {}
        self._keep_here()

    def __repr__(self) -> str:
        return (
            f"SleepSession({type(self.model).__name__}, window={self.window}, passes={self.passes}, "
            f"eviction={self.eviction!r}, feedback={self.feedback!r}): {self.position} tokens slept over, "
            f"{self.buffer.tokens} pending"
        )

    def __getattr__(self, name: str) -> Any:
        if name not in _RENAMED:
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
        new = _RENAMED[name]
        warnings.warn(f"SleepSession.{name} is SleepSession.{new}", DeprecationWarning, stacklevel=2)
        return getattr(self, new)

    @property
    def pending(self) -> Tensor | None:
        """Tokens [B,tokens] that were ingested and whose window is not full; None without any."""
        return self.buffer.ids

    @property
    def vocabulary(self) -> int | None:
        """The number of tokens that the model can embed; None where the adapter does not say."""
        return getattr(self.adapter, "vocabulary", None)

    def ingest(self, ids: Any, attention_mask: Tensor | None = None) -> SleepSession:
        """Read tokens of any length: sleep over each full window, and keep the rest pending.

        If a window fails, the windows before it have been slept over, and that window and all later tokens are pending;
        if the first one fails, the session is as before. So `position` and `pending` always say how far the session is.

        Args:
            ids: integers [B,T], or a mapping with input_ids (and attention_mask), as tokenizers of transformers give.
            attention_mask: [B,T], 0 where a row is padded, on the left of its text, else 1.

        Raises:
            TypeError, ValueError: other ids or another mask, also tokens that the model does not know.
        """
        text = text_of(ids, attention_mask, self.vocabulary)
        self._check_rows(text.ids)
        ids, mask = self.buffer.followed_by(*text)
        with self._grad_mode():
            return self._sleep_over(ids, mask, ids.shape[1] // self.window * self.window)

    def sleep(self) -> SleepSession:
        """Sleep over the pending tokens, though they do not fill a window."""
        if self.buffer.ids is not None:
            with self._grad_mode():
                self._sleep_over(self.buffer.ids, self.buffer.mask, self.buffer.tokens)
        return self

    def read(self, ids: Any, attention_mask: Tensor | None = None) -> Tensor:
        """Logits [B,T,vocabulary] of tokens after all that was ingested, in one pass; the session does not change.

        A session of one row answers as many questions as ids has rows. Questions of one length run together without
        their padding, at which logits are 0.

        Args:
            ids: integers [B,T], or a mapping with input_ids (and attention_mask), as tokenizers of transformers give.
            attention_mask: [B,T], 0 where a row is padded, on the left of its text, else 1; a row needs a token.

        Raises:
            TypeError, ValueError: other ids or another mask, also tokens that the model does not know.
        """
        text = self._question(ids, attention_mask)
        out: Tensor | None = None
        with self._grad_mode():
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
        """ids [B,T] and the tokens that follow them after the ingested text, in one pass; the session does not change.

        One text can answer many questions, also in threads on forks of the session. A session of one row answers as
        many questions as ids has rows. Questions of one length run together, the shortest first, and answers are filled
        with pad_token_id up to the longest. Questions of several lengths allow no streamer and no
        return_dict_in_generate.

        Args:
            ids: integers [B,T], T at least 1, or a mapping with input_ids (and attention_mask).
            attention_mask: [B,T], 0 where a row is padded, on the left of its text, else 1.
            options: those of transformers' `generate`, beams too; they count and see ids alone, and the model's
                generation_config holds. SleepLM and CausalLMAdapter have max_new_tokens, max_length, min_new_tokens,
                min_length, eos_token_id, pad_token_id, do_sample, temperature, top_k, top_p and generation_config.

        Returns:
            Tokens [B,T + new]; with return_dict_in_generate transformers' own result, whose `sequences` they are.

        Raises:
            TypeError, ValueError: other ids or another mask, no token, or an option that a session cannot follow.
        """
        text = self._question(ids, attention_mask)
        if text.ids.shape[1] == 0:
            raise ValueError("ids: got no tokens; expected at least one, after which to go on")
        parts = by_length(text)
        single = [name for name in ("streamer", "return_dict_in_generate") if options.get(name)]
        if len(parts) > 1 and single:
            raise ValueError(f"options: got {', '.join(single)} for questions of several lengths; expected one length")
        answers = [self._for(part)._generate(part.ids, options) for part in parts]
        if parts[0].rows is None:
            return answers[0]
        pad = pad_token(getattr(self.adapter, "model", None), options)
        if isinstance(answers[0], Tensor):
            return merge_answers(text.ids, parts, answers, pad)
        answers[0].sequences = merge_answers(text.ids, parts, [answers[0].sequences], pad)
        return answers[0]

    def fork(self) -> SleepSession:
        """A session that goes on from here by itself. Both share the model; memory is copied when it changes."""
        return self._with_memory(copy_cache(self.adapter, self.memory))

    __copy__ = fork

    def __deepcopy__(self, memo: dict[int, Any]) -> SleepSession:
        raise TypeError("deepcopy: a session is copied by fork(), which shares the model; for another, load_state_dict")

    def state_dict(self) -> dict[str, Tensor]:
        """The session's memory and position as new tensors (for safetensors), without the model and the settings."""
        return saved(self)

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Go on from copies of a `state_dict` of a session with the same model and settings.

        The model runs over one token, to find the shapes of its states. Positions that were kept are dropped.

        Args:
            state: what `state_dict` of such a session returned: tensors by name, on any device.

        Raises:
            TypeError, ValueError: names, sizes, types or a position that this session cannot go on from; the session is
                then as it was.
        """
        example = next(iter(self._parameters()), torch.empty(0))
        found = restored(self, state, example.device)
        self.memory, self.position, self.batch, self.buffer, self.kept_mask = found
        self.kept = {}
        self._keep_here()

    def _grad_mode(self) -> AbstractContextManager[Any]:
        """The mode of autograd in which the session reads."""
        return nullcontext() if self.differentiable else torch.no_grad()

    def _with_memory(self, memory: LayerCache) -> SleepSession:
        other = object.__new__(SleepSession)
        other.__dict__ |= self.__dict__
        other.reports, other.memory, other.kept = list(self.reports), memory, dict(self.kept)
        return other

    def _for(self, part: Questions) -> SleepSession:
        """A session with one row for each of these questions."""
        have, count = self._rows(), part.ids.shape[0]
        index = part.ids.new_zeros(count, dtype=torch.int64) if have == 1 and count > 1 else part.rows
        if have is None or index is None or (have == 1 and count == 1):
            return self
        other = self._with_memory(copy_cache(self.adapter, self.memory, index))
        other.batch, other.buffer = count, self.buffer.rows(index)
        other.kept_mask = None if self.kept_mask is None else self.kept_mask[index]
        return other

    def _read(self, ids: Tensor) -> Tensor:
        if ids.shape[1] == 0:  # any token gives the width of the vocabulary
            h, _ = self.adapter.open(ids.new_zeros(ids.shape[0], 1), 0, self.adapter.memory(), None)
            return self.adapter.logits(h)[:, :0]
        ids, mask = self.buffer.followed_by(ids)
        h, calls = self._open(ids, mask, copy_cache(self.adapter, self._widened()), self.position)
        for call in calls:
            h = call(h)
        return self.adapter.logits(h[:, self.buffer.tokens :])

    def _generate(self, ids: Tensor, options: dict[str, Any]) -> Any:
        full, mask = self.buffer.followed_by(ids)
        mask = self._mask_with_kept(full, torch.ones_like(full) if mask is None else mask)
        assert mask is not None
        return self.adapter.generate(full, mask, self.position, self._widened(), self.buffer.tokens, **options)

    def _sleep_over(self, ids: Tensor, mask: Tensor | None, end: int) -> SleepSession:
        """Sleep window by window up to token `end`; later tokens are pending."""
        self.batch = ids.shape[0]
        if end == 0:
            self.buffer = WindowBuffer(ids, mask)
        try:
            for start in range(0, end, self.window):
                self._sleep(ids, mask, slice(start, min(start + self.window, end)))
        finally:
            self.buffer = self.buffer.compact()
        return self

    def _sleep(self, ids: Tensor, mask: Tensor | None, part: slice) -> None:
        """Sleep over one window of ids; the tokens after it become pending."""
        began, window, padding = time.perf_counter(), ids[:, part], None if mask is None else mask[:, part]
        set_state_type(self.memory, None if self.state_dtype is None else torch.float32)
        try:
            if self.graph_cache is not None and self.graph_cache.why_not(self, window, padding) is None:
                changes = self.graph_cache.sleep(self, window)
            else:
                changes = self.pass_through(window, padding, self.position)
        finally:
            set_state_type(self.memory, self.state_dtype)
        first, self.position = self.position, self.position + window.shape[1]
        self.buffer = WindowBuffer(ids[:, part.stop :], None if mask is None else mask[:, part.stop :])
        self.reports.append(SleepReport(first, window.shape[1], changes, time.perf_counter() - began))
        del self.reports[:-REPORTS]
        self._keep(first)

    def _rows(self) -> int | None:
        """The rows of the batch; None before the first token."""
        return None if self.position == 0 and self.buffer.ids is None else self.batch

    def _check_rows(self, ids: Tensor, shared: bool = False) -> None:
        rows = self._rows()
        if rows not in (None, ids.shape[0]) and not (shared and rows == 1):
            raise ValueError(f"ids: got {ids.shape[0]} rows; expected {rows}, as before")

    def _question(self, ids: Any, attention_mask: Tensor | None) -> Text:
        text = text_of(ids, attention_mask, self.vocabulary)
        self._check_rows(text.ids, shared=True)
        return text
