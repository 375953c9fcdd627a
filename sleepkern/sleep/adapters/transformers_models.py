"""The adapter of models of Hugging Face transformers, and their cache between windows."""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache

from ...integrations.caches import too_old_error

try:
    from transformers.cache_utils import DynamicLayer, LinearAttentionAndFullAttentionLayer, LinearAttentionLayer
except ImportError as _error:
    raise too_old_error() from _error

from ...state import KVState, RecurrentState
from ..cache_layers import beside_attention, state_in, store_state
from ..generation_options import merged_options, model_options
from ..inserted_mixer import inserted_in
from ..protocols import LayerCache, Pair, copy_cache
from .causal_lm import CausalLMAdapter, position_ids, with_submodules

_TUPLES = ("bamba", "falcon_h1")
"""Model types that expect tuples from their layers."""
_MAKES_NEW = ("torch_recurrent_gated_delta_rule", "recurrent_kimi_delta_attention")
"""Functions for one token that return a new state; those of Mamba-2 write into the old state."""
_KEPT = ("DynamicLayer", "DynamicSlidingWindowLayer", "LinearAttentionLayer", "LinearAttentionAndFullAttentionLayer")
"""Layers of a cache whose whole content a session keeps; a DummyLayer has no content."""


class _FastWeights(LinearAttentionLayer):
    """transformers' layer of a cache, which returns new tensors: autograd still needs the old ones."""

    def update_conv_state(
        self, conv_states: Tensor, state_idx: int = 0, conv_kernel_size: int | None = None, **unused: Any
    ) -> Tensor:
        width = conv_kernel_size or conv_states.shape[-1]
        past, rows = self.conv_states[state_idx], conv_states.transpose(1, 2)
        if past is None or not self.has_previous_state[state_idx]:
            past = conv_states.new_zeros((*conv_states.shape[:-1], max(0, width - conv_states.shape[-1])))
        # Channels stay contiguous, the layout that projections write and the next kernels read.
        full = torch.cat([past.transpose(1, 2), rows], dim=1).transpose(1, 2)
        self.conv_states[state_idx] = full[..., -width:]
        self.conv_kernel_size[state_idx] = width
        self.is_conv_states_initialized[state_idx] = self.has_previous_state[state_idx] = True
        return full

    def update_recurrent_state(self, recurrent_states: Tensor, state_idx: int = 0, **unused: Any) -> Tensor:
        self.recurrent_states[state_idx] = recurrent_states
        self.is_recurrent_states_initialized[state_idx] = True
        return recurrent_states


class _FastWeightsBesideAttention(_FastWeights, LinearAttentionAndFullAttentionLayer):  # type: ignore[misc, override]
    """The same for a block with a recurrence and attention."""


_OUT_OF_PLACE = {
    LinearAttentionLayer: _FastWeights,
    LinearAttentionAndFullAttentionLayer: _FastWeightsBesideAttention,
}


class TransformersCache:
    """A cache whose fast weights, keys and values can be taken out and put back, layer by layer."""

    recurrent: list[int]
    attention: list[int]

    def __init__(self, model: nn.Module, out_of_place: bool = True) -> None:
        """out_of_place=False keeps transformers' layers, which write in place: for answers, without gradients."""
        config: Any = model.config
        self.cache: Any = DynamicCache(config=config.get_text_config())
        layers: list[Any] = self.cache.layers
        _check_layers(model, layers)
        if out_of_place:
            self.cache.layers = [_OUT_OF_PLACE[type(x)]() if type(x) in _OUT_OF_PLACE else x for x in layers]
        base: Any = model.base_model
        inserted = inserted_in(base.layers)
        for i in inserted:
            self.cache.layers[i] = beside_attention(self.cache.layers[i])
        self.recurrent = [i for i, x in enumerate(self.cache.layers) if isinstance(x, LinearAttentionLayer)]
        self.attention = [i for i, x in enumerate(self.cache.layers) if isinstance(x, DynamicLayer)]
        self._replaced = set(self.recurrent) if out_of_place else set(inserted)
        others = (i for i in self.recurrent if i not in inserted)
        self._written = {i for i in others if not _makes_new_states(base.layers[i])}

    def fast(self) -> dict[int, RecurrentState]:
        layers = ((i, self.cache.layers[i]) for i in self.recurrent)
        return {i: self._protected(i, fast) for i, x in layers if (fast := state_in(x)) is not None}

    def set_fast(self, fast: dict[int, RecurrentState]) -> None:
        for i in self.recurrent:
            layer = self.cache.layers[i]
            if i in self._replaced:
                store_state(layer, self._protected(i, fast[i]) if i in fast else None)
            elif i in fast:  # new layers still; copied into their buffers
                layer.update_conv_state(fast[i].conv, conv_kernel_size=fast[i].conv.shape[-1])
                layer.update_recurrent_state(fast[i].state)

    def _protected(self, i: int, fast: RecurrentState) -> RecurrentState:
        """Copies of the tensors into which a step of one token writes: the convolution's inputs, in some layers S."""
        return RecurrentState(fast.conv.clone(), fast.state.clone() if i in self._written else fast.state)

    def tokens(self) -> int:
        """How many tokens the first attention layer has read since the last eviction."""
        return int(self.cache.layers[self.attention[0]].get_seq_length())

    def slow(self) -> dict[int, KVState]:
        layers = ((i, self.cache.layers[i]) for i in self.attention)
        return {i: KVState(x.keys, x.values) for i, x in layers if x.get_seq_length() > 0}

    def set_slow(self, slow: dict[int, KVState]) -> None:
        for i in self.attention:
            layer = self.cache.layers[i]
            DynamicLayer.reset(layer)
            if i in slow:
                layer.update(*slow[i])


def _check_layers(model: nn.Module, layers: list[Any]) -> None:
    """Refuse layers of a cache that keep more than a session carries from window to window.

    Raises:
        ValueError: the names of these layers.
    """
    more = {type(x).__name__ for x in layers if type(x).__name__ not in (*_KEPT, "DummyLayer")}
    more |= {f"{type(x).__name__} of {n} states" for x in layers if (n := getattr(x, "number_of_states", 1)) != 1}
    if more:
        raise ValueError(
            f"model: got a {type(model).__name__} whose cache has layers {', '.join(sorted(more))}; expected keys and "
            "values, and one fast weight a layer"
        )


def _makes_new_states(block: nn.Module) -> bool:
    """Tells whether the mixers of a block return a new state each time; unknown mixers may write into the old state."""
    files = (sys.modules.get(type(x).__module__) for x in block.modules())
    return any(hasattr(file, name) for file in files for name in _MAKES_NEW)


class TransformersAdapter(CausalLMAdapter):
    """The blocks of a causal language model of transformers."""

    tuples: bool

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model)
        if not hasattr(getattr(self.model, "config", None), "get_text_config"):
            raise ValueError(
                f"model: got a {type(model).__name__} without a config of transformers; expected a model of "
                "transformers, a SleepLM, or a ModelAdapter that says where this one's layers keep what they remember "
                "(docs/guides/adapt_your_model.md)"
            )
        self.tuples = self.model.config.model_type in _TUPLES

    def memory(self) -> TransformersCache:
        with self.locked():
            return TransformersCache(self.model)

    def logits(self, h: Tensor) -> Tensor:
        """Logits by the model's own forward, which may scale them or return another type."""
        with self.locked():
            finished = _FinishedBase(self.base, getattr(self.base, self.last), h)
            with with_submodules(self.model, {self.model.base_model_prefix: finished}) as model:
                out: Tensor = model(input_ids=torch.zeros(h.shape[:2], dtype=torch.int64, device=h.device)).logits
        return out

    @torch.no_grad()
    def generate(
        self, ids: Tensor, mask: Tensor, first: int, memory: LayerCache, pending: int, **options: Any
    ) -> Tensor:
        """Tokens by the model's own `generate`, which starts after the pending tokens."""
        options = model_options(self.model, options)
        merged = merged_options(self.model, options)
        rows = max(int(merged.get(name, 1)) for name in ("num_beams", "num_return_sequences"))
        with self.locked():
            self.check_mode()
            memory = self._read_on(ids[:, :pending], mask, first, memory) if pending else memory
            answering = TransformersCache(self.model, out_of_place=False)
            answering.set_fast(_repeated(memory.fast(), rows))
            answering.set_slow(_repeated(memory.slow(), rows))
            kept = answering.tokens() if memory.attention else 0
            ids, before = ids[:, pending:], mask.shape[1] - (ids.shape[1] - pending)
            given = {self.cache_name: answering.cache, "attention_mask": mask}
            if memory.attention:  # a position for every key; `generate` takes those of the new tokens
                given["position_ids"] = position_ids(mask, first + pending - before)
            else:
                given["attention_mask"] = mask[:, before:]
            out: Tensor = self.model.generate(ids, **given, **options)
            if memory.attention and answering.tokens() <= kept:
                raise ValueError(
                    f"model: got a {type(self.model).__name__} whose generate takes {self.cache_name} and does not go "
                    "on in it; expected answers to come after what was ingested"
                )
        return out

    def _read_on(self, ids: Tensor, mask: Tensor, first: int, memory: LayerCache) -> LayerCache:
        """The cache after these tokens [B,T]; mask [B, kept keys + T or more]."""
        after = copy_cache(self, memory)
        kept = next((slow.keys.shape[-2] for slow in memory.slow().values()), 0)
        mask = mask[:, : kept + ids.shape[1]]
        h, calls = self.open(ids, first, after, None if bool(mask.all()) else mask)
        for call in calls:
            h = call(h)
        return after


class _FinishedBase(nn.Module):
    """Takes the place of a base model whose last block has returned h."""

    def __init__(self, base: nn.Module, norm: nn.Module, h: Tensor) -> None:
        super().__init__()
        object.__setattr__(self, "parts", (base, norm))  # hidden from torch, so that the parts are no submodules
        self.h = h

    def __getattr__(self, name: str) -> Any:
        return getattr(self.parts[0], name)

    def forward(self, *arguments: Any, **options: Any) -> Any:
        return _Output((self.parts[1](self.h),))


class _Output(tuple[Tensor]):
    """An output of a base model that holds h; every other attribute is None."""

    @property
    def last_hidden_state(self) -> Tensor:
        return self[0]

    def __getattr__(self, name: str) -> None:
        return None


def _repeated(kept: dict[int, Pair], rows: int) -> dict[int, Pair]:
    """Each row `rows` times, side by side, as `generate` repeats the rows of ids."""
    if rows == 1:
        return kept
    return {i: type(pair)(*(t.repeat_interleave(rows, dim=0) for t in pair)) for i, pair in kept.items()}
