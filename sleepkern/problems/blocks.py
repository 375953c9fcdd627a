"""A call of `sleep_blocks`: what it is called with, checked, and what a backend has to know of it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules import module as _module

from .. import transforms
from ..eager import dispatch_modes, forward_mode
from ..state import KVState, RecurrentState, State
from .layer_weights import Block, LayerWeights, layers_of, readable

MOST_PASSES = 2**31 - 1
KERNEL_TYPES = (torch.float32, torch.bfloat16, torch.float16)
"""The types of h for which there are kernels."""


class Slept(NamedTuple):
    """Result of `sleep_blocks`.

    h        [B,L,d] after the last pass
    states   what each block remembers: a RecurrentState of gated DeltaNet, a KVState of attention
    changes  [N] for each pass the norm of what it changed in the fast weights, relative to their norm after it
    """

    h: Tensor
    states: list[RecurrentState | KVState]
    changes: Tensor


class BlockProblem(NamedTuple):
    """One call of `sleep_blocks`; a backend is given it together with h, the blocks and their states.

    device, dtype  of h
    sizes          B, L, d of h; None where any h of this device and type is meant
    layers         what each block handed out, perhaps without its weights (backends/native/witness.py); none where
                   there is a refusal
    refusal        the sentence why nothing but the modules themselves can run, None where kernels may
    passes         N
    reinject       feedback "reinject", else "raw"
    carry          conv_state "carry", else "rewind"
    """

    device: str
    dtype: torch.dtype
    sizes: tuple[int, ...] | None
    layers: tuple[LayerWeights, ...]
    refusal: str | None
    passes: int = 1
    reinject: bool = False
    carry: bool = False


def describe(
    h: Tensor,
    blocks: Sequence[Any],
    states: Sequence[State] = (),
    passes: int = 1,
    reinject: bool = False,
    carry: bool = False,
    known: Callable[[Sequence[Any], Tensor], tuple[LayerWeights, ...] | None] | None = None,
) -> BlockProblem:
    """Describe checked arguments. An h without 3 dimensions is an example of its device and type.

    known: what the blocks handed out before, where it is known that they would do so again; weights may be left out.

    Raises:
        TypeError, ValueError: sizes of h, blocks and states that do not fit each other, or memory that was freed.
    """
    device, sizes = h.device.type, tuple(h.shape) if h.ndim == 3 else None
    layers: tuple[LayerWeights, ...] = ()
    refusal = _why_only_modules(h)
    if refusal is None:
        found = (None if known is None else known(blocks, h)) or layers_of(blocks, h)
        refusal, layers = (found, ()) if isinstance(found, str) else (None, found)
    if layers and states:
        check_sizes(h, layers, states)
        if not all(readable(t) for state in states if state is not None for t in state):
            refusal, layers = "a state is not numbers at an address", ()
    return BlockProblem(device, h.dtype, sizes, layers, refusal, passes, reinject, carry)


def _why_only_modules(h: Tensor) -> str | None:
    """None where kernels may run in the place of modules on an h like this, as far as torch is concerned."""
    device = h.device.type
    if device not in ("cpu", "cuda") or h.dtype not in KERNEL_TYPES:
        return f"one call for {h.dtype} on {h.device} is not there, only for at most 32 bits on CPU and GPU"
    if torch.compiler.is_compiling() or torch.is_autocast_enabled(device) or dispatch_modes() > 0:
        return "a compiled graph, autocast or a dispatch mode wants to see the operators"
    if transforms.active() or forward_mode():
        return "a transform of torch.func or forward mode wants to see the operators"
    if _module._global_forward_hooks or _module._global_forward_pre_hooks:
        return "modules have hooks, which want to be called"
    if not readable(h):
        return f"h is a {type(h).__name__} that is not numbers at an address"
    return None


def check(
    h: Tensor,
    blocks: Iterable[Block],
    states: Iterable[State] | None,
    passes: int,
    feedback: str,
    conv_state: str,
) -> tuple[list[Any], list[State]]:
    """The blocks, and a state for each of them.

    Raises:
        TypeError: an argument of another type.
        ValueError: an argument out of range.
    """
    check_window(h)
    chosen = check_blocks(blocks)
    if type(passes) is not int:
        raise TypeError(f"passes: got {passes!r}; expected a whole number")
    if not 1 <= passes <= MOST_PASSES:
        raise ValueError(f"passes: got {passes}; expected at least 1 and at most {MOST_PASSES}")
    if feedback not in ("raw", "reinject"):
        raise ValueError(f"feedback: got {feedback!r}; expected 'raw' or 'reinject'")
    if conv_state not in ("rewind", "carry"):
        raise ValueError(f"conv_state: got {conv_state!r}; expected 'rewind' or 'carry'")
    return chosen, _states(states, chosen)


def check_sizes(h: Tensor, layers: Sequence[LayerWeights], states: Sequence[State]) -> None:
    """What native code takes on trust; modules would see it by themselves.

    Raises:
        ValueError: h or a state of another size, or on another device.
    """
    for i, (layer, state) in enumerate(zip(layers, states, strict=True)):
        if h.shape[2] != layer.width:
            raise ValueError(f"h: got a width of {h.shape[2]}; expected {layer.width}, that of block {i}")
        if state is None:
            continue
        tokens = state.keys.shape[-2] if isinstance(state, KVState) and state.keys.ndim > 1 else 0
        for name, t, size in zip(state._fields, state, layer.mixer.carried(h.shape[0], tokens), strict=True):
            if t.shape != size or t.device != h.device or not t.is_floating_point():
                raise ValueError(
                    f"states: got {name} {t.dtype} {list(t.shape)} on {t.device} for block {i}; expected floats "
                    f"{list(size)} on {h.device}"
                )


def check_window(h: Tensor) -> None:
    """
    Raises:
        TypeError: no tensor.
        ValueError: no dense floats [B,L,d].
    """
    if not isinstance(h, Tensor):
        raise TypeError(f"h: got a {type(h).__name__}; expected a tensor [B,L,d]")
    if h.ndim != 3 or not h.is_floating_point() or h.layout is not torch.strided or 0 in h.shape:
        raise ValueError(f"h: got {h.dtype} {list(h.shape)}; expected dense floats [B,L,d], none of them 0")


def check_blocks(blocks: Iterable[Block]) -> list[Any]:
    """The blocks.

    Raises:
        TypeError: no list, or something in it that does not say what it carries.
        ValueError: none.
    """
    if not isinstance(blocks, Iterable):
        raise TypeError(f"blocks: got a {type(blocks).__name__}; expected a list, such as SleepLM.blocks()")
    chosen = list(blocks)
    for i, block in enumerate(chosen):
        if not isinstance(block, nn.Module) or not isinstance(getattr(block, "recurrent", None), bool):
            raise TypeError(f"blocks: got a {type(block).__name__} at {i}; expected a HybridBlock of sleepkern.nn")
    if not chosen:
        raise ValueError("blocks: got none; expected at least one")
    return chosen


def _states(states: Iterable[State] | None, blocks: list[Any]) -> list[State]:
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
