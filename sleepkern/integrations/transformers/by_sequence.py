"""Attention that picks tokens by their place in a row, computed for one packed sequence after the other.

The indexer of GLM-5-Next pools every few tokens from the row's first on, and scores all pools before a token. It heeds
neither offsets nor position_ids, and no mask tells it where a sequence starts. So each sequence has a call of its own.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from ..caches import cache_among
from ..patching import Target
from .packing import LENGTHS, NAMES, OFFSETS, joined

_CLASSES = ("Glm5NextTextAttention",)
_OF_TOKENS = ("hidden_states", "attention_mask", "prev_topk_indices")
"""Arguments [B,T,...]. Picked tokens are numbers within a sequence, in what one layer gives and the next takes."""
_OF_ROWS = {*NAMES, *OFFSETS, *LENGTHS, "position_ids"}


def targets(module: ModuleType) -> list[Target]:
    """The forwards of such attentions that a modeling file defines."""
    return [Target(vars(module)[name], "forward", forward) for name in _CLASSES if name in vars(module)]


def forward(original: Callable[..., Any]) -> Callable[..., Any]:
    """Stands for the forward of such an attention; its base model names packed sequences by cu_seq_lens_q alone."""
    order = list(inspect.signature(original).parameters)[1:]

    @functools.wraps(original)
    def each_alone(self: Any, *args: Any, **kwargs: Any) -> Any:
        given = {**dict(zip(order, args, strict=False)), **kwargs}
        offsets = given.get("cu_seq_lens_q")
        if not isinstance(offsets, Tensor) or torch.compiler.is_exporting() or cache_among(given.values()) is not None:
            return original(self, *args, **kwargs)
        rows, T = given["hidden_states"].shape[:2]
        lengths = _lengths(offsets, rows * T)
        of_tokens = [name for name in _OF_TOKENS if given.get(name) is not None]
        others = {name: x for name, x in given.items() if name not in _OF_ROWS and name not in of_tokens}
        pieces = zip(*(joined(given[name]).split(lengths, dim=1) for name in of_tokens), strict=True)
        outs = [original(self, **others, **dict(zip(of_tokens, piece, strict=True))) for piece in pieces]
        out, weights, picked = zip(*outs, strict=True)
        return _rows(out, rows, T), _in_blocks(weights, rows, T), _rows(picked, rows, T)

    return each_alone


def _lengths(offsets: Tensor, tokens: int) -> list[int]:
    """Of the sequences that are not empty; padding behind the last is one of its own."""
    lengths: list[int] = offsets.diff().tolist()
    return [n for n in (*lengths, tokens - sum(lengths)) if n]


def _rows(pieces: tuple[Tensor | None, ...], rows: int, T: int) -> Tensor | None:
    """Pieces [1,n,...] behind each other as [rows,T,...]."""
    found = [x for x in pieces if x is not None]
    return torch.cat(found, dim=1).view(rows, T, *found[0].shape[2:]) if found else None


def _in_blocks(pieces: tuple[Tensor | None, ...], rows: int, T: int) -> Tensor | None:
    """Weights [1,H,n,n] of each sequence as [rows,H,T,T], with 0 between sequences."""
    found = [x for x in pieces if x is not None]
    if not found:
        return None
    weights, start = found[0].new_zeros(rows, found[0].shape[1], T, T), 0
    for x in found:
        row, first = divmod(start, T)
        start += x.shape[-1]
        within = slice(first, first + x.shape[-1])
        weights[row, :, within, within] = x[0]
    return weights
