"""What a model keeps between windows, layer by layer."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Protocol, TypeVar, runtime_checkable

from torch import Tensor, nn

from .. import state
from ..nn import SleepLM
from ..state import KVState, RecurrentState

Pair = TypeVar("Pair", RecurrentState, KVState)


class Memory(Protocol):
    """Fast weights and attention of all layers; what is taken out is not changed by later windows."""

    @property
    def recurrent(self) -> list[int]:
        """Layers with a fast weight."""

    @property
    def attention(self) -> list[int]:
        """Layers with keys and values."""

    def fast(self) -> dict[int, RecurrentState]:
        """By layer; empty before the first window."""

    def set_fast(self, fast: dict[int, RecurrentState]) -> None:
        """In the place of all that there are; what is not named starts from nothing."""

    def slow(self) -> dict[int, KVState]:
        """By layer; empty after an eviction."""

    def set_slow(self, slow: dict[int, KVState]) -> None:
        """In the place of everything that attention has; what is not named is dropped."""


class Block(Protocol):
    """One block on one window: h [B,T,d] to h, and what it remembers goes into the memory it was opened with."""

    def __call__(self, h: Tensor) -> Tensor:
        """Run it."""


@runtime_checkable
class Stack(Protocol):
    """The blocks of a language model, to be run one by one; docs/models.md says how to write one."""

    replays: bool
    """Whether a block takes `replays`, passes of its recurrence over the same keys, values and gates."""

    def __len__(self) -> int:
        """Blocks."""

    def memory(self) -> Memory:
        """An empty one."""

    def open(self, ids: Tensor, first: int | Tensor, memory: Memory, mask: Tensor | None) -> tuple[Tensor, list[Any]]:
        """Embedded tokens [B,T,d] and the blocks as they are to be called.

        first: position of the first token in the whole text, or that as a tensor [].
        mask [B, kept keys + T]: 0 for padding.
        """

    def logits(self, h: Tensor) -> Tensor:
        """Of what the last block leaves."""

    def generate(self, ids: Tensor, mask: Tensor, first: int, memory: Memory, waiting: int, **options: Any) -> Tensor:
        """ids [B,T] but for the first `waiting`, and what follows them, after `memory`, which stays as it is.

        Those that waited are read like the others, but were not given by whoever asks: no option counts them.
        """


@runtime_checkable
class Whole(Protocol):
    """A stack whose blocks can go through all passes in one call."""

    def why_not(self, h: Tensor, blocks: range) -> str | None:
        """None where they can with such an h, else the sentence why not."""

    def sleep(
        self, h: Tensor, blocks: range, memory: Memory, passes: int, feedback: str, conv_state: str
    ) -> tuple[Tensor, Tensor]:
        """h [B,L,d] after the last pass, and what each changed [N]; what blocks remember goes into memory."""


def stack_of(model: nn.Module | Stack) -> Stack:
    """The blocks of a SleepLM, or of a causal language model of transformers; a Stack is what it is.

    Raises:
        TypeError, ValueError: none of them, nor a wrapper around one.
    """
    from .unwrap import unwrapped

    if isinstance(model, Stack):
        return model
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: got a {type(model).__name__}; expected a module, or a Stack (docs/models.md)")
    model = unwrapped(model)
    if isinstance(model, SleepLM):
        from .adapters.sleep_lm import OwnStack

        return OwnStack(model)
    from .adapters.transformers_models import TransformersStack

    return TransformersStack(model)


def copied(stack: Stack, memory: Memory, rows: Tensor | None = None) -> Memory:
    """A memory that goes on from here on its own; rows: numbers of those of the batch that it has, default all."""
    copy = stack.memory()
    copy.set_fast(_of_rows(memory.fast(), rows))
    copy.set_slow(_of_rows(memory.slow(), rows))
    return copy


def _of_rows(kept: dict[int, Pair], rows: Tensor | None) -> dict[int, Pair]:
    if rows is None:
        return kept
    return {i: type(pair)(*(t.index_select(0, rows) if t.numel() else t for t in pair)) for i, pair in kept.items()}


@contextmanager
def put_back(memory: Memory, fast: dict[int, RecurrentState], slow: dict[int, KVState]) -> Iterator[None]:
    """Whatever ends what is done meanwhile too early, Ctrl-C too, memory then has these again."""
    try:
        yield
    except BaseException:
        memory.set_fast(fast)
        memory.set_slow(slow)
        raise


def __getattr__(name: str) -> Any:
    """`Fast` and `Slow`, what RecurrentState and KVState were called."""
    return state.renamed(__name__, name)
