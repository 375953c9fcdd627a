"""A gated DeltaNet mixer that a hook runs before a block of a model of transformers."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterable
from typing import Any, cast

import torch
from torch import Tensor, nn

from ..eager import assert_async
from ..integrations.caches import NAMES, cache_among, cache_of_block
from ..nn import GatedDeltaNet
from ..nn.padding import without_padding
from ..state import RecurrentState
from .cache_layers import layer_at, state_in, store_state


class InsertedMixer(nn.Module):
    """h <- h + mixer(norm h) with a sleepkern.nn.GatedDeltaNet; the identity at first, as its last projection is 0.

    Args:
        index: index of the block after the mixer.
        width: d of the residual stream.
        heads: heads of the mixer.
        mixer: further arguments of GatedDeltaNet.
    """

    index: int
    norm: nn.RMSNorm
    mixer: GatedDeltaNet

    def __init__(self, index: int, width: int, heads: int, **mixer: Any) -> None:
        super().__init__()
        self.index = index
        self.norm = nn.RMSNorm(width)
        self.mixer = GatedDeltaNet(width, heads, **mixer)
        nn.init.zeros_(self.mixer.out.weight)

    def forward(
        self, h: Tensor, before: RecurrentState | None = None, mask: Tensor | None = None
    ) -> tuple[Tensor, RecurrentState]:
        """h [B,T,d] and the state after it; before: the state before h; mask [B,T] has 0 for padding, which writes
        none.

        Padding may be anywhere in a row.
        """
        unpadded = h if mask is None else without_padding(h, mask)
        mixed, after = self.mixer(self.norm(unpadded), before, mask)
        return h + mixed, after

    def before_block(
        self, block: nn.Module, arguments: tuple[Any, ...], options: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The forward pre-hook of a block of transformers: it maps the block's h, with the fast weight in the cache."""
        h = arguments[0] if arguments else options["hidden_states"]
        cache, mask = cache_of_block(arguments, options), _padding_mask(options.get("attention_mask"), h.shape[1])
        layer = None if cache is None else layer_at(cache, self.index)
        h, after = self(h, None if layer is None else state_in(layer), mask)
        if layer is not None:
            store_state(layer, after)
        return ((h, *arguments[1:]), options) if arguments else (arguments, {**options, "hidden_states": h})


def insert(model: nn.Module, mixers: dict[int, dict[str, Any]]) -> None:
    """Insert an InsertedMixer with these options before each of these blocks: before all of them, or none."""
    blocks, config = blocks_of(model), cast(Any, model.config).get_text_config()
    inserted = {i: InsertedMixer(i, config.hidden_size, **options) for i, options in mixers.items()}
    if not inserted_in(blocks):
        cast(Any, model).base_model.register_forward_pre_hook(_refuse_packed, with_kwargs=True)
    for i, new in inserted.items():
        example = next(blocks[i].parameters())
        blocks[i].inserted = new.to(example.device, example.dtype).train(blocks[i].training)
        blocks[i].register_forward_pre_hook(new.before_block, with_kwargs=True)


def _refuse_packed(base: nn.Module, arguments: tuple[Any, ...], options: dict[str, Any]) -> None:
    """The forward pre-hook of a base model: it refuses packed sequences.

    The mixers would carry a fast weight from one packed sequence into the next.

    Raises:
        ValueError: a row has several sequences, by offsets, by sequence numbers, or by positions where attention goes
            by positions.
    """
    given = {**dict(zip(_order(type(base).forward), arguments, strict=False)), **options}
    text = given.get("inputs_embeds") if given.get("input_ids") is None else given["input_ids"]
    if not isinstance(text, Tensor) or text.is_meta or text.ndim < 2:
        return
    one: dict[str, Tensor] = {}
    for name in ("cu_seq_lens_q", "cu_seq_lens_k", "cu_seqlens"):
        if (offsets := given.get(name)) is not None and not isinstance(
            offsets, dict
        ):  # a dict belongs to paged attention
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
            assert_async(x, message)
        elif not x:
            raise ValueError(message)


@functools.lru_cache(maxsize=64)
def _order(forward: Callable[..., Any]) -> tuple[str, ...]:
    """The names of a forward's arguments after self, in order."""
    return tuple(inspect.signature(forward).parameters)[1:]


def blocks_of(model: nn.Module) -> nn.ModuleList:
    base: Any = getattr(model, getattr(model, "base_model_prefix", ""), None)
    blocks: Any = getattr(base, "layers", None)
    if not isinstance(blocks, nn.ModuleList):
        raise ValueError(f"model: got a {type(model).__name__} without layers; expected a model of transformers")
    return blocks


def inserted_in(blocks: Iterable[nn.Module]) -> dict[int, InsertedMixer]:
    """The inserted mixers by the index of their block."""
    found = {i: getattr(block, "inserted", None) for i, block in enumerate(blocks)}
    return {i: x for i, x in found.items() if isinstance(x, InsertedMixer)}


def _padding_mask(mask: Any, tokens: int) -> Tensor | None:
    """A mask [B,T] with 0 for padding, from the mask of an attention, in which padding does not see itself."""
    if mask is None or not isinstance(mask, torch.Tensor):
        return None
    if mask.ndim == 2:
        return mask[:, -tokens:]
    itself = mask[:, 0, :, -tokens:].diagonal(dim1=-2, dim2=-1)
    return itself.long() if itself.dtype == torch.bool else (itself == 0).long()
