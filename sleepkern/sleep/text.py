"""Checks of the tokens and masks that a caller gives, and the questions of a batch grouped by length."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..nn.tokens import tokens_of


class Text(NamedTuple):
    """ids [B,T], and mask [B,T] with 0 for padding on the left; None where no token is padded."""

    ids: Tensor
    mask: Tensor | None


class Questions(NamedTuple):
    """The questions of a batch that have one length.

    rows  their indices in the batch, or None for all
    ids   [rows,T] tokens without padding
    """

    rows: Tensor | None
    ids: Tensor


def text_of(ids: Any, mask: Any, vocabulary: int | None) -> Text:
    """Check ids [B,T], or a mapping with input_ids and perhaps attention_mask, as tokenizers of transformers give it.

    Raises:
        TypeError, ValueError: ids are no tokens of this vocabulary, or the mask is none or pads behind text.
    """
    if isinstance(ids, Mapping):
        if "input_ids" not in ids:
            raise ValueError(f"ids: got a mapping with {', '.join(map(str, ids)) or 'nothing'}; expected input_ids")
        mask = ids.get("attention_mask") if mask is None else mask
        ids = ids["input_ids"]
    ids = tokens_of(ids, vocabulary)
    if ids.shape[0] == 0:
        raise ValueError(f"ids: got {list(ids.shape)}; expected at least one row")
    return Text(ids, None if mask is None else _mask_of(mask, ids))


def _mask_of(mask: Any, ids: Tensor) -> Tensor:
    if not isinstance(mask, Tensor):
        raise TypeError(f"attention_mask: got a {type(mask).__name__}; expected a tensor, 0 for padding, else 1")
    if mask.shape != ids.shape:
        raise ValueError(f"attention_mask: got {list(mask.shape)}; expected {list(ids.shape)}, as ids")
    if bool(((mask != 0) & (mask != 1)).any()):
        raise ValueError("attention_mask: got other values than 0 and 1; expected 0 for padding, else 1")
    if bool((mask[:, 1:] < mask[:, :-1]).any()):
        raise ValueError("attention_mask: got padding behind text; expected it on the left")
    return mask.to(ids.device, torch.int64)


def by_length(text: Text) -> list[Questions]:
    """The questions without their padding, the shortest first.

    Padding inside of a text would pass through the fast weights of the text.

    Raises:
        ValueError: a row has no token.
    """
    if text.mask is None:
        return [Questions(None, text.ids)]
    lengths = text.mask.sum(dim=1)
    found: list[int] = lengths.unique().tolist()
    if 0 in found:
        raise ValueError("attention_mask: got a row of padding only; expected a token in each")
    if found == [text.ids.shape[1]]:
        return [Questions(None, text.ids)]
    parts = ((lengths == length).nonzero().flatten() for length in found)
    return [Questions(rows, text.ids[rows, -length:]) for length, rows in zip(found, parts, strict=True)]


def merge_answers(ids: Tensor, parts: list[Questions], answers: list[Tensor], pad: int) -> Tensor:
    """ids [B,T] with their padding, and the new tokens of each row, filled with `pad` to the longest.

    answers: for each part its ids and the new tokens; a row that was answered several times has its answers side by
    side.
    """
    new = [answer[:, part.ids.shape[1] :] for part, answer in zip(parts, answers, strict=True)]
    times = new[0].shape[0] // parts[0].ids.shape[0]
    longest = max(part.shape[1] for part in new)
    out = torch.cat([ids, ids.new_full((ids.shape[0], longest), pad)], dim=1).repeat_interleave(times, dim=0)
    for part, answer in zip(parts, new, strict=True):
        rows = torch.arange(ids.shape[0], device=ids.device) if part.rows is None else part.rows
        side_by_side = (rows[:, None] * times + torch.arange(times, device=ids.device)).flatten()
        out[side_by_side, ids.shape[1] : ids.shape[1] + answer.shape[1]] = answer
    return out
