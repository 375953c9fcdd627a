"""Tells whether blocks are as they were at an earlier call, so that what was read of them then is still true.

To read the weights of blocks and to check them (problems/layer_weights.py) takes most of the host's time in a call.
A `Witness` records all that this reads: the dictionaries of the modules, what their classes mean by the names that are
read, and of each weight what says whether it has the values that it had. C++ compares the record with the blocks in
some microseconds (csrc/bindings/witness.cpp). Nothing about a block is believed that is not compared at that call.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from torch.nn import Parameter

from ...problems.layer_weights import READ_OF_MODULES, LayerWeights, layers_of
from .module import _C
from .writes import counter, hold_weakly

_api = getattr(Tensor, "__dlpack_c_exchange_api__", None)
_usable = (
    _C is not None
    and _api is not None
    and bool(_C.use_exchange_api(_api))
    and bool(_C.use_tensor_attributes(Tensor, Parameter, torch.UntypedStorage))
)
_witnesses: WeakKeyDictionary[Any, dict[int, Witness]] = WeakKeyDictionary()
"""The last witness of each stack, by its first block and its number of blocks."""


class Witness:
    """A record of blocks whose weights were read and found to fit.

    layers   what the blocks handed out, with tensors of the device "meta" in the place of the weights, which it does
             not keep: sizes, types and numbers are those of the weights
    answers  what others conclude from these layers, by keys of their own; it may not hold a block or a weight
    """

    layers: tuple[LayerWeights, ...]
    answers: dict[Any, Any]

    def __init__(self, blocks: Sequence[Any], layers: Sequence[LayerWeights]) -> None:
        """
        Raises:
            TypeError, ValueError: the blocks are none that it can bear witness to.
        """
        names: set[str] = set()
        for block in blocks:
            read_by, read = READ_OF_MODULES.get(type(block), (None, frozenset()))
            if read_by is None or type(block).layer_weights is not read_by:
                raise ValueError(f"a {type(block).__name__} may read something else than its modules")
            names |= read
        weights = list({id(t): t for layer in layers for t in layer.tensors()}.values())
        modules = list(dict.fromkeys(m for block in blocks for m in block.modules()))
        self.answers = {}
        self._storages, self._device, self._type = hold_weakly(weights), weights[0].device, weights[0].dtype
        self._record = _C.ModuleWitness(list(blocks), modules, weights, [counter(t) for t in weights], sorted(names))
        with torch.inference_mode(False), torch.no_grad():
            self.layers = tuple(map(_described, layers))

    def holds(self, blocks: Sequence[Any]) -> bool:
        """Tells whether these are the blocks, unchanged."""
        return self._record.holds(blocks)

    def holds_on(self, blocks: Sequence[Any], h: Tensor) -> bool:
        """Tells whether these are the blocks, unchanged, and their weights have the device and the type of h."""
        return h.dtype is self._type and h.device == self._device and self._record.holds(blocks)


def last_witness(blocks: Sequence[Any]) -> Witness | None:
    """The last witness of a stack that begins with this block and has as many; it may not hold for these."""
    found = _witnesses.get(blocks[0])
    return None if found is None else found.get(len(blocks))


def known_layers(blocks: Sequence[Any], h: Tensor) -> tuple[LayerWeights, ...] | None:
    """The `layers` of a witness that these blocks are as they were and fit h; None where there is no such witness."""
    witness = last_witness(blocks)
    return None if witness is None or not witness.holds_on(blocks, h) else witness.layers


def with_weights(blocks: Sequence[Any], layers: Sequence[LayerWeights]) -> Sequence[LayerWeights]:
    """The layers with weights in them, which `known_layers` leaves out.

    Raises:
        RuntimeError: another thread changed the blocks.
    """
    if not layers[0].mixer_norm.is_meta:
        return layers
    found = layers_of(blocks)
    if isinstance(found, str) or [x.numbers() for x in found] != [x.numbers() for x in layers]:
        raise RuntimeError("blocks were changed by another thread during a call")
    return found


def witness_of(blocks: Sequence[Any], layers: Sequence[LayerWeights]) -> Witness | None:
    """A witness that these blocks hand out these layers; None for blocks that there is no witness of."""
    if not _usable:
        return None
    blocks = list(blocks)
    kept = _witnesses.setdefault(blocks[0], {})
    found = kept.get(len(blocks))
    if found is not None and found.holds(blocks):
        return found
    try:
        made = Witness(blocks, layers)
    except (TypeError, ValueError):
        kept.pop(len(blocks), None)
        return None
    # The layers were read before the record was made: only what was read again since is surely what it has.
    again = layers_of(blocks)
    if isinstance(again, str) or not _equal(again, layers) or not made.holds(blocks):
        return None
    kept[len(blocks)] = made
    return made


def _described(layer: LayerWeights) -> LayerWeights:
    return layer._replace(mixer=_without_numbers(layer.mixer), **_hollow_of(layer))


def _without_numbers(mixer: Any) -> Any:
    return mixer._replace(**_hollow_of(mixer))


def _hollow_of(fields: Any) -> dict[str, Any]:
    return {name: _hollow(x) for name, x in fields._asdict().items() if isinstance(x, Tensor)}


def _hollow(t: Tensor) -> Tensor:
    return torch.empty_like(t, device="meta", requires_grad=False)


def _equal(a: Sequence[LayerWeights], b: Sequence[LayerWeights]) -> bool:
    """Tells whether these are the same weights and numbers."""
    for one, other in zip(a, b, strict=True):
        if one.numbers() != other.numbers() or list(map(id, one.tensors())) != list(map(id, other.tensors())):
            return False
    return True
