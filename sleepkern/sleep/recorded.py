"""Any causal language model built like those of transformers, block by block.

A model's own forward knows embeddings, masks and rotary angles; it is called once a window with recorders in the place
of its layers, which note how each would have been called. Then the layers run, as often as wanted. Nothing of
transformers is imported here, so that models of older versions can be adapted too (docs/models.md).
"""

from __future__ import annotations

import inspect
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .memory import Memory, copied
from .writing import written

NORMS = ("norm", "final_layernorm", "norm_f")
"""What models call the norm behind their last block."""


class Call(NamedTuple):
    """A block and what its model would have called it with."""

    block: nn.Module
    arguments: tuple[Any, ...]
    options: dict[str, Any]

    def __call__(self, h: Tensor) -> Tensor:
        return _tensor(self.block(h, *self.arguments, **self.options))


class RecordedStack(ABC):
    """The blocks of a causal language model; a subclass says what its memory is, a Memory with the model's `cache`."""

    tuples = False
    """Whether the model expects tuples from its layers."""
    replays = False

    def __init__(self, model: nn.Module) -> None:
        """
        Raises:
            ValueError: the model has not the parts that are needed: a base model with layers and norm, and lm_head.
        """
        self.model: Any = model
        self.base: Any = getattr(model, getattr(model, "base_model_prefix", ""), None)
        taken = inspect.signature(self.base.forward).parameters if isinstance(self.base, nn.Module) else {}
        self.cache_name = "cache_params" if "cache_params" in taken else "past_key_values"
        self.last: str = next((name for name in NORMS if hasattr(self.base, name)), NORMS[0])
        parts = ((self.base, "layers"), (self.base, self.last), (self.model, "lm_head"))
        missing = [name for holder, name in parts if not isinstance(getattr(holder, name, None), nn.Module)]
        if missing:
            raise ValueError(
                f"model: got a {type(model).__name__} without {', '.join(missing)}; expected a causal language model "
                "of transformers, a base model with layers and norm, and lm_head"
            )

    def __len__(self) -> int:
        return len(self.base.layers)

    @abstractmethod
    def memory(self) -> Memory:
        """An empty one."""

    def open(self, ids: Tensor, first: int | Tensor, memory: Memory, mask: Tensor | None) -> tuple[Tensor, list[Any]]:
        calls: list[Any] = []
        with self._recorded(calls):
            out = self.base(
                input_ids=ids,
                attention_mask=mask,
                position_ids=positions(ids, first),
                use_cache=True,
                **{self.cache_name: memory.cache},  # type: ignore[attr-defined]
            )
        return _tensor(out), calls

    def logits(self, h: Tensor) -> Tensor:
        return self.model.lm_head(getattr(self.base, self.last)(h))  # type: ignore[no-any-return]

    def generate(self, ids: Tensor, mask: Tensor, first: int, memory: Memory, **options: Any) -> Tensor:
        """Greedy or drawn, with max_new_tokens, do_sample and temperature."""
        memory = copied(self, memory)
        return written(
            lambda new, done, padding: self.open(new, first + done, memory, padding), self.logits, ids, mask, **options
        )

    @contextmanager
    def _recorded(self, calls: list[Call]) -> Iterator[None]:
        blocks, norm = self.base.layers, getattr(self.base, self.last)
        try:
            self.base.layers = nn.ModuleList(_Recorder(block, calls, self.tuples) for block in blocks)
            setattr(self.base, self.last, nn.Identity())
            yield
        finally:
            self.base.layers = blocks
            setattr(self.base, self.last, norm)


def positions(ids: Tensor, first: int | Tensor) -> Tensor:
    """[B,T] from `first`."""
    return (first + torch.arange(ids.shape[1], device=ids.device))[None].expand(ids.shape[0], -1)


def _tensor(out: Any) -> Tensor:
    """The first of what a model or block gives."""
    while not isinstance(out, Tensor):
        out = out[0]
    return out


class _Recorder(nn.Module):
    """Stands for a block, notes how it is called, and lets h through."""

    def __init__(self, block: nn.Module, calls: list[Call], tuples: bool) -> None:
        super().__init__()
        object.__setattr__(self, "block", block)  # not a submodule: nothing of it is to be seen or moved
        self.calls, self.tuples = calls, tuples

    def __getattr__(self, name: str) -> Any:
        return getattr(self.block, name)

    def forward(self, h: Tensor, *arguments: Any, **options: Any) -> Any:
        self.calls.append(Call(self.block, arguments, options))
        return (h, None) if self.tuples else h
