"""Fast weights for a model that has none: gated DeltaNet mixers before blocks of an attention-only model."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, TypeVar

from torch import nn

from .inserted_mixer import InsertedMixer, blocks_of, insert, inserted_in
from .load_retrofitted import patch_saving

__all__ = ["InsertedMixer", "retrofit"]

Model = TypeVar("Model", bound=nn.Module)


def retrofit(model: Model, layers: int | Iterable[int], heads: int | None = None, **mixer: Any) -> Model:
    """Insert an InsertedMixer before each of these blocks; the model is changed in place and returned.

    Until the mixers are trained the model computes the same outputs as before. Without a session, the fast weights
    start from 0 with each text, and the model's cache carries them. The names in `state_dict` stay, and those of the
    mixers are added (model.layers.7.inserted.*); such a state belongs into a model with the same mixers.
    `load_retrofitted` loads what the model's `save_pretrained` saves; transformers itself refuses to load it.

    Args:
        model: an attention-only causal language model of transformers.
        layers: indices of blocks, or one index.
        heads: heads of the mixers, default those of the model's attention; a divisor of the model's width, unless
            key_width is given too.
        mixer: further arguments of sleepkern.nn.GatedDeltaNet, such as key_width and decay_bias.

    Raises:
        TypeError: layers are no whole numbers.
        ValueError: the model has no layers, an index is out of range, or a block has a mixer already.
    """
    blocks = blocks_of(model)
    chosen: Any = [layers] if isinstance(layers, int) else layers  # a bool is refused below
    chosen = [*chosen] if isinstance(chosen, Iterable) and not isinstance(chosen, str) else [None]
    if any(type(i) is not int for i in chosen):
        raise TypeError(f"layers: got {layers!r}; expected numbers of the {len(blocks)} blocks")
    named = sorted(set(chosen))
    wrong = [i for i in named if not 0 <= i < len(blocks)]
    if wrong or not named:
        raise ValueError(f"layers: got {wrong or 'none'}; expected numbers of the {len(blocks)} blocks")
    twice = [i for i in named if i in inserted_in(blocks)]
    if twice:
        raise ValueError(f"layers: got {twice}, which have mixers already")
    heads = model.config.get_text_config().num_attention_heads if heads is None else heads  # type: ignore[union-attr, operator]
    insert(model, dict.fromkeys(named, {"heads": heads, **mixer}))
    patch_saving(model)
    return model
