"""Stacks of blocks, their passes written out, and what they remember."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from sleepkern.nn import HybridBlock, SleepLM
from sleepkern.sleep.blocks import Slept
from sleepkern.state import RecurrentState, State

OPTIONS = [("raw", "rewind", 1), ("raw", "carry", 3), ("reinject", "rewind", 2), ("reinject", "carry", 2)]
SIZES = {  # L, d, heads, batch, further arguments of the mixers
    "rule 110": (24, 256, 4, 3, {}),
    "depo": (75, 512, 8, 1, {}),
    "tiny": (5, 24, 2, 1, {"key_width": 7, "value_heads": 4, "value_width": 5, "convolution": 3}),
    "odd": (17, 40, 5, 7, {"negative": True, "convolution": 2}),
    "one token": (1, 8, 1, 2, {"decay_bias": 2.0}),
    "two chunks": (40, 36, 3, 5, {"value_width": 20, "convolution": 1}),
}


def model(d: int, heads: int, mixer: dict[str, Any], pattern: str = "AG", blocks: int = 3) -> SleepLM:
    """With norms that are not 1."""
    torch.manual_seed(d)
    made = SleepLM(8, d, heads, blocks, window=100, factor=3, pattern=pattern, mixer=mixer)
    for parameter in made.parameters():
        if parameter.ndim == 1:
            torch.nn.init.uniform_(parameter, 0.5, 1.5)
    return made


def by_hand(
    h: Tensor, blocks: Sequence[HybridBlock], states: Sequence[State], passes: int, feedback: str, conv_state: str
) -> Slept:
    """The loop written out."""
    start, now, changes = h, list(states), []
    for n in range(passes):
        began = []
        for block, old, new in zip(blocks, states, now, strict=True):
            if n == 0 or not block.recurrent:
                began.append(old)
            elif conv_state == "carry":
                began.append(new)
            else:
                assert isinstance(new, RecurrentState)
                began.append(
                    RecurrentState(
                        old.conv if isinstance(old, RecurrentState) else torch.zeros_like(new.conv), new.state
                    )
                )
        if n > 0 and feedback == "reinject":
            h = h / (h.square().mean(-1, keepdim=True) + torch.finfo(torch.float32).eps).sqrt() + start
        now = []
        for block, state in zip(blocks, began, strict=True):
            h, after = block(h, state)
            now.append(after)
        pairs = [(a, b) for a, b in zip(began, now, strict=True) if isinstance(b, RecurrentState)]
        step = sum((b.state - (0 if a is None else a[1])).square().sum() for a, b in pairs)
        changes.append((step / sum(b.state.square().sum() for _, b in pairs)).sqrt())
    return Slept(h, now, torch.stack(changes))


def before(blocks: Sequence[HybridBlock], h: Tensor, tokens: int = 7) -> list[State]:
    """What blocks remember after a few other tokens."""
    states: list[State] = []
    with torch.no_grad():
        x = torch.randn(h.shape[0], tokens, h.shape[2], dtype=h.dtype)
        for block in blocks:
            x, state = block(x)
            states.append(state)
    return states


def all_of(slept: Slept) -> list[Tensor]:
    return [slept.h, *(t for state in slept.states for t in state)]


def as_type(states: Sequence[State], dtype: torch.dtype) -> list[State]:
    return [s if s is None else type(s)(*(t.to(dtype) for t in s)) for s in states]
