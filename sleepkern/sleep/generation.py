"""Writing on after a memory, for stacks whose model has no `generate` that would do it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .generation_options import Asked, asked

Open = Callable[[Tensor, int, Tensor | None], tuple[Tensor, list[Any]]]
"""ids [B,T], how many tokens of this writing came before them, mask: what `Stack.open` gives."""


@torch.no_grad()
def written(
    opened: Open,
    logits: Callable[[Tensor], Tensor],
    ids: Tensor,
    mask: Tensor,
    waiting: int,
    model: Any,
    options: dict[str, Any],
) -> Tensor:
    """ids [B,T] but for the first `waiting`, and what follows, greedy or drawn.

    mask [B, kept keys + T] has 0 for padding. A row ends with eos_token_id; all end when each has, or after as many
    tokens as they may be.

    Raises:
        TypeError, ValueError: an option that is not among those of `options.asked`, or one out of range.
    """
    how = asked(model, options, ids.shape[1] - waiting)
    made, new, padding = ids, ids, None if bool(mask.all()) else mask
    ended = torch.zeros(ids.shape[0], 1, dtype=torch.bool, device=ids.device)
    ends = torch.tensor(how.eos, dtype=ids.dtype, device=ids.device)
    for count in range(how.most):
        h, blocks = opened(new, made.shape[1] - new.shape[1], padding)
        for block in blocks:
            h = block(h)
        new = _next(logits(h[:, -1:])[:, -1], how, count).to(ids.dtype)
        made = torch.cat([made, new.masked_fill(ended, how.pad)], dim=1)
        if how.eos:
            ended = ended | torch.isin(new, ends)
            if bool(ended.all()):
                break
        padding = None if padding is None else torch.cat([padding, torch.ones_like(new)], dim=1)
    return made[:, waiting:]


def _next(logits: Tensor, how: Asked, count: int) -> Tensor:
    """The token [B,1] after so many new ones, by logits [B,vocabulary]."""
    if count < how.least and how.eos:
        logits = logits.index_fill(-1, torch.tensor(how.eos, device=logits.device), -torch.inf)
    if not how.do_sample:
        return logits.argmax(-1, keepdim=True)
    logits = logits.float() / how.temperature
    if how.top_k is not None and how.top_k < logits.shape[-1]:
        logits = logits.masked_fill(logits < logits.topk(how.top_k).values[:, -1:], -torch.inf)
    if how.top_p < 1:
        largest, order = logits.sort(descending=True)
        before = largest.softmax(-1).cumsum(-1) - largest.softmax(-1)
        logits = logits.masked_fill((before >= how.top_p).gather(-1, order.argsort()), -torch.inf)
    return torch.multinomial(logits.softmax(-1), 1)
