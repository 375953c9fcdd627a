"""A config with fewer layers, which still has recurrence and attention where the number allows it."""

from __future__ import annotations

from typing import Any

from .wording import one_line

_LINEAR = ("linear_attention", "mamba", "mamba2", "hybrid")
_BY_LAYER = ("layer_types", "layers_block_type", "mlp_layer_types", "indexer_types")
"""Attributes of a config that have an entry for each layer."""
_INDICES = {"attn_layer_indices": 0, "hybrid_layer_ids": 0, "mlp_only_layers": 0, "ple_layer_ids": 1}
"""Attributes of a config that list layers by number, and the number of the first layer."""


def layer_types(config: Any) -> tuple[str, ...]:
    """The kind of each layer as a config of a text model names it; "" for each layer where it names none."""
    named = getattr(config, "layer_types", None) or getattr(config, "layers_block_type", None)
    return tuple(named or [""] * int(config.num_hidden_layers))


def with_layers(config: Any, layers: int) -> Any:
    """A copy of a text model's config with `layers` neighbouring layers.

    They are the first ones that hold a recurrence and attention; the first ones where there is no such choice.

    Raises:
        ValueError: `layers` is below 1 or above the number of layers, or the config's checks refuse it.
    """
    kinds = layer_types(config)
    if not 1 <= layers <= len(kinds):
        raise ValueError(f"layers: got {layers}; expected 1 to {len(kinds)}, the layers of the model")
    first = _first(kinds, layers)
    kept = range(first, first + layers)
    sizes = config.to_dict()
    for name in _BY_LAYER:
        if isinstance(sizes.get(name), list) and len(sizes[name]) == len(kinds):
            sizes[name] = [sizes[name][i] for i in kept]
    for name, start in _INDICES.items():
        if isinstance(sizes.get(name), list):
            sizes[name] = [i - first for i in sizes[name] if i - start in kept]
    if "nemotron" in str(sizes.get("model_type")):
        sizes = {name: x for name, x in sizes.items() if name not in ("num_hidden_layers", "hybrid_override_pattern")}
    else:
        sizes["num_hidden_layers"] = layers
    try:
        return type(config).from_dict(sizes)
    except Exception as error:  # a config's own checks raise whatever they like
        raise ValueError(f"layers: transformers takes no {layers} of this model: {one_line(error)}") from error


def _first(kinds: tuple[str, ...], layers: int) -> int:
    for first in range(len(kinds) - layers + 1):
        part = kinds[first : first + layers]
        attention = any(kind == "hybrid" or (kind and kind not in _LINEAR and "attention" in kind) for kind in part)
        if attention and any(kind in _LINEAR for kind in part):
            return first
    return 0
