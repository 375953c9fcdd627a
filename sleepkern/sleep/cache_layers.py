"""Layers of a cache of transformers that hold a fast weight beside keys and values."""

from __future__ import annotations

from typing import Any

from ..integrations.caches import too_old_error
from ..state import RecurrentState


def state_in(layer: Any) -> RecurrentState | None:
    """The state in a layer of a cache; None before the first token."""
    return RecurrentState(layer.conv_states[0], layer.recurrent_states[0]) if layer.has_previous_state[0] else None


def store_state(layer: Any, fast: RecurrentState | None) -> None:
    """Store a state in a layer of a cache, and leave the tensors of the old state as they are."""
    layer.conv_states[0], layer.recurrent_states[0] = (None, None) if fast is None else fast
    for flags in (layer.is_conv_states_initialized, layer.is_recurrent_states_initialized, layer.has_previous_state):
        flags[0] = fast is not None


def beside_attention(layer: Any = None) -> Any:
    """A layer of a cache for keys, values and a fast weight, with the content of `layer`.

    Raises:
        ValueError: `layer` keeps keys and values in another way, such as a sliding window.
        ImportError: caches of this version of transformers hold no fast weights.
    """
    try:
        from transformers.cache_utils import DynamicLayer, LinearAttentionAndFullAttentionLayer
    except ImportError as error:
        raise too_old_error() from error

    if isinstance(layer, LinearAttentionAndFullAttentionLayer):
        return layer
    if layer is not None and type(layer) is not DynamicLayer:
        raise ValueError(f"cache: got a layer {type(layer).__name__}; before it no mixer can stand")
    both = LinearAttentionAndFullAttentionLayer()
    vars(both).update({} if layer is None else vars(layer))
    return both


def layer_at(cache: Any, index: int) -> Any:
    """Layer `index` of a cache of transformers, replaced by one that can hold a fast weight."""
    layers: list[Any] = cache.layers
    while len(layers) <= index:  # a cache without a config grows with its use
        layers.append(cache.layer_class_to_replicate())
    layers[index] = beside_attention(layers[index])
    return layers[index]
