"""What is run of a model: a prefill, greedy steps through the cache, a sleep; and the bytes of a cache."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from ..integrations.caches import cache_in, cache_name
from ..integrations.transformers import patch

_RECURRENT = ("conv_states", "recurrent_states")
ALL = 0
"""The number of logits that stands for those of all tokens."""
_MOST_TOKENS = 32_000
"""Random tokens are below this number. Above it a vocabulary has the tokens that stand for images."""


def prompts(config: Any, batch: int, tokens: int, sets: int = 1, device: str = "cpu") -> list[Tensor]:
    """`sets` texts [batch,tokens] of random tokens, the same each time, for the config of a text model."""
    generator = torch.Generator().manual_seed(0)
    high = min(int(config.vocab_size), _MOST_TOKENS)
    return [torch.randint(min(1, high - 1), high, (batch, tokens), generator=generator).to(device) for _ in range(sets)]


@torch.no_grad()
def prefill(model: nn.Module, ids: Tensor, logits: int = 1) -> Any:
    """The output of a forward of ids [B,T] into an empty cache.

    It has the logits of the last `logits` tokens, or ALL; of all tokens too where the forward takes no choice.
    """
    keep = {"logits_to_keep": logits} if "logits_to_keep" in inspect.signature(model.forward).parameters else {}
    return model(input_ids=ids, use_cache=True, **keep)


@torch.no_grad()
def greedy(model: nn.Module, cache: Any, token: Tensor, steps: int) -> None:
    """`steps` tokens after token [B,1], each the likeliest, through the cache."""
    name = cache_name(model)
    for _ in range(steps):
        token = model(input_ids=token, **{name: cache}, use_cache=True).logits[:, -1:].argmax(-1)


def decoding(model: nn.Module, ids: Tensor, steps: int) -> Callable[[], None]:
    """A call that makes greedy steps after a prefill of ids [B,T].

    Each call starts from the keys of the prompt. Its fast weights are those that the call before has left.
    """
    cache, token = cache_in(prefill(model, ids)), ids[:, -1:]

    def decode() -> None:
        crop(cache, ids.shape[1])
        greedy(model, cache, token, steps)

    return decode


def crop(cache: Any, tokens: int) -> None:
    """Drop the keys and values after `tokens` where a layer keeps all of them; windows do not grow."""
    from transformers.cache_utils import DynamicLayer

    for layer in cache.layers:
        if isinstance(layer, DynamicLayer) and not getattr(layer, "is_sliding", False):
            more = layer.get_seq_length() - tokens
            if more > 0:
                _attention_crop(layer)(layer, -more)


def _attention_crop(layer: Any) -> Any:
    """The method that drops keys. The own method of a layer that also has fast weights refuses to."""
    from transformers.cache_utils import DynamicLayer

    return DynamicLayer.crop if hasattr(layer, "recurrent_states") else type(layer).crop


def patched(model: nn.Module, call: Callable[[], Any]) -> Callable[[], None]:
    """The same call with the model patched, while it runs."""

    def run() -> None:
        with patch(model):
            call()

    return run


def cache_bytes(cache: Any) -> tuple[int, int]:
    """Bytes of a cache: (keys and values with what indexes them, fast weights with inputs of convolutions)."""
    sizes = {True: 0, False: 0}
    for layer in cache.layers:
        for name, value in vars(layer).items():
            sizes[name in _RECURRENT] += sum(t.numel() * t.element_size() for t in _tensors(value))
    return sizes[False], sizes[True]


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict):
        yield from _tensors(list(value.values()))
    elif isinstance(value, (list, tuple)):
        for one in value:
            yield from _tensors(one)


def sleeping(model: nn.Module, ids: Tensor, passes: int) -> Callable[[], None]:
    """A new session that sleeps over one window, ids [B,T], with N passes; run it under the patch.

    Raises:
        TypeError, ValueError, ImportError: no session takes the model.
    """
    from ..sleep import SleepSession

    SleepSession(model, window=ids.shape[1], passes=passes)

    def sleep() -> None:
        SleepSession(model, window=ids.shape[1], passes=passes).ingest(ids)

    return sleep
