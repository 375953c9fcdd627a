"""What `sleep_blocks` is called with, checked."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..state import KVState, RecurrentState, State

if TYPE_CHECKING:
    from ..nn import HybridBlock

MOST_PASSES = 2**31 - 1


def check(
    h: Tensor,
    blocks: Iterable[HybridBlock],
    states: Iterable[State] | None,
    passes: int,
    feedback: str,
    conv_state: str,
) -> tuple[list[HybridBlock], list[State]]:
    """The blocks, and a state for each of them.

    Raises:
        TypeError: an argument of another type.
        ValueError: an argument out of range.
    """
    if not isinstance(h, Tensor):
        raise TypeError(f"h: got a {type(h).__name__}; expected a tensor [B,L,d]")
    if h.ndim != 3 or not h.is_floating_point() or h.layout is not torch.strided or 0 in h.shape:
        raise ValueError(f"h: got {h.dtype} {list(h.shape)}; expected dense floats [B,L,d], none of them 0")
    chosen = _blocks(blocks)
    if type(passes) is not int:
        raise TypeError(f"passes: got {passes!r}; expected a whole number")
    if not 1 <= passes <= MOST_PASSES:
        raise ValueError(f"passes: got {passes}; expected at least 1 and at most {MOST_PASSES}")
    if feedback not in ("raw", "reinject"):
        raise ValueError(f"feedback: got {feedback!r}; expected 'raw' or 'reinject'")
    if conv_state not in ("rewind", "carry"):
        raise ValueError(f"conv_state: got {conv_state!r}; expected 'rewind' or 'carry'")
    return chosen, _states(states, chosen)


def check_sizes(h: Tensor, blocks: Sequence[HybridBlock], states: Sequence[State]) -> None:
    """What native code takes on trust; modules would see it by themselves."""
    for i, (block, state) in enumerate(zip(blocks, states, strict=True)):
        width = block.mixer_norm.weight.shape[0]
        if h.shape[2] != width:
            raise ValueError(f"h: got a width of {h.shape[2]}; expected {width}, that of block {i}")
        if state is None:
            continue
        for name, t, size in zip(state._fields, state, _sizes_of(block, h.shape[0], state), strict=True):
            if t.shape != size or t.device != h.device or not t.is_floating_point():
                raise ValueError(
                    f"states: got {name} {t.dtype} {list(t.shape)} on {t.device} for block {i}; expected floats "
                    f"{list(size)} on {h.device}"
                )


def _blocks(blocks: Iterable[HybridBlock]) -> list[HybridBlock]:
    if not isinstance(blocks, Iterable):
        raise TypeError(f"blocks: got a {type(blocks).__name__}; expected a list, such as SleepLM.blocks()")
    chosen = list(blocks)
    for i, block in enumerate(chosen):
        if not isinstance(block, nn.Module) or not isinstance(getattr(block, "recurrent", None), bool):
            raise TypeError(f"blocks: got a {type(block).__name__} at {i}; expected a HybridBlock of sleepkern.nn")
    if not chosen:
        raise ValueError("blocks: got none; expected at least one")
    return chosen


def _states(states: Iterable[State] | None, blocks: list[HybridBlock]) -> list[State]:
    if states is None:
        return [None] * len(blocks)
    if not isinstance(states, Iterable) or isinstance(states, Tensor | RecurrentState | KVState):
        raise TypeError(f"states: got a {type(states).__name__}; expected a list, a state or None for each block")
    given = list(states)
    if len(given) != len(blocks):
        raise ValueError(f"states: got {len(given)} for {len(blocks)} blocks; expected one each")
    for i, (block, state) in enumerate(zip(blocks, given, strict=True)):
        if state is not None and not isinstance(state, RecurrentState | KVState):
            raise TypeError(
                f"states: got a {type(state).__name__} for block {i}; expected RecurrentState, KVState or None"
            )
        if state is not None and isinstance(state, RecurrentState) != block.recurrent:
            raise ValueError(f"states: got {type(state).__name__} for block {i}; expected that of its mixer")
        wrong = [type(t).__name__ for t in state or () if not isinstance(t, Tensor)]
        if wrong:
            raise TypeError(f"states: got {wrong} in that of block {i}; expected tensors")
    return given


def _sizes_of(block: HybridBlock, B: int, state: RecurrentState | KVState) -> list[tuple[int, ...]]:
    """Shapes of what a block remembers of B sequences; keys and values may be of any number of tokens."""
    mixer: Any = block.mixer
    if isinstance(state, KVState):
        size = (B, mixer.heads, state.keys.shape[-2] if state.keys.ndim > 1 else 0, mixer.q_norm.weight.shape[0])
        return [size, size]
    channels, W = mixer.convolution.weight.shape
    return [(B, W - 1, channels), (B, mixer.value_heads, mixer.key_width, mixer.value_width)]
