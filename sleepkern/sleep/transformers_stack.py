"""Models of Hugging Face transformers, block by block, and the memory they keep between windows."""

from __future__ import annotations

import sys
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from transformers import DynamicCache

from .caches import too_old

try:
    from transformers.cache_utils import DynamicLayer, LinearAttentionAndFullAttentionLayer, LinearAttentionLayer
except ImportError as error:
    raise too_old() from error

from .inserted import beside_attention, fast_of, inserted_in, put_fast
from .memory import Fast, Memory, Slow
from .recorded import RecordedStack, positions

Pair = TypeVar("Pair", Fast, Slow)

_TUPLES = ("bamba", "falcon_h1")
"""Models that expect tuples from their layers."""
_MAKES_NEW = ("torch_recurrent_gated_delta_rule", "recurrent_kimi_delta_attention")
"""What the files of mixers call for a token that make a new state; Mamba-2's write into the one they have."""
_KEPT = ("DynamicLayer", "DynamicSlidingWindowLayer", "LinearAttentionLayer", "LinearAttentionAndFullAttentionLayer")
"""Layers of a cache of which a session keeps all there is; DummyLayer has nothing."""


class _FastWeights(LinearAttentionLayer):
    """transformers' layer of a cache, but new tensors instead of writes into old ones, which autograd still needs."""

    def update_conv_state(
        self, conv_states: Tensor, state_idx: int = 0, conv_kernel_size: int | None = None, **unused: Any
    ) -> Tensor:
        width = conv_kernel_size or conv_states.shape[-1]
        past, rows = self.conv_states[state_idx], conv_states.transpose(1, 2)
        if past is None or not self.has_previous_state[state_idx]:
            past = conv_states.new_zeros((*conv_states.shape[:-1], max(0, width - conv_states.shape[-1])))
        # Channels stay side by side, as projections leave them and the kernels after want them.
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
    """The same in a block that has both."""


_OWN = {
    LinearAttentionLayer: _FastWeights,
    LinearAttentionAndFullAttentionLayer: _FastWeightsBesideAttention,
}


class TransformersMemory:
    """A cache whose fast weights and attention can be taken out and put back, layer by layer."""

    def __init__(self, model: nn.Module, own: bool = True) -> None:
        """own False keeps transformers' layers, which write in place: for answers, without gradients."""
        config: Any = model.config
        self.cache: Any = DynamicCache(config=config.get_text_config())
        layers: list[Any] = self.cache.layers
        _check_layers(model, layers)
        if own:
            self.cache.layers = [_OWN[type(x)]() if type(x) in _OWN else x for x in layers]
        base: Any = model.base_model
        inserted = inserted_in(base.layers)
        for i in inserted:
            self.cache.layers[i] = beside_attention(self.cache.layers[i])
        self.recurrent = [i for i, x in enumerate(self.cache.layers) if isinstance(x, LinearAttentionLayer)]
        self.attention = [i for i, x in enumerate(self.cache.layers) if isinstance(x, DynamicLayer)]
        self._replaced = set(self.recurrent) if own else set(inserted)
        others = (i for i in self.recurrent if i not in inserted)
        self._written = {i for i in others if not _makes_new_states(base.layers[i])}

    def fast(self) -> dict[int, Fast]:
        layers = ((i, self.cache.layers[i]) for i in self.recurrent)
        return {i: self._apart(i, fast) for i, x in layers if (fast := fast_of(x)) is not None}

    def set_fast(self, fast: dict[int, Fast]) -> None:
        for i in self.recurrent:
            layer = self.cache.layers[i]
            if i in self._replaced:
                put_fast(layer, self._apart(i, fast[i]) if i in fast else None)
            elif i in fast:  # new layers still; copied into their buffers
                layer.update_conv_state(fast[i].conv, conv_kernel_size=fast[i].conv.shape[-1])
                layer.update_recurrent_state(fast[i].state)

    def _apart(self, i: int, fast: Fast) -> Fast:
        """A step of one token writes into the inputs of the convolution, and that of some layers into the state."""
        return Fast(fast.conv.clone(), fast.state.clone() if i in self._written else fast.state)

    def tokens(self) -> int:
        """How many the first attention layer has seen since the last eviction."""
        return int(self.cache.layers[self.attention[0]].get_seq_length())

    def slow(self) -> dict[int, Slow]:
        layers = ((i, self.cache.layers[i]) for i in self.attention)
        return {i: Slow(x.keys, x.values) for i, x in layers if x.get_seq_length() > 0}

    def set_slow(self, slow: dict[int, Slow]) -> None:
        for i in self.attention:
            layer = self.cache.layers[i]
            DynamicLayer.reset(layer)
            if i in slow:
                layer.update(*slow[i])


def _check_layers(model: nn.Module, layers: list[Any]) -> None:
    """
    Raises:
        ValueError: layers of a cache that keep more than a session carries from window to window.
    """
    more = {type(x).__name__ for x in layers if type(x).__name__ not in (*_KEPT, "DummyLayer")}
    more |= {f"{type(x).__name__} of {n} states" for x in layers if (n := getattr(x, "number_of_states", 1)) != 1}
    if more:
        raise ValueError(
            f"model: got a {type(model).__name__} whose cache has layers {', '.join(sorted(more))}; expected keys and "
            "values, and one fast weight a layer"
        )


def _makes_new_states(block: nn.Module) -> bool:
    """Whether the mixers of a block make a new state each time; what is not known may write into the old one."""
    files = (sys.modules.get(type(x).__module__) for x in block.modules())
    return any(hasattr(file, name) for file in files for name in _MAKES_NEW)


class TransformersStack(RecordedStack):
    """The blocks of a causal language model of transformers."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model)
        self.tuples = self.model.config.model_type in _TUPLES

    def memory(self) -> TransformersMemory:
        with self.alone():
            return TransformersMemory(self.model)

    @torch.no_grad()
    def generate(self, ids: Tensor, mask: Tensor, first: int, memory: Memory, **options: Any) -> Tensor:
        """By the model's own `generate`, with its options; Mamba-2 without attention as RecordedStack."""
        if not memory.attention:
            return super().generate(ids, mask, first, memory, **options)
        rows = _rows_of_one(self.model, options)
        with self.alone():
            self.check_mode()
            answering = TransformersMemory(self.model, own=False)
            answering.set_fast(_repeated(memory.fast(), rows))
            answering.set_slow(_repeated(memory.slow(), rows))
            before = answering.tokens()
            made: Tensor = self.model.generate(
                ids,
                attention_mask=mask,
                position_ids=positions(ids, first),
                **{self.cache_name: answering.cache},
                **options,
            )
            if answering.tokens() <= before:
                raise ValueError(
                    f"model: got a {type(self.model).__name__} whose generate takes {self.cache_name} and does not go "
                    "on in it; expected answers to come after what was ingested"
                )
        return made


def _rows_of_one(model: Any, options: dict[str, Any]) -> int:
    """How many rows `generate` makes of each, for its beams or for answers drawn side by side."""
    configs = options.get("generation_config"), model.generation_config

    def option(name: str) -> int:
        found = (options.get(name), *(getattr(config, name, None) for config in configs))
        return next((n for n in found if n is not None), 1)

    return max(option("num_beams"), option("num_return_sequences"))


def _repeated(kept: dict[int, Pair], rows: int) -> dict[int, Pair]:
    """Each row as often, side by side, as `generate` repeats those of ids."""
    if rows == 1:
        return kept
    return {i: type(pair)(*(t.repeat_interleave(rows, dim=0) for t in pair)) for i, pair in kept.items()}
