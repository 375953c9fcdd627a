"""A sleep as one CUDA graph: recorded once for windows of a form, replayed for all others of that form.

N passes over a model's blocks are thousands of small launches out of Python; a graph launches them at once. What
differs between two sleeps goes in and out by tensors that stay where they are: ids, the position of the first, fast
weights, keys and values that were kept. A replay runs the kernels of the recording, and reads the model's weights at
the addresses of the recording. A sleep is recorded again after a weight has moved or was replaced, and, where a launch
reads a packed copy of the weights (backends/cuda/blocks.py), after a weight has changed.
"""

from __future__ import annotations

from collections.abc import Callable
from threading import Lock
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from ..backends.cuda import blocks as cuda_blocks
from ..backends.native.identity import Places
from ..state import KVState, RecurrentState
from .protocols import LayerCache, ModelAdapter, restored_on_error

WARM_UP = 2
"""Runs before the recording, in which kernels are compiled and work space is found."""
_alone = Lock()
"""A sleep holds this: forks share the tensors of a graph, and nothing else may be launched while one is recorded."""


class GraphedSession(Protocol):
    """The part of a session that a graph needs."""

    model: nn.Module | ModelAdapter
    adapter: ModelAdapter
    memory: LayerCache
    window: int
    position: int
    tol: float | None
    differentiable: bool
    kept_mask: Tensor | None

    def fork(self) -> GraphedSession:
        """A session that goes on from this one, with a memory of its own."""

    def pass_through(self, ids: Tensor, mask: Tensor | None, first: int | Tensor) -> Tensor:
        """Run a window through the model; changes [N]."""


class Recorder(Protocol):
    """A maker of graphs."""

    device: str
    """The type of the devices whose work it records."""

    def record(self, run: Callable[[], GraphOutputs]) -> tuple[Callable[[], None], GraphOutputs]:
        """A function that repeats `run` on the same tensors, and the results that it overwrites."""


class CudaRecorder:
    """A recorder by torch.cuda.graph. The model may not wait for the device, as some mixtures of experts do."""

    device = "cuda"

    def record(self, run: Callable[[], GraphOutputs]) -> tuple[Callable[[], None], GraphOutputs]:
        aside: Any = torch.cuda.Stream()
        aside.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(aside):
            for _ in range(WARM_UP):
                run()
        torch.cuda.current_stream().wait_stream(aside)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            outputs = run()
        return graph.replay, outputs


class GraphOutputs(NamedTuple):
    """The results of a sleep: the changes [N] of its passes, and the states after it by layer."""

    changes: Tensor
    fast: dict[int, RecurrentState]
    slow: dict[int, KVState]


class GraphInputs(NamedTuple):
    """The inputs of a sleep: ids [B,T], the position of the first token as a tensor [], and the states by layer."""

    ids: Tensor
    first: Tensor
    fast: dict[int, RecurrentState]
    slow: dict[int, KVState]

    def tensors(self) -> list[Tensor]:
        """All tensors, in an order that depends on the layers alone."""
        pairs = [pair for kept in (self.fast, self.slow) for _, pair in sorted(kept.items())]  # type: ignore[attr-defined]
        return [self.ids, self.first, *(t for pair in pairs for t in pair)]

    def form(self) -> tuple[Any, ...]:
        """The key of a graph: layers, shapes, types and devices. Sleeps of one form share a graph."""
        names = (tuple(sorted(self.fast)), tuple(sorted(self.slow)))
        return (*names, *((tuple(t.shape), t.dtype, t.device) for t in self.tensors()))


class _RecordedGraph(NamedTuple):
    inputs: GraphInputs
    replay: Callable[[], None]
    outputs: GraphOutputs
    packed: list[cuda_blocks.StreamedWeights]
    addresses: Places

    def current(self, session: GraphedSession) -> bool:
        """Tells whether the session's model still has its weights where the graph reads them."""
        return self.addresses.hold(_weights(session)) and all(packed.current() for packed in self.packed)


class GraphCache:
    """The graphs of a session and its forks, by form of the window."""

    def __init__(self, recorder: Recorder | None = None) -> None:
        self.recorder: Recorder = recorder or CudaRecorder()
        self.graphs: dict[tuple[Any, ...], _RecordedGraph] = {}

    def why_not(self, session: GraphedSession, ids: Tensor, mask: Tensor | None) -> str | None:
        """None where a graph can run the sleep over this window, else a sentence why it runs without."""
        if ids.device.type != self.recorder.device:
            return f"tokens on {ids.device}, graphs are of {self.recorder.device}"
        if session.differentiable and torch.is_grad_enabled():
            return "gradients may be wanted (differentiable); torch.no_grad() says that they are not"
        if ids.shape[1] != session.window:
            return f"a window of {ids.shape[1]} tokens instead of {session.window}"
        if mask is not None or session.kept_mask is not None:
            return "padding"
        if session.tol is not None:
            return "whether another pass follows depends on values (tol)"
        return None

    def sleep(self, session: GraphedSession, ids: Tensor) -> Tensor:
        """Run a window through the session's memory; changes [N]."""
        with _alone:
            return self._sleep(session, ids)

    def _sleep(self, session: GraphedSession, ids: Tensor) -> Tensor:
        first = ids.new_full((), session.position)
        inputs = GraphInputs(ids, first, session.memory.fast(), session.memory.slow())
        form = inputs.form()
        if form not in self.graphs or not self.graphs[form].current(session):
            self.graphs[form] = self._recorded(session, inputs)
        graph = self.graphs[form]
        for static, new in zip(graph.inputs.tensors(), inputs.tensors(), strict=True):
            static.copy_(new)
        graph.replay()
        outputs = _copies(graph.outputs)
        with restored_on_error(session.memory, inputs.fast, inputs.slow):
            session.memory.set_fast(outputs.fast)
            session.memory.set_slow(outputs.slow)
        return outputs.changes

    def _recorded(self, session: GraphedSession, inputs: GraphInputs) -> _RecordedGraph:
        static = GraphInputs(inputs.ids.clone(), inputs.first.clone(), *(_cloned(kept) for kept in inputs[2:]))
        fork = session.fork()

        def run() -> GraphOutputs:
            fork.memory = fork.adapter.memory()
            fork.memory.set_fast(static.fast)
            fork.memory.set_slow(static.slow)
            changes = fork.pass_through(static.ids, None, static.first)
            return GraphOutputs(changes, fork.memory.fast(), fork.memory.slow())

        with cuda_blocks.reading() as packed:
            replay, outputs = self.recorder.record(run)
        return _RecordedGraph(static, replay, outputs, packed, Places(_weights(session)))


def _weights(session: GraphedSession) -> list[Tensor]:
    """The tensors of the model that a graph reads: its parameters and its buffers."""
    model = getattr(session.adapter, "model", session.model)
    return [*model.parameters(), *model.buffers()] if isinstance(model, nn.Module) else []


def _copies(outputs: GraphOutputs) -> GraphOutputs:
    """Copies, because the next replay overwrites the originals."""
    return GraphOutputs(outputs.changes.clone(), _cloned(outputs.fast), _cloned(outputs.slow))


def _cloned(kept: dict[int, Any]) -> dict[int, Any]:
    return {i: type(pair)(*(t.clone() for t in pair)) for i, pair in kept.items()}
