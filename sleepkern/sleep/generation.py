"""Autoregressive decoding from a cache, for adapters whose model has no `generate` of transformers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .generation_options import GenerationOptions, resolve_options

Open = Callable[[Tensor, int, Tensor | None], tuple[Tensor, list[Any]]]
"""Maps ids [B,T], the number of tokens of this call before them, and a mask: the results of `ModelAdapter.open`."""


@torch.no_grad()
def generate(
    open_at: Open,
    logits: Callable[[Tensor], Tensor],
    ids: Tensor,
    mask: Tensor,
    pending: int,
    model: Any,
    options: dict[str, Any],
) -> Tensor:
    """ids [B,T] without the first `pending`, and the tokens that follow them, greedy or sampled.

    A row ends with eos_token_id. Decoding ends when all rows have, or after the largest number of new tokens.

    Args:
        open_at: opens the blocks.
        logits: maps h [B,1,d] to [B,1,vocabulary].
        ids: tokens [B,T] to read first.
        mask: [B, kept keys + T] with 0 for padding.
        pending: how many of the tokens belong to the text before the question.
        model: the holder of a generation_config, where there is one.
        options: those of `resolve_options`.

    Raises:
        TypeError, ValueError: an unknown option, or one out of range.
    """
    how = resolve_options(model, options, ids.shape[1] - pending)
    out, new, padding = ids, ids, None if bool(mask.all()) else mask
    ended = torch.zeros(ids.shape[0], 1, dtype=torch.bool, device=ids.device)
    ends = torch.tensor(how.eos, dtype=ids.dtype, device=ids.device)
    for count in range(how.most):
        h, blocks = open_at(new, out.shape[1] - new.shape[1], padding)
        for block in blocks:
            h = block(h)
        new = _next(logits(h[:, -1:])[:, -1], how, count).to(ids.dtype)
        out = torch.cat([out, new.masked_fill(ended, how.pad)], dim=1)
        if how.eos:
            ended = ended | torch.isin(new, ends)
            if bool(ended.all()):
                break
        padding = None if padding is None else torch.cat([padding, torch.ones_like(new)], dim=1)
    return out[:, pending:]


def _next(logits: Tensor, how: GenerationOptions, count: int) -> Tensor:
    """The next token [B,1] from logits [B,vocabulary]; count: how many new tokens came before."""
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
