"""Tells whether tensors are still the ones that something was made of, known without keeping them alive.

An address does not say it: a new tensor may get that of one that is gone. A count of writes alone does not, for that of
a new parameter starts at 0, on the same memory too.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any
from weakref import ref

from torch import Tensor

from ...eager import is_traceable_wrapper_subclass
from ...problems.layer_weights import LayerWeights, layers_of
from .witness import Witness, with_weights, witness_of
from .writes import counter, hold_weakly


class Contents:
    """The addresses of ordinary tensors, and the writes to them that torch has counted.

    It counts no writes by way of `.data`, of numpy, or of another process.
    """

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        self._storages = hold_weakly(tensors)
        self._places = [_place(t) for t in tensors]
        self._writes = [t._version for t in tensors]
        self._counters = [counter(t) for t in tensors]

    def hold(self, tensors: Sequence[Tensor]) -> bool:
        """Tells whether these tensors lie there, and nobody has written to them since."""
        if [t._version for t in tensors] != self._writes or [c._version for c in self._counters] != self._writes:
            return False
        return [_place(t) for t in tensors] == self._places


class Source:
    """What weights were packed of: these blocks, with the weights and numbers they handed out. Keeps none of it."""

    def __init__(self, blocks: Sequence[Any], layers: Sequence[LayerWeights]) -> None:
        self._blocks = [ref(block) for block in blocks]
        self._numbers = [layer.numbers() for layer in layers]
        self._weights = Contents([weight for layer in layers for weight in layer.tensors()])
        self._witness: Witness | None = None

    def holds(self, blocks: Sequence[Any], layers: Sequence[LayerWeights]) -> bool:
        """Tells whether these are the blocks with the weights and numbers they had, as far as torch counts writes.

        layers: what the blocks handed out, or what a witness knows of it, which is enough where it is the source's own.
        """
        if self._witness is not None and self._witness.layers is layers:
            return True
        layers = with_weights(blocks, layers)
        if len(blocks) != len(self._blocks) or any(r() is not b for r, b in zip(self._blocks, blocks, strict=True)):
            return False
        weights = [weight for layer in layers for weight in layer.tensors()]
        if not self._weights.hold(weights) or [layer.numbers() for layer in layers] != self._numbers:
            return False
        witness = witness_of(blocks, layers)
        # Writes by another thread since the first look are in the witness's record; a count never falls.
        if witness is not None and self._weights.hold(weights):
            self._witness = witness
        return True

    def current(self) -> bool:
        """Tells whether the blocks are still there, with the weights and numbers they had."""
        blocks = [block for r in self._blocks if (block := r()) is not None]
        if self._witness is not None and self._witness.holds(blocks):
            return True
        layers = layers_of(blocks)
        return not isinstance(layers, str) and self.holds(blocks, layers)


class Places:
    """The addresses of any tensors: whose memory they view, and how. The values may change."""

    def __init__(self, tensors: Iterable[Tensor]) -> None:
        inner = list(_inner(tensors))
        self._storages = hold_weakly(inner)
        self._places = [_place(t) for t in inner]

    def hold(self, tensors: Iterable[Tensor]) -> bool:
        """Tells whether these tensors lie there."""
        return [_place(t) for t in _inner(tensors)] == self._places


def _place(t: Tensor) -> tuple[Any, ...]:
    return (id(t), t.untyped_storage()._cdata, t.data_ptr(), t.shape, t.stride(), t.dtype)


def _inner(tensors: Iterable[Tensor]) -> Iterator[Tensor]:
    """Those that have memory of their own."""
    for t in tensors:
        if is_traceable_wrapper_subclass(t):
            yield from _inner(getattr(t, name) for name in t.__tensor_flatten__()[0])
        else:
            yield t
