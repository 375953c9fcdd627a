"""A tree of token lists as one row of a patched model: a prefix that continuations share is computed once."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from sleepkern.problems.branches import read_parents

from .packing import SegmentTree
from .rollback import RollbackCache

_ATTENTION = ("sdpa", "eager")
"""Kinds of attention that take a mask of every pair of tokens."""


class TokenTree:
    """Segments of tokens that go on from each other, side by side in one row.

    A segment sees itself and what it goes on from, and no other. `run` gives a patched model the row: logits of the
    tokens of `path(i)` are those of a row of these tokens alone, and so are gradients, summed in what is shared.

        tree = TokenTree([prompt, *answers], parents=[-1] + [0] * len(answers))
        logits = tree.run(model).logits[0]
        of_first_answer = logits[tree.path(1)]

    Args:
        segments: the tokens of each segment, a list or a tensor [T] of integers; a segment may be empty.
        parents: for each segment the index of the one it goes on from, which comes before it; -1 for none.

    Attributes:
        ids: [1,T] all tokens, segment after segment.
        cu_seqlens: [n + 1] where each segment starts, and the end of the last.
        parents: as given.
        position_ids: [1,T] the position of each token in its path.
        ends: for `from_texts`, the segment in which each text ends.

    Raises:
        TypeError: segments or parents of another type.
        ValueError: no tokens, or a segment that does not come after the one it goes on from.
    """

    ids: Tensor
    cu_seqlens: Tensor
    parents: tuple[int, ...]
    position_ids: Tensor
    ends: tuple[int, ...]

    def __init__(self, segments: Sequence[Any], parents: Tensor | Sequence[int]) -> None:
        tokens = [_integers(x, f"segments[{i}]") for i, x in enumerate(segments)]
        self.cu_seqlens = torch.tensor([0, *itertools.accumulate(map(len, tokens))])
        if self.cu_seqlens[-1] == 0:
            raise ValueError(f"segments: got {len(tokens)} without a token; expected at least one token")
        self.parents = tuple(read_parents(parents, self.cu_seqlens))
        self.ids = torch.tensor([list(itertools.chain(*tokens))])
        self.ends = ()
        starts: list[int] = []
        for parent in self.parents:
            starts.append(0 if parent < 0 else starts[parent] + len(tokens[parent]))
        positions = [range(a, a + len(x)) for a, x in zip(starts, tokens, strict=True)]
        self.position_ids = torch.tensor([list(itertools.chain(*positions))])

    @classmethod
    def from_texts(cls, texts: Sequence[Any]) -> TokenTree:
        """The tree of texts, each a list or a tensor [T] of integers, in which shared beginnings are one segment.

        Text i is `path(ends[i])`.
        """
        tokens = [_integers(x, f"texts[{i}]") for i, x in enumerate(texts)]
        segments: list[list[int]] = []
        parents: list[int] = []
        ends = [-1] * len(tokens)
        groups = [(-1, 0, list(range(len(tokens))))]
        while groups:
            parent, depth, group = groups.pop()
            by_next: dict[int | None, list[int]] = {}
            for i in group:
                by_next.setdefault(tokens[i][depth] if depth < len(tokens[i]) else None, []).append(i)
            for i in by_next.pop(None, []):
                ends[i] = parent
            for same in reversed(list(by_next.values())):
                length = _common(depth, [tokens[i] for i in same])
                segments.append(tokens[same[0]][depth:length])
                parents.append(parent)
                groups.append((len(segments) - 1, length, same))
        tree = cls(segments, parents)
        tree.ends = tuple(ends)
        return tree

    def path(self, segment: int) -> Tensor:
        """The indices, in the row, of the tokens from the first to the end of a segment."""
        found: list[Tensor] = []
        while segment >= 0:
            found.append(torch.arange(int(self.cu_seqlens[segment]), int(self.cu_seqlens[segment + 1])))
            segment = self.parents[segment]
        return torch.cat(found[::-1]) if found else torch.arange(0)

    def attention_mask(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """[1,1,T,T] what attention adds: 0 where a token sees another one of its path, else the smallest number."""
        n, T = len(self.parents), self.ids.shape[1]
        within = torch.eye(n, dtype=torch.bool)
        for i, parent in enumerate(self.parents):
            if parent >= 0:
                within[i] |= within[parent]
        segment = torch.repeat_interleave(torch.arange(n), self.cu_seqlens.diff())
        seen = within[segment][:, segment] & torch.ones(T, T, dtype=torch.bool).tril()
        mask = torch.zeros(T, T, dtype=dtype).masked_fill(~seen, torch.finfo(dtype).min)
        return mask[None, None]

    def run(self, model: nn.Module, **options: Any) -> Any:
        """What a patched causal language model gives for the row, with gradients where autograd is on.

        Args:
            model: a hybrid model of transformers that `patch` has replaced, with sdpa or eager attention to all tokens.
            options: further arguments of its forward, such as output_hidden_states; no labels, as the loss of a row
                would let a segment's last token predict the first one of the next segment in the row.

        Raises:
            ValueError: a model that is not patched, or whose attention takes no mask; labels.
        """
        if options.get("labels") is not None:
            raise ValueError("labels: got labels of a row; expected none, and a loss of the logits of each path")
        RollbackCache(model).attention_layers()  # checks the model
        kind = getattr(model.config, "_attn_implementation", None)
        if kind not in _ATTENTION:
            raise ValueError(f"model: got attention by {kind!r}; expected {' or '.join(_ATTENTION)}, which take a mask")
        weight = model.get_input_embeddings().weight  # type: ignore[operator]
        tree = SegmentTree(self.cu_seqlens.to(weight.device), self.parents)
        return model(
            input_ids=self.ids.to(weight.device),
            position_ids=self.position_ids.to(weight.device),
            attention_mask=self.attention_mask(weight.dtype).to(weight.device),
            cu_seq_lens_q=tree,
            use_cache=False,
            **options,
        )


def _integers(x: Any, name: str) -> list[int]:
    if isinstance(x, Tensor):
        if x.ndim != 1 or x.is_floating_point() or x.dtype == torch.bool:
            raise TypeError(f"{name}: got {x.dtype} {list(x.shape)}; expected integers [T]")
        return [int(i) for i in x.tolist()]
    if not isinstance(x, Sequence) or isinstance(x, (str, bytes)):
        raise TypeError(f"{name}: got a {type(x).__name__}; expected a list or a tensor of integers")
    wrong = next((i for i in x if isinstance(i, bool) or not isinstance(i, int)), None)
    if wrong is not None:
        raise TypeError(f"{name}: got a {type(wrong).__name__} among them; expected integers")
    return list(x)


def _common(depth: int, texts: list[list[int]]) -> int:
    """How far texts agree that agree up to `depth`."""
    end = min(map(len, texts))
    while depth < end and all(x[depth] == texts[0][depth] for x in texts):
        depth += 1
    return depth
