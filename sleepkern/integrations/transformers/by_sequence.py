"""Attention that picks tokens by their index in a row, computed for one packed sequence after the other.

The indexer of GLM-5-Next pools every few tokens from the start of a row, and scores all pools before a token. The
indexer reads neither offsets nor position_ids, and no mask says where a sequence starts. So each sequence gets a call.
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
from .packing import LENGTHS, NAMES, OFFSETS, one_row

_CLASSES = ("Glm5NextTextAttention",)
_OF_TOKENS = ("hidden_states", "attention_mask", "prev_topk_indices")
"""Arguments [B,T,...]. Picked tokens are indices within a sequence."""
_OF_ROWS = {*NAMES, *OFFSETS, *LENGTHS, "position_ids"}


def targets(module: ModuleType) -> list[Target]:
    """The forwards of these attention classes in a modeling file."""
    return [Target(vars(module)[name], "forward", forward) for name in _CLASSES if name in vars(module)]


def forward(original: Callable[..., Any]) -> Callable[..., Any]:
    """The replacement of the forward of such an attention; its base model passes cu_seq_lens_q."""
    order = list(inspect.signature(original).parameters)[1:]

    @functools.wraps(original)
    def forward_by_sequence(self: Any, *args: Any, **kwargs: Any) -> Any:
        given = {**dict(zip(order, args, strict=False)), **kwargs}
        offsets = given.get("cu_seq_lens_q")
        if not isinstance(offsets, Tensor) or torch.compiler.is_exporting() or cache_among(given.values()) is not None:
            return original(self, *args, **kwargs)
        rows, T = given["hidden_states"].shape[:2]
        lengths = _lengths(offsets, rows * T)
        of_tokens = [name for name in _OF_TOKENS if given.get(name) is not None]
        others = {name: x for name, x in given.items() if name not in _OF_ROWS and name not in of_tokens}
        pieces = zip(*(one_row(given[name]).split(lengths, dim=1) for name in of_tokens), strict=True)
        outs = [original(self, **others, **dict(zip(of_tokens, piece, strict=True))) for piece in pieces]
        out, weights, picked = zip(*outs, strict=True)
        return _rows(out, rows, T), _in_blocks(weights, rows, T), _rows(picked, rows, T)

    return forward_by_sequence


def _lengths(offsets: Tensor, tokens: int) -> list[int]:
    """The lengths of the sequences that are not empty; padding after the last one counts as a sequence."""
    lengths: list[int] = offsets.diff().tolist()
    return [n for n in (*lengths, tokens - sum(lengths)) if n]


def _rows(pieces: tuple[Tensor | None, ...], rows: int, T: int) -> Tensor | None:
    """Pieces [1,n,...], one after the other, as [rows,T,...]."""
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
