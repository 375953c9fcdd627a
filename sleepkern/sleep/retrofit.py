"""Fast weights for a model that has none: gated DeltaNet mixers put before blocks of an attention-only model."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterable
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, nn

from ..integrations.caches import NAMES, cache_among, cache_of_block, too_old
from ..nn import GatedDeltaNet
from ..nn.padding import without_padding
from ..state import RecurrentState

Model = TypeVar("Model", bound=nn.Module)


class InsertedMixer(nn.Module):
    """h <- h + mixer(norm h) with a sleepkern.nn.GatedDeltaNet; at first the identity, for its last projection is 0.

    Args:
        index: number of the block that it stands before.
        width: d of the residual stream.
        heads: of the mixer.
        mixer: further arguments of GatedDeltaNet.
    """

    def __init__(self, index: int, width: int, heads: int, **mixer: Any) -> None:
        super().__init__()
        self.index = index
        self.norm = nn.RMSNorm(width)
        self.mixer = GatedDeltaNet(width, heads, **mixer)
        nn.init.zeros_(self.mixer.out.weight)

    def forward(
        self, h: Tensor, before: RecurrentState | None = None, mask: Tensor | None = None
    ) -> tuple[Tensor, RecurrentState]:
        """h [B,T,d] after `before`; mask [B,T] has 0 for padding, which writes nothing, wherever it stands."""
        seen = h if mask is None else without_padding(h, mask)
        mixed, after = self.mixer(self.norm(seen), before, mask)
        return h + mixed, after

    def before_block(
        self, block: nn.Module, arguments: tuple[Any, ...], options: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Forward pre-hook of a block of transformers: the same on its h, with the fast weight in its cache."""
        h = arguments[0] if arguments else options["hidden_states"]
        cache, mask = cache_of_block(arguments, options), _without_padding(options.get("attention_mask"), h.shape[1])
        layer = None if cache is None else _layer_of(cache, self.index)
        h, after = self(h, None if layer is None else fast_of(layer), mask)
        if layer is not None:
            put_fast(layer, after)
        return ((h, *arguments[1:]), options) if arguments else (arguments, {**options, "hidden_states": h})


def retrofit(model: Model, layers: int | Iterable[int], heads: int | None = None, **mixer: Any) -> Model:
    """Put an InsertedMixer before each of the blocks named, in place.

    The model computes what it did before until it is trained: as before without a session, the fast weights starting
    from 0 with each text and carried by its cache. `state_dict` has the names that it had, and those of the mixers
    beside them (model.layers.7.inserted.*); load it into a model that was retrofitted alike. What its `save_pretrained`
    saves `load_retrofitted` loads, and transformers refuses.

    Args:
        model: an attention-only causal language model of transformers.
        layers: numbers of blocks, or one.
        heads: of the mixers, default those of the model's attention; a divisor of its width, or give key_width too.
        mixer: further arguments of sleepkern.nn.GatedDeltaNet, such as key_width and decay_bias.

    Raises:
        TypeError: layers that are no whole numbers.
        ValueError: a model without layers, a number out of range, or a block that has a mixer already.
    """
    from .load_retrofitted import keep_whole

    blocks = _blocks_of(model)
    chosen: Any = [layers] if isinstance(layers, int) else layers  # a bool then is no whole number
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
    keep_whole(model)
    return model


def insert(model: nn.Module, mixers: dict[int, dict[str, Any]]) -> None:
    """Put an InsertedMixer with these options before each of the blocks named: all of them, or none."""
    blocks, config = _blocks_of(model), cast(Any, model.config).get_text_config()
    made = {i: InsertedMixer(i, config.hidden_size, **options) for i, options in mixers.items()}
    if not inserted_in(blocks):
        cast(Any, model).base_model.register_forward_pre_hook(_refuse_packed, with_kwargs=True)
    for i, new in made.items():
        like = next(blocks[i].parameters())
        blocks[i].inserted = new.to(like.device, like.dtype).train(blocks[i].training)
        blocks[i].register_forward_pre_hook(new.before_block, with_kwargs=True)


def _refuse_packed(base: nn.Module, arguments: tuple[Any, ...], options: dict[str, Any]) -> None:
    """Forward pre-hook of a base model: its mixers would carry a fast weight from one packed sequence into the next.

    Raises:
        ValueError: several sequences in a row, by offsets, by numbers, or by positions where attention goes by these.
    """
    given = {**dict(zip(_order(type(base).forward), arguments, strict=False)), **options}
    text = given.get("inputs_embeds") if given.get("input_ids") is None else given["input_ids"]
    if not isinstance(text, Tensor) or text.is_meta or text.ndim < 2:
        return
    one: dict[str, Tensor] = {}
    for name in ("cu_seq_lens_q", "cu_seq_lens_k", "cu_seqlens"):
        if (offsets := given.get(name)) is not None and not isinstance(offsets, dict):  # a dict is paged attention's
            one[name] = (torch.as_tensor(offsets) % text.shape[1] == 0).all()
    if (numbers := given.get("seq_idx")) is not None:
        one["seq_idx"] = (torch.as_tensor(numbers).diff(dim=-1) == 0).all()
    alone = cache_among(given.values()) is None and all(given.get(x) is None for x in ("attention_mask", *NAMES))
    positions = given.get("position_ids")
    if alone and positions is not None and positions.ndim < 3 and positions.shape[-1] > 1:
        one["position_ids"] = (positions.diff(dim=-1) == 1).all()
    for name, x in one.items():
        message = (
            f"{name}: got several sequences in a row of a retrofitted model, whose mixers would mix them; expected one"
        )
        if torch.compiler.is_compiling():
            torch._assert_async(x, message)
        elif not x:
            raise ValueError(message)


@functools.lru_cache(maxsize=64)
def _order(forward: Callable[..., Any]) -> tuple[str, ...]:
    """Names of a forward's arguments by position after self."""
    return tuple(inspect.signature(forward).parameters)[1:]


def _blocks_of(model: nn.Module) -> nn.ModuleList:
    base: Any = getattr(model, getattr(model, "base_model_prefix", ""), None)
    blocks: Any = getattr(base, "layers", None)
    if not isinstance(blocks, nn.ModuleList):
        raise ValueError(f"model: got a {type(model).__name__} without layers; expected a model of transformers")
    return blocks


def inserted_in(blocks: Iterable[nn.Module]) -> dict[int, InsertedMixer]:
    """The mixers that were put before blocks, by number."""
    found = {i: getattr(block, "inserted", None) for i, block in enumerate(blocks)}
    return {i: x for i, x in found.items() if isinstance(x, InsertedMixer)}


def fast_of(layer: Any) -> RecurrentState | None:
    """What a mixer left in its layer of a cache."""
    return RecurrentState(layer.conv_states[0], layer.recurrent_states[0]) if layer.has_previous_state[0] else None


def put_fast(layer: Any, fast: RecurrentState | None) -> None:
    """Into a layer of a cache, as new tensors: those before may still be wanted."""
    layer.conv_states[0], layer.recurrent_states[0] = (None, None) if fast is None else fast
    for flags in (layer.is_conv_states_initialized, layer.is_recurrent_states_initialized, layer.has_previous_state):
        flags[0] = fast is not None


def beside_attention(layer: Any = None) -> Any:
    """A layer of a cache for keys and values, and for a fast weight beside them, with what `layer` has.

    Raises:
        ValueError: a layer that keeps keys and values in another way, such as a sliding window.
        ImportError: caches of this version of transformers hold no fast weights.
    """
    try:
        from transformers.cache_utils import DynamicLayer, LinearAttentionAndFullAttentionLayer
    except ImportError as error:
        raise too_old() from error

    if isinstance(layer, LinearAttentionAndFullAttentionLayer):
        return layer
    if layer is not None and type(layer) is not DynamicLayer:
        raise ValueError(f"cache: got a layer {type(layer).__name__}; before it no mixer can stand")
    both = LinearAttentionAndFullAttentionLayer()
    vars(both).update({} if layer is None else vars(layer))
    return both


def _layer_of(cache: Any, index: int) -> Any:
    """That layer of a cache of transformers, made to hold a fast weight."""
    layers: list[Any] = cache.layers
    while len(layers) <= index:  # a cache that was made without a config grows as it is used
        layers.append(cache.layer_class_to_replicate())
    layers[index] = beside_attention(layers[index])
    return layers[index]


def _without_padding(mask: Any, tokens: int) -> Tensor | None:
    """[B,T] with 0 for padding, out of the mask of an attention: padding does not even see itself."""
    if mask is None or not isinstance(mask, torch.Tensor):
        return None
    if mask.ndim == 2:
        return mask[:, -tokens:]
    own = mask[:, 0, :, -tokens:].diagonal(dim1=-2, dim2=-1)
    return own.long() if own.dtype == torch.bool else (own == 0).long()
