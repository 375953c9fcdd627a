"""A recorder that stands for CUDA's graphs: what it replays knows nothing but tensors."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from sleepkern.sleep.cuda_graph import GraphOutputs

WAITS = {torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default}
"""Operators for which a host would wait for its device, which no graph can hold."""


class Tape(TorchDispatchMode):
    """Operators in the order in which they ran, with the very tensors and numbers that they had."""

    def __init__(self) -> None:
        super().__init__()
        self.entries: list[tuple[Any, Any, Any, Any]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        assert func not in WAITS, f"{func} waits for the device"
        out = func(*args, **(kwargs or {}))
        self.entries.append((func, args, kwargs or {}, out))
        return out

    def replay(self) -> None:
        """Once more, results into the same memory."""
        for func, args, kwargs, out in self.entries:
            given = {storage(t) for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)}
            made = [t for t in tree_leaves(out) if isinstance(t, Tensor)]
            if func._schema.is_mutable or any(storage(t) not in given for t in made):
                again = tree_leaves(func(*args, **kwargs))
                for old, new in zip(made, (t for t in again if isinstance(t, Tensor)), strict=True):
                    if storage(old) not in given:  # a view of what was given has its memory
                        old.copy_(new)


def storage(t: Tensor) -> int:
    return t.untyped_storage()._cdata


class Recorder:
    """Records on the CPU. What Python knew while it recorded is frozen, as in a graph."""

    device = "cpu"

    def __init__(self) -> None:
        self.tapes: list[Tape] = []

    def record(self, run: Callable[[], GraphOutputs]) -> tuple[Callable[[], None], GraphOutputs]:
        run()
        self.tapes.append(Tape())
        with self.tapes[-1] as tape:
            made = run()
        for t in tree_leaves(made):
            if isinstance(t, Tensor):
                t.fill_(torch.nan)  # recording computes nothing on a device
        return tape.replay, made
