"""A sleep as one CUDA graph: recorded once for windows of a form, replayed for all others of that form.

N passes over a model's blocks are thousands of small launches out of Python; a graph launches them at once. What
differs between two sleeps goes in and out by tensors that stay where they are: ids, the position of the first, fast
weights, keys and values that were kept. The model's weights are read where they lay when the graph was recorded, by the
kernels that were there then. A sleep is recorded anew after they were put elsewhere, or others in their place, and,
where a launch reads a packed copy of them (backends/cuda/blocks.py), after they have changed.
"""

from __future__ import annotations

from collections.abc import Callable
from threading import Lock
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from ..backends.cuda import blocks as cuda_blocks
from ..backends.native.identity import Places
from ..state import KVState, RecurrentState
from .protocols import put_back

if TYPE_CHECKING:
    from .session import SleepSession

WARM_UP = 2
"""Runs before the recording, in which kernels are compiled and work space is found."""
_alone = Lock()
"""Held by a sleep: forks share the tensors of a graph, and nothing else may be launched where one is recorded."""


class Recorder(Protocol):
    """What makes graphs."""

    device: str
    """Type of device whose work it records."""

    def record(self, run: Callable[[], Made]) -> tuple[Callable[[], None], Made]:
        """A function that does what `run` did once more, on the same tensors, and the results that it writes anew."""


class CudaRecorder:
    """By torch.cuda.graph. What the model does may not wait for the device, as some mixtures of experts do."""

    device = "cuda"

    def record(self, run: Callable[[], Made]) -> tuple[Callable[[], None], Made]:
        aside: Any = torch.cuda.Stream()
        aside.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(aside):
            for _ in range(WARM_UP):
                run()
        torch.cuda.current_stream().wait_stream(aside)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            made = run()
        return graph.replay, made


class Made(NamedTuple):
    """What a sleep gives: changes [N] of its passes, and what is remembered after it."""

    changes: Tensor
    fast: dict[int, RecurrentState]
    slow: dict[int, KVState]


class _Given(NamedTuple):
    """What a sleep takes: ids [B,T], the position of the first as a tensor [], and what is remembered before it."""

    ids: Tensor
    first: Tensor
    fast: dict[int, RecurrentState]
    slow: dict[int, KVState]

    def tensors(self) -> list[Tensor]:
        """All of it, in one order."""
        pairs = [pair for kept in (self.fast, self.slow) for _, pair in sorted(kept.items())]  # type: ignore[attr-defined]
        return [self.ids, self.first, *(t for pair in pairs for t in pair)]

    def form(self) -> tuple[Any, ...]:
        """What two sleeps have to share to share a graph."""
        names = (tuple(sorted(self.fast)), tuple(sorted(self.slow)))
        return (*names, *((tuple(t.shape), t.dtype, t.device) for t in self.tensors()))


class _Graph(NamedTuple):
    given: _Given
    replay: Callable[[], None]
    made: Made
    weights: list[cuda_blocks.Packed]
    places: Places

    def current(self, session: SleepSession) -> bool:
        """Whether the session's model still has its weights where the graph reads them."""
        return self.places.hold(_weights(session)) and all(packed.current() for packed in self.weights)


class Captures:
    """The graphs of a session and its forks, by form of the window."""

    def __init__(self, recorder: Recorder | None = None) -> None:
        self.recorder: Recorder = recorder or CudaRecorder()
        self.graphs: dict[tuple[Any, ...], _Graph] = {}

    def why_not(self, session: SleepSession, ids: Tensor, mask: Tensor | None) -> str | None:
        """None where the sleep over this window can be a graph, else the sentence why it runs as it is."""
        if ids.device.type != self.recorder.device:
            return f"tokens on {ids.device}, graphs are of {self.recorder.device}"
        if session.differentiable and torch.is_grad_enabled():
            return "gradients may be wanted (differentiable); torch.no_grad() says that they are not"
        if ids.shape[1] != session.window:
            return f"a window of {ids.shape[1]} tokens instead of {session.window}"
        if mask is not None or session.kept_mask is not None:
            return "padding"
        if session.settled is not None:
            return "whether another pass follows depends on numbers (settled)"
        return None

    def sleep(self, session: SleepSession, ids: Tensor) -> Tensor:
        """Let the session's memory go through a window; changes [N]."""
        with _alone:
            return self._sleep(session, ids)

    def _sleep(self, session: SleepSession, ids: Tensor) -> Tensor:
        first = ids.new_full((), session.position)
        given = _Given(ids, first, session.memory.fast(), session.memory.slow())
        form = given.form()
        if form not in self.graphs or not self.graphs[form].current(session):
            self.graphs[form] = self._recorded(session, given)
        graph = self.graphs[form]
        for own, new in zip(graph.given.tensors(), given.tensors(), strict=True):
            own.copy_(new)
        graph.replay()
        made = _apart(graph.made)
        with put_back(session.memory, given.fast, given.slow):
            session.memory.set_fast(made.fast)
            session.memory.set_slow(made.slow)
        return made.changes

    def _recorded(self, session: SleepSession, given: _Given) -> _Graph:
        own = _Given(given.ids.clone(), given.first.clone(), *(_cloned(kept) for kept in given[2:]))
        sleeper = session.fork()

        def run() -> Made:
            sleeper.memory = sleeper.stack.memory()
            sleeper.memory.set_fast(own.fast)
            sleeper.memory.set_slow(own.slow)
            changes = sleeper.pass_through(own.ids, None, own.first)
            return Made(changes, sleeper.memory.fast(), sleeper.memory.slow())

        with cuda_blocks.reading() as weights:
            replay, made = self.recorder.record(run)
        return _Graph(own, replay, made, weights, Places(_weights(session)))


def _weights(session: SleepSession) -> list[Tensor]:
    """What a graph reads of a model: its parameters, and its buffers."""
    model = getattr(session.stack, "model", session.model)
    return [*model.parameters(), *model.buffers()] if isinstance(model, nn.Module) else []


def _apart(made: Made) -> Made:
    """Copies, for the next replay writes into the originals."""
    return Made(made.changes.clone(), _cloned(made.fast), _cloned(made.slow))


def _cloned(kept: dict[int, Any]) -> dict[int, Any]:
    return {i: type(pair)(*(t.clone() for t in pair)) for i, pair in kept.items()}
