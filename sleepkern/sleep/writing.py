"""Writing on after a memory, for stacks whose model has no `generate` that would do it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

Open = Callable[[Tensor, int, Tensor | None], tuple[Tensor, list[Any]]]
"""ids [B,T], how many tokens of this writing came before them, mask: what `Stack.open` gives."""


@torch.no_grad()
def written(
    opened: Open,
    logits: Callable[[Tensor], Tensor],
    ids: Tensor,
    mask: Tensor,
    max_new_tokens: int = 20,
    do_sample: bool = False,
    temperature: float = 1.0,
    **unknown: Any,
) -> Tensor:
    """ids [B,T] and what follows, greedy or drawn at a temperature; mask [B, kept keys + T] has 0 for padding.

    Raises:
        ValueError: another option, or a temperature of 0 or less.
    """
    if unknown:
        raise ValueError(f"options: got {', '.join(unknown)}; expected max_new_tokens, do_sample or temperature")
    if do_sample and not temperature > 0:
        raise ValueError(f"temperature: got {temperature}; expected above 0")
    made, new, padding = ids, ids, None if bool(mask.all()) else mask
    for _ in range(max_new_tokens):
        h, blocks = opened(new, made.shape[1] - new.shape[1], padding)
        for block in blocks:
            h = block(h)
        last = logits(h[:, -1:])[:, -1]
        drawn = torch.multinomial((last / temperature).softmax(-1), 1) if do_sample else None
        new = last.argmax(-1, keepdim=True) if drawn is None else drawn
        made = torch.cat([made, new], dim=1)
        padding = None if padding is None else torch.cat([padding, torch.ones_like(new)], dim=1)
    return made
