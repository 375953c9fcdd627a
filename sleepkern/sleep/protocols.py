"""What a session needs of a model: its blocks one by one, and what each of its layers carries between windows."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Protocol, TypeVar, runtime_checkable

from torch import Tensor

from .. import state
from ..state import KVState, RecurrentState

Pair = TypeVar("Pair", RecurrentState, KVState)


class LayerCache(Protocol):
    """What the layers of a model carry from window to window. Tensors that were taken out are not changed later."""

    @property
    def recurrent(self) -> list[int]:
        """Indices of the layers with a fast weight."""

    @property
    def attention(self) -> list[int]:
        """Indices of the layers with keys and values."""

    def fast(self) -> dict[int, RecurrentState]:
        """Fast weights by layer; empty before the first window."""

    def set_fast(self, fast: dict[int, RecurrentState]) -> None:
        """Replace all fast weights; a layer that is not named starts from none."""

    def slow(self) -> dict[int, KVState]:
        """Keys and values by layer; empty after an eviction."""

    def set_slow(self, slow: dict[int, KVState]) -> None:
        """Replace all keys and values; a layer that is not named has none."""


class OpenedBlock(Protocol):
    """One block on one window. Its layer's state goes into the cache with which the block was opened."""

    def __call__(self, h: Tensor) -> Tensor:
        """Map h [B,T,d] to the next block's h."""


@runtime_checkable
class ModelAdapter(Protocol):
    """The blocks of a language model, to be run one by one (docs/guides/adapt_your_model.md has examples)."""

    replays: bool
    """Tells whether a block takes `replays`, the passes of its recurrence over the same keys, values and gates."""

    def __len__(self) -> int:
        """The number of blocks."""

    def memory(self) -> LayerCache:
        """An empty cache."""

    def open(
        self, ids: Tensor, first: int | Tensor, memory: LayerCache, mask: Tensor | None
    ) -> tuple[Tensor, list[Any]]:
        """Embedded tokens [B,T,d], and the blocks as a session calls them.

        Args:
            ids: tokens [B,T].
            first: position of the first token in the whole text, as a number or as a tensor [].
            memory: the cache that the blocks read and write.
            mask: [B, kept keys + T] with 0 for padding, None where no token is padded.
        """

    def logits(self, h: Tensor) -> Tensor:
        """Logits [B,T,vocabulary] of the last block's output [B,T,d]."""

    def generate(
        self, ids: Tensor, mask: Tensor, first: int, memory: LayerCache, pending: int, **options: Any
    ) -> Tensor:
        """ids [B,T] without the first `pending`, and the tokens that follow them; `memory` does not change.

        Pending tokens are read like the others. They belong to the text and not to the question, so that no option
        counts them.
        """


@runtime_checkable
class FusedModelAdapter(Protocol):
    """An adapter whose blocks can go through all passes in one call."""

    def why_not(self, h: Tensor, blocks: range) -> str | None:
        """None where one call can run these blocks over h [B,L,d], else a sentence with the reason."""

    def explain(self, tokens: int, blocks: range, backend: str | None) -> str:
        """Which backend runs the blocks over a window of so many tokens, and why the others do not."""

    def sleep(
        self,
        h: Tensor,
        blocks: range,
        memory: LayerCache,
        passes: int,
        feedback: str,
        conv_state: str,
        backend: str | None,
    ) -> tuple[Tensor, Tensor]:
        """h [B,L,d] after the last pass, and what each pass changed [N]; the blocks' states go into `memory`."""


def copy_cache(adapter: ModelAdapter, memory: LayerCache, rows: Tensor | None = None) -> LayerCache:
    """A cache that goes on from `memory` and leaves `memory` as it is.

    rows: indices of the rows of the batch that the copy has, default all rows.
    """
    copy = adapter.memory()
    copy.set_fast(_rows_of(memory.fast(), rows))
    copy.set_slow(_rows_of(memory.slow(), rows))
    return copy


def _rows_of(kept: dict[int, Pair], rows: Tensor | None) -> dict[int, Pair]:
    if rows is None:
        return kept
    return {i: type(pair)(*(t.index_select(0, rows) if t.numel() else t for t in pair)) for i, pair in kept.items()}


@contextmanager
def restored_on_error(memory: LayerCache, fast: dict[int, RecurrentState], slow: dict[int, KVState]) -> Iterator[None]:
    """A transaction: after any exception in the with-block, Ctrl-C too, `memory` has these states again."""
    try:
        yield
    except BaseException:
        memory.set_fast(fast)
        memory.set_slow(slow)
        raise


def __getattr__(name: str) -> Any:
    """`Fast` and `Slow`, the former names of RecurrentState and KVState."""
    return state.renamed(__name__, name)
