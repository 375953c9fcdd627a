"""A cache of transformers that can take tokens back, and be copied without copying."""

from __future__ import annotations

import copy
import weakref
from typing import Any, cast

from torch import Tensor, nn
from transformers.cache_utils import DynamicCache, DynamicLayer

from .families import patched
from .history import Snapshot
from .rollback_layers import KEEP, RollbackHybridLayer, RollbackLayer, recurrent_layers, rolling

_WHOLE = ("DynamicLayer", "DummyLayer", RollbackLayer.__name__, RollbackHybridLayer.__name__)
"""Kinds of layers that keep keys and values of all tokens, or none."""


class RollbackCache(DynamicCache):  # type: ignore[misc]
    """A cache for a patched hybrid model that can take its last tokens back.

    `crop(-n)` takes n tokens back, in keys and values, recurrent states and convolution states. `generate` with drafts
    (`assistant_model`, `prompt_lookup_num_tokens`) runs with it, and makes such layers by itself where no cache is
    given. One cache belongs to one thread at a time; nothing is kept for gradients.

    Args:
        model: a model of transformers that `patch` has replaced.
        keep: the number of last tokens that `crop` can take back at any time, at least 1; default 64. Inputs of up to
            twice as many tokens are kept, each 2 (K + V) numbers a value head in Qwen3-Next.
        every: for `sleepkern.sleep.PrefixCache`: the states after each multiple of so many tokens are kept.

    Raises:
        TypeError: an argument of another type.
        ValueError: a model that is not patched or has no recurrence, or a number out of range.
    """

    layers: list[Any]

    def __init__(self, model: nn.Module, keep: int = KEEP, every: int | None = None) -> None:
        if not isinstance(model, nn.Module) or not hasattr(model, "config"):
            raise TypeError(f"model: got a {type(model).__name__}; expected a model of transformers")
        for name, x in (("keep", keep), ("every", every)):
            if x is not None and (isinstance(x, bool) or not isinstance(x, int)):
                raise TypeError(f"{name}: got {x!r}; expected a whole number")
            if x is not None and x < 1:
                raise ValueError(f"{name}: got {x}; expected at least 1")
        name, config = type(model).__name__, cast(Any, model.config)
        if not patched(model):
            raise ValueError(f"model: got a {name} that is not patched; expected one after sleepkern.patch(model)")
        super().__init__(config=config)
        self.layers = [rolling(layer, 0, keep, every) for layer in self.layers]
        self.keep, self.every, self.model = keep, every, weakref.ref(model)
        if not recurrent_layers(self):
            raise ValueError(f"model: got a {name} without a recurrence; expected a hybrid model")

    def crop(self, tokens_to_remove: int) -> None:
        """Take the last -tokens_to_remove tokens back, in all layers or, on an error, in none.

        Raises:
            TypeError: no whole number.
            ValueError: a number above 0, or more tokens than can be taken back.
        """
        if isinstance(tokens_to_remove, bool) or not isinstance(tokens_to_remove, int):
            raise TypeError(f"tokens_to_remove: got {tokens_to_remove!r}; expected a whole number, 0 or less")
        recurrent_layers(self)[0].history.check(self.get_seq_length() + tokens_to_remove)
        super().crop(tokens_to_remove)

    def copy(self) -> RollbackCache:
        """A cache with the same content that goes on by itself.

        Tensors are shared: recurrent states until one of the two decodes a token, keys and values until then too, as
        they grow into new tensors. Copies may belong to different threads.
        """
        other = copy.copy(self)
        other.layers = [x.copied() if hasattr(x, "rolls_back") else copy.copy(x) for x in self.layers]
        return other

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """The number of tokens that were read."""
        if any(hasattr(x, "keys") for x in self.layers):
            return int(super().get_seq_length(layer_idx))
        return int(self.layers[0].history.end)

    def take_marks(self) -> dict[int, list[Snapshot]]:
        """What the recurrent layers carry after each multiple of `every`, by position; most of it is then forgotten."""
        found: dict[int, list[Snapshot]] = {}
        for layer in recurrent_layers(self):
            for mark in layer.history.take_marks():
                found.setdefault(mark.position, []).append(mark)
        return found

    def keys_values(self, first: int, end: int) -> list[tuple[Tensor, Tensor]]:
        """Copies of the keys and values [B,heads,tokens,width] of these tokens, for each layer that has attention."""
        layers = self.attention_layers()
        return [(x.keys[:, :, first:end].clone(), x.values[:, :, first:end].clone()) for x in layers]

    def carry(self, snapshots: list[Snapshot], keys_values: list[tuple[Tensor, Tensor]]) -> RollbackCache:
        """Fill this empty cache with what another one had after a mark; snapshots stay as they are. Returns itself."""
        for layer, at in zip(recurrent_layers(self), snapshots, strict=True):
            layer.start(at, self.keep, self.every)
        for layer, (keys, values) in zip(self.attention_layers(), keys_values, strict=True):
            DynamicLayer.lazy_initialization(layer, keys, values)
            layer.keys, layer.values = keys, values
        return self

    @property
    def rows(self) -> int:
        """The number of rows of the batch; 0 before the first token."""
        state = recurrent_layers(self)[0].recurrent_states[0]
        return 0 if state is None else int(state.shape[0])

    def attention_layers(self) -> list[Any]:
        """The layers that keep keys and values.

        Raises:
            ValueError: a layer that keeps something else than keys and values of all tokens.
        """
        other = next((x for x in self.layers if type(x).__name__ not in _WHOLE), None)
        if other is not None:
            raise ValueError(
                f"model: got a cache layer {type(other).__name__}; expected layers with keys and values of all tokens"
            )
        return [x for x in self.layers if isinstance(x, DynamicLayer)]
