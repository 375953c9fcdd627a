"""A small language model that sleeps: attention and gated DeltaNet in turns."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from ..ops.blocks import sleep_blocks
from .gated_delta_net import GatedDeltaNet
from .hybrid_block import HybridBlock
from .tokens import tokens_of
from .window_attention import WindowAttention


class SleepLM(nn.Module):
    """Embedding, blocks by a pattern, head. `SleepSession` runs it, window by window.

    Positions are learned and count from the start of a window: after an eviction nothing else is left to count from.
    Matrices start as those of nn.Linear, of size 1 / sqrt(3 fan-in), projections back into the residual stream at
    1 / sqrt(2 blocks) of that and the head at 0, so that N passes over the blocks start near the identity. Tokens start
    with a mean square of 1, which is what feedback "reinject" adds to, and positions far smaller, so that h says first
    of all which token it is. Convolutions start small: an optimiser that moves each weight by its own rate then soon
    decides which tokens they see.

    Args:
        vocabulary: the number of tokens.
        width: d of the residual stream.
        heads: heads of every mixer.
        blocks: the number of blocks.
        window: tokens of the longest window.
        pattern: repeated over the blocks, "A" attention, "G" gated DeltaNet.
        factor: the inner width of each MLP over d.
        mixer: further arguments of GatedDeltaNet.
        kinds: an id token + vocabulary * kind is the token with something said of it, out of so many; the embeddings of
            both add up. Only tokens are predicted.

    Raises:
        TypeError, ValueError: a size that is not a whole number from 1 on, or a pattern without "G".
    """

    vocabulary: int
    window: int
    tokens: nn.Embedding
    positions: nn.Embedding
    kinds: nn.Embedding | None
    layers: nn.ModuleList
    norm: nn.RMSNorm
    lm_head: nn.Linear

    def __init__(
        self,
        vocabulary: int,
        width: int = 64,
        heads: int = 2,
        blocks: int = 2,
        window: int = 512,
        pattern: str = "AG",
        factor: int = 2,
        mixer: dict[str, object] | None = None,
        kinds: int = 1,
    ) -> None:
        super().__init__()
        if not pattern or set(pattern) - set("AG") or "G" not in pattern[:blocks]:
            raise ValueError(f"pattern: got {pattern!r}; expected letters A and G, a G among the first {blocks}")
        self.vocabulary, self.window = vocabulary, window
        self.tokens, self.positions = nn.Embedding(vocabulary, width), nn.Embedding(window, width)
        self.kinds = nn.Embedding(kinds, width) if kinds > 1 else None
        self.layers = nn.ModuleList(
            HybridBlock(
                width,
                GatedDeltaNet(width, heads, **(mixer or {})) if letter == "G" else WindowAttention(width, heads),  # type: ignore[arg-type]
                factor,
            )
            for letter in (pattern[i % len(pattern)] for i in range(blocks))
        )
        self.norm = nn.RMSNorm(width)
        self.lm_head = nn.Linear(width, vocabulary, bias=False)
        self._initialise()

    def embed(self, ids: Tensor, first: int = 0) -> Tensor:
        """ids [B,T], the first at place `first` of its window, to h [B,T,d]."""
        if first + ids.shape[1] > self.window:
            raise ValueError(f"ids: got {first + ids.shape[1]} tokens of a window; expected at most {self.window}")
        places = torch.arange(first, first + ids.shape[1], dtype=torch.int64, device=ids.device)
        if self.kinds is None:
            return self.tokens(ids) + self.positions(places)  # type: ignore[no-any-return]
        return self.tokens(ids % self.vocabulary) + self.kinds(ids // self.vocabulary) + self.positions(places)  # type: ignore[no-any-return]

    def blocks(self) -> list[HybridBlock]:
        """The layers in order, or what was put around them, as torch.compile does.

        Raises:
            TypeError: a layer that does not say, as `HybridBlock.recurrent`, what it remembers.
        """
        found: list[Any] = list(self.layers)
        for i, block in enumerate(found):
            if not isinstance(getattr(block, "recurrent", None), bool):
                raise TypeError(f"layers: got a {type(block).__name__} at {i}; expected a HybridBlock")
        return found

    def logits(self, h: Tensor) -> Tensor:
        """h [B,T,d] of the last block to [B,T,vocabulary]."""
        return self.lm_head(self.norm(h))  # type: ignore[no-any-return]

    def known(self) -> int | None:
        """Ids that can be embedded, tokens of every kind; None where embeddings do not say."""
        counts = [getattr(part, "num_embeddings", None) for part in (self.tokens, self.kinds) if part is not None]
        return None if None in counts else math.prod(counts)  # type: ignore[arg-type]

    def forward(self, ids: Tensor) -> Tensor:
        """Logits [B,T,vocabulary] of one window, integers [B,T], without memory of others.

        Raises:
            TypeError, ValueError: other ids; tokens that the model does not know, but on a GPU, which would be waited
                for.
        """
        ids = tokens_of(ids, self.known() if isinstance(ids, Tensor) and ids.device.type == "cpu" else None)
        h, blocks = self.embed(ids), self.blocks()
        if not torch.is_grad_enabled() and h.numel():
            return self.logits(sleep_blocks(h, blocks).h)
        for block in blocks:
            h, _ = block(h)
        return self.logits(h)

    def _initialise(self) -> None:
        for name, parameter in self.named_parameters():
            if name.startswith(("tokens", "kinds")):
                nn.init.normal_(parameter)
            elif name.startswith("positions"):
                nn.init.normal_(parameter, std=0.02)
            elif "convolution" in name:
                nn.init.normal_(parameter, std=0.1)
            elif parameter.ndim == 2:
                nn.init.normal_(parameter, std=(3 * parameter.shape[1]) ** -0.5)
                if name.endswith("out.weight"):
                    parameter.data *= (2 * len(self.layers)) ** -0.5
        nn.init.zeros_(self.lm_head.weight)
