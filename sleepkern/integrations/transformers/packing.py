"""Where packed sequences start and end, under every name that callers use.

A row may hold several sequences, one after the other. Models of transformers and its collators say where by
cu_seq_lens_q, fla by cu_seqlens (offsets [n + 1] of the sequences among all tokens of all rows), causal_conv1d and
mamba_ssm by seq_idx [B,T] (the number of each token's sequence). This module turns all of them into offsets.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

NAMES = ("cu_seqlens", "cu_seq_lens_q", "seq_idx")
OFFSETS = ("cu_seq_lens_q", "cu_seq_lens_k", "cu_seqlens")
LENGTHS = ("max_length_q", "max_length_k")
_FIRST = ("query", "hidden_states", "q", "x")
"""Names of the first argument of an original."""


class SegmentTree(NamedTuple):
    """Segments of one packed row that go on from each other, under the name cu_seq_lens_q.

    It takes the way of offsets through a model, and is no tensor, so that code which knows nothing of trees stops.

    offsets  [n + 1] of the segments
    parents  the segment before each one, -1 for none
    """

    offsets: Tensor
    parents: tuple[int, ...]

    @property
    def options(self) -> dict[str, Any]:
        """The arguments of a rule, or of the short convolution."""
        return {"cu_seqlens": self.offsets, "parents": self.parents}


def offsets_of(
    rows: int,
    T: int,
    cu_seqlens: Tensor | None = None,
    cu_seq_lens_q: Tensor | None = None,
    seq_idx: Tensor | None = None,
) -> Tensor | None:
    """Offsets [n + 1] among the rows * T tokens of all rows; None where no argument names sequences.

    Tokens of a row before those that seq_idx counts belong to its first sequence.
    """
    if cu_seqlens is not None or cu_seq_lens_q is not None:
        return cu_seq_lens_q if cu_seqlens is None else cu_seqlens
    if seq_idx is None:
        return None
    index = seq_idx.expand(rows, -1)
    index = torch.cat([index[:, :1].expand(-1, T - index.shape[1]), index], dim=1)
    starts = torch.ones(rows, T, dtype=torch.bool, device=index.device)
    starts[:, 1:] = index[:, 1:] != index[:, :-1]
    return torch.cat([starts.flatten().nonzero()[:, 0], torch.full((1,), rows * T, device=index.device)])


def sequence_indices(offsets: Tensor, rows: int, T: int) -> Tensor:
    """The index of each token's sequence [rows,T] in int32 (seq_idx)."""
    tokens = torch.arange(rows * T, device=offsets.device, dtype=offsets.dtype)
    return torch.searchsorted(offsets[1:].contiguous(), tokens, right=True, out_int32=True).view(rows, T)


def packed_by(name: str, size: Callable[[Tensor], tuple[int, int]]) -> Any:
    """A `to_original` (call_mapping.py) that names packed sequences by the one name that the original reads.

    An original that reads no name raises, as transformers' own functions do. Under another name the original would mix
    the sequences. size: returns rows and T of the first argument.
    """

    def to_original(args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
        given = {x: kwargs[x] for x in NAMES if kwargs.get(x) is not None}
        if not given:
            return kwargs
        if any(isinstance(x, SegmentTree) for x in given.values()):
            raise ValueError(
                "cu_seq_lens_q: got a tree of segments for a call that goes to transformers' own code; expected a call "
                "that sleepkern computes (the debug log says why not)"
            )
        rows, T = size(args[0] if args else next(kwargs[x] for x in _FIRST if x in kwargs))
        offsets = offsets_of(rows, T, **given)
        assert offsets is not None
        others = {x: value for x, value in kwargs.items() if x not in NAMES}
        return others | {name: offsets if name == "cu_seqlens" else sequence_indices(offsets, rows, T)}

    return to_original


def one_row(x: Tensor) -> Tensor:
    """x [B,T,...] as one row [1,BT,...], in which offsets count."""
    return x if x.shape[0] == 1 else x.reshape(1, -1, *x.shape[2:])
