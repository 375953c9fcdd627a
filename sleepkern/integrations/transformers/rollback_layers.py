"""Layers of a cache of transformers whose recurrent states can take tokens back, and be copied without copying.

transformers' own layers for linear attention crop the inputs of the convolution and leave the recurrent state as it is,
so its `generate` refuses drafts for such models. The layers here keep a `History` and make the state again.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import (
    DynamicLayer,
    LinearAttentionAndFullAttentionLayer,
    LinearAttentionLayer,
)

from . import recording
from .history import History, Snapshot

KEEP = 64
"""Tokens that can be taken back unless a cache says otherwise; transformers drafts 20 at a time by default."""


class _RollsBack:
    """What both kinds of layers add to those of transformers: they give tensors up instead of writing to them."""

    rolls_back = True
    is_compileable = False
    is_croppable = True
    history: History
    conv_states: dict[int, Tensor | None]
    recurrent_states: dict[int, Tensor | None]
    is_conv_states_initialized: dict[int, bool]
    is_recurrent_states_initialized: dict[int, bool]
    has_previous_state: dict[int, bool]

    def start(self, at: Snapshot, keep: int, every: int | None) -> None:
        """Go on from a snapshot, whose tensors others may hold too."""
        self.history = History(at, keep, every)
        self._shared = True
        self._convolved: tuple[Tensor | None, Tensor] | None = None
        self._carry(at)

    def _carry(self, at: Snapshot) -> None:
        self.conv_states[0], self.recurrent_states[0] = at.conv, at.state
        found = at.state is not None
        for flags in (
            self.is_conv_states_initialized, self.is_recurrent_states_initialized, self.has_previous_state,
        ):  # fmt: skip
            flags[0] = found

    def copied(self) -> Any:
        """A layer with the same content; tensors are shared until one of the two is written to."""
        other = copy.copy(self)
        for name, x in vars(self).items():
            if isinstance(x, dict):
                setattr(other, name, dict(x))
        other.history = self.history.copy()
        self._shared = other._shared = True
        return other

    def own(self) -> None:
        """Make the tensors this layer's, before a step writes to them."""
        for states in (self.conv_states, self.recurrent_states):
            x = states[0]
            if x is not None and (self._shared or (x.is_inference() and not torch.is_inference_mode_enabled())):
                states[0] = x.clone()
        self._shared = False

    def collect(self, record: recording.Record, x: Tensor | None, cuts: tuple[int, ...]) -> None:
        """Add a call to the history; x [B,D,1] are the inputs of a convolution that wrote its state in place."""
        before, given = self._convolved if x is None and self._convolved is not None else (None, x)
        if given is None or given.shape[-1] != record.inputs.tokens:
            raise _not_recorded("the short convolution")
        self._convolved = None
        after = self._now(self.history.end + record.inputs.tokens)
        self._shared = self._shared or self.history.marks(after.position)
        self.history.extend(record, before, given.detach(), after, cuts)

    def _now(self, position: int) -> Snapshot:
        conv, state = self.conv_states[0], self.recurrent_states[0]
        return Snapshot(position, *(None if t is None else t.detach() for t in (conv, state)))

    # -------------------------------------------------------------- what transformers calls

    def activate_past_recording(self) -> None:
        """Do nothing: these layers always record, and take the fast path of one token all the same."""

    def update_conv_state(
        self, conv_states: Tensor, state_idx: int = 0, conv_kernel_size: int | None = None, **_: Any
    ) -> Tensor:
        """The inputs [B,D,T] of a short convolution behind the last ones of the calls before."""
        if recording.current() is None:
            raise _not_recorded("the model")
        before = self.conv_states[0] if self.has_previous_state[0] else None
        width = conv_kernel_size or (conv_states.shape[-1] if before is None else before.shape[-1])
        full = conv_states if before is None else torch.cat([before, conv_states], dim=-1)
        columns = full[..., -width:]
        missing = width - columns.shape[-1]
        self.conv_states[0] = torch.nn.functional.pad(columns, (missing, 0)) if missing else columns.clone()
        self._convolved = before, conv_states
        self.is_conv_states_initialized[0] = self.has_previous_state[0] = True
        return full

    def update_recurrent_state(self, recurrent_states: Tensor, state_idx: int = 0, **_: Any) -> Tensor:
        """Hold a new state, and leave the old tensor as it is."""
        if recording.current() is None:
            raise _not_recorded("the model")
        self.recurrent_states[0], self._shared = recurrent_states, False
        self.is_recurrent_states_initialized[0] = True
        return recurrent_states

    def crop(self, tokens_to_remove: int) -> None:
        """Take the last -tokens_to_remove tokens back.

        Raises:
            ValueError: a number above 0, or more tokens than can be taken back.
        """
        if tokens_to_remove == 0:
            self.history.commit(self._now(self.history.end))
        else:
            self._carry(self.history.back(self.history.end + tokens_to_remove))
        self._shared = True
        self._attention("crop", tokens_to_remove)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Pick the rows of beams; no token can be taken back after that."""
        self._change_rows(lambda x: x.index_select(0, beam_idx.to(x.device)), "reorder_cache", beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat each row; no token can be taken back after that."""
        self._change_rows(lambda x: x.repeat_interleave(repeats, dim=0), "batch_repeat_interleave", repeats)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Pick rows; no token can be taken back after that."""
        self._change_rows(lambda x: x[indices], "batch_select_indices", indices)

    def reset(self) -> None:
        """Forget everything."""
        self._attention("reset")
        self.start(Snapshot(0), self.history.keep, self.history.every)

    def _change_rows(self, pick: Callable[[Tensor], Tensor], name: str, by: Any) -> None:
        position, *states = self._now(self.history.end)
        rows = Snapshot(position, *(None if x is None else pick(x) for x in states))
        self.start(rows, self.history.keep, self.history.every)
        self._attention(name, by)

    def _attention(self, name: str, *args: Any) -> None:
        """Call the method of the layer's keys and values, where it has some."""
        if isinstance(self, DynamicLayer):
            getattr(DynamicLayer, name)(self, *args)


class RollbackLayer(_RollsBack, LinearAttentionLayer):  # type: ignore[misc]
    """A layer of a cache for a recurrence and its short convolution."""


class RollbackHybridLayer(_RollsBack, LinearAttentionAndFullAttentionLayer):  # type: ignore[misc]
    """A layer of a cache for a recurrence beside attention, as in Falcon-H1."""


_KINDS = {LinearAttentionLayer: RollbackLayer, LinearAttentionAndFullAttentionLayer: RollbackHybridLayer}


def rolling(layer: Any, position: int, keep: int, every: int | None = None) -> Any:
    """The layer itself, or one that rolls back in place of a layer of transformers for a recurrence."""
    if hasattr(layer, "rolls_back") or not hasattr(layer, "recurrent_states"):
        return layer
    kind = _KINDS.get(type(layer))
    if kind is None or layer.number_of_states != 1:
        raise ValueError(
            f"past_key_values: got a layer {type(layer).__name__} of {layer.number_of_states} states; expected "
            f"{' or '.join(x.__name__ for x in _KINDS)} of one, which can be rolled back"
        )
    new: Any = kind()
    vars(new).update(vars(layer), record_past=False)
    conv, state = layer.conv_states[0], layer.recurrent_states[0]
    known = layer.has_previous_state[0]
    width = layer.conv_kernel_size[0]
    new.start(Snapshot(position, conv[..., -width:].clone(), state) if known else Snapshot(position), keep, every)
    return new


def recurrent_layers(cache: Any) -> list[Any]:
    """The layers of a cache that roll back."""
    return [x for x in cache.layers if hasattr(x, "rolls_back")]


@contextlib.contextmanager
def recording_into(cache: Any, tokens: int, first_position: int | None = None) -> Iterator[None]:
    """Record what a patched base model computes for so many tokens into the layers of its cache.

    Layers of transformers that were told to record the past, as `generate` does for drafts, become layers that can.

    Raises:
        ValueError: a layer that cannot, tokens that another model read, positions that start again behind others, or a
            call that went to an original function.
    """
    if any(getattr(x, "record_past", False) for x in cache.layers):
        cache.layers[:] = [rolling(x, _length(cache) or 0, KEEP) for x in cache.layers]
    layers = recurrent_layers(cache)
    if not layers:
        yield
        return
    ends = {x.history.end for x in layers}
    if len(ends) > 1 or _length(cache) not in (None, *ends):
        raise ValueError(
            f"past_key_values: got {_length(cache)} tokens in attention and {sorted(ends)} in recurrences; expected a "
            "cache that the same patched model filled"
        )
    if first_position == 0 and layers[0].history.end > 0:
        raise ValueError(
            f"past_key_values: got a cache of {layers[0].history.end} tokens and positions from 0; expected later ones "
            "(`generate` with drafts reads its whole prompt, so its cache has to be empty)"
        )
    recorder = recording.Recorder(layers[0].history.cuts(tokens))
    if tokens == 1:
        for layer in layers:
            layer.own()
    with recording.recorded_by(recorder):
        yield
    by_state = {id(record.held): record for record in recorder.records}
    by_conv = {id(state): x for state, x in recorder.convolved}
    for layer in layers:
        record = by_state.get(id(layer.recurrent_states[0]))
        if record is None:
            raise _not_recorded("a recurrence")
        layer.collect(record, by_conv.get(id(layer.conv_states[0])), recorder.cuts)


def _length(cache: Any) -> int | None:
    """The number of tokens in attention; None for a cache without attention."""
    return next((x.get_seq_length() for x in cache.layers if hasattr(x, "keys") and hasattr(x, "get_seq_length")), None)


def _not_recorded(what: str) -> ValueError:
    return ValueError(
        f"past_key_values: got a cache that rolls back, and {what} was computed by transformers' own code; expected a "
        "patched model whose calls sleepkern computes (the debug log says why not)"
    )
