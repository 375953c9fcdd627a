"""Models of Hugging Face transformers, block by block, and the memory they keep between windows.

A model's own forward knows embeddings, masks and rotary angles; it is called once a window with recorders in the place
of its layers, which note how each would have been called. Then the layers run, as often as wanted.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer, LinearAttentionLayer

from .memory import Fast, Memory, Slow


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


class TransformersMemory:
    """A cache whose fast weights and attention can be taken out and put back, layer by layer."""

    def __init__(self, model: nn.Module, own: bool = True) -> None:
        """own False keeps transformers' layers, which write in place: for answers, without gradients."""
        config: Any = model.config
        self.cache: Any = DynamicCache(config=config.get_text_config())
        layers: list[Any] = self.cache.layers
        if own:
            self.cache.layers = [_FastWeights() if type(x) is LinearAttentionLayer else x for x in layers]
        self.recurrent = [i for i, x in enumerate(self.cache.layers) if isinstance(x, LinearAttentionLayer)]
        self.attention = [i for i, x in enumerate(self.cache.layers) if isinstance(x, DynamicLayer)]

    def fast(self) -> dict[int, Fast]:
        layers = ((i, self.cache.layers[i]) for i in self.recurrent)
        return {i: Fast(x.conv_states[0], x.recurrent_states[0]) for i, x in layers if x.has_previous_state[0]}

    def set_fast(self, fast: dict[int, Fast]) -> None:
        for i in self.recurrent:
            layer = self.cache.layers[i] = type(self.cache.layers[i])()
            if i in fast:
                layer.update_conv_state(fast[i].conv, conv_kernel_size=fast[i].conv.shape[-1])
                layer.update_recurrent_state(fast[i].state)

    def slow(self) -> dict[int, Slow]:
        layers = ((i, self.cache.layers[i]) for i in self.attention)
        return {i: Slow(x.keys, x.values) for i, x in layers if x.get_seq_length() > 0}

    def set_slow(self, slow: dict[int, Slow]) -> None:
        for i in self.attention:
            layer = self.cache.layers[i]
            DynamicLayer.reset(layer)
            if i in slow:
                layer.update(*slow[i])


class Call(NamedTuple):
    """A block and what its model would have called it with."""

    block: nn.Module
    arguments: tuple[Any, ...]
    options: dict[str, Any]

    def __call__(self, h: Tensor) -> Tensor:
        out = self.block(h, *self.arguments, **self.options)
        return out[0] if isinstance(out, tuple) else out  # type: ignore[no-any-return]


class TransformersStack:
    """The blocks of a causal language model."""

    replays = False

    def __init__(self, model: nn.Module) -> None:
        """
        Raises:
            ValueError: the model has not the parts that are needed: a base model with layers and norm, and lm_head.
        """
        self.model: Any = model
        self.base: Any = getattr(model, getattr(model, "base_model_prefix", ""), None)
        parts = ((self.base, "layers"), (self.base, "norm"), (self.model, "lm_head"))
        missing = [name for holder, name in parts if not isinstance(getattr(holder, name, None), nn.Module)]
        if missing:
            raise ValueError(
                f"model: got a {type(model).__name__} without {', '.join(missing)}; expected a causal language model "
                "of transformers, a base model with layers and norm, and lm_head"
            )

    def __len__(self) -> int:
        return len(self.base.layers)

    def memory(self) -> TransformersMemory:
        return TransformersMemory(self.model)

    def open(self, ids: Tensor, first: int, memory: Memory, mask: Tensor | None) -> tuple[Tensor, list[Any]]:
        assert isinstance(memory, TransformersMemory)
        calls: list[Any] = []
        with self._recorded(calls):
            h = self.base(
                input_ids=ids,
                attention_mask=mask,
                position_ids=_positions(ids, first),
                past_key_values=memory.cache,
                use_cache=True,
            )
        return h[0], calls

    def logits(self, h: Tensor) -> Tensor:
        return self.model.lm_head(self.base.norm(h))  # type: ignore[no-any-return]

    @torch.no_grad()
    def generate(self, ids: Tensor, mask: Tensor, first: int, memory: Memory, **options: Any) -> Tensor:
        """By the model's own `generate`, with its options."""
        answering = TransformersMemory(self.model, own=False)
        answering.set_fast(memory.fast())
        answering.set_slow(memory.slow())
        made: Tensor = self.model.generate(
            ids,
            attention_mask=mask,
            position_ids=_positions(ids, first),
            past_key_values=answering.cache,
            **options,
        )
        return made

    @contextmanager
    def _recorded(self, calls: list[Call]) -> Iterator[None]:
        blocks, norm = self.base.layers, self.base.norm
        try:
            self.base.layers = nn.ModuleList(_Recorder(block, calls) for block in blocks)
            self.base.norm = nn.Identity()
            yield
        finally:
            self.base.layers, self.base.norm = blocks, norm


def _positions(ids: Tensor, first: int) -> Tensor:
    return torch.arange(first, first + ids.shape[1], device=ids.device)[None].expand(ids.shape[0], -1)


class _Recorder(nn.Module):
    """Stands for a block, notes how it is called, and lets h through."""

    def __init__(self, block: nn.Module, calls: list[Call]) -> None:
        super().__init__()
        object.__setattr__(self, "block", block)  # not a submodule: nothing of it is to be seen or moved
        object.__setattr__(self, "calls", calls)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.block, name)

    def forward(self, h: Tensor, *arguments: Any, **options: Any) -> Tensor:
        self.calls.append(Call(self.block, arguments, options))
        return h
