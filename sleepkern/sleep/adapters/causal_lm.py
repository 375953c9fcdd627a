"""Any causal language model built like those of transformers, block by block.

A model's own forward knows embeddings, masks and rotary angles; it is called once a window, on a shallow copy with
recorders in the place of its layers, which note how each would have been called. Then the layers run, as often as
wanted. The model itself stays as it is, so that threads can share it. Nothing of transformers is imported here, so that
models of older versions can be adapted too (docs/models.md).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from threading import RLock
from types import FunctionType, MethodType
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from ...integrations.caches import cache_name
from ..generation import written
from ..protocols import Memory, copied

NORMS = ("norm", "final_layernorm", "norm_f")
"""What models call the norm behind their last block."""
_locks: WeakKeyDictionary[nn.Module, Any] = WeakKeyDictionary()
"""Of base models that cannot be copied; see RecordedStack.alone."""


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
        Args:
            model: has `lm_head`, and a base model as `model` or by the name that its `base_model_prefix` says. The base
                model has `layers`, a ModuleList, and behind them `norm` (or a name of NORMS). Its forward takes
                input_ids, attention_mask, position_ids, use_cache and the cache, under whatever name, calls each of its
                layers with h [B,T,d] first and the cache, in order, and gives a tensor, a tuple or an output with
                last_hidden_state; a layer gives a tensor or a tuple.

        Raises:
            ValueError: the model has not these parts.
        """
        self.model: Any = model
        self.base: Any = getattr(model, getattr(model, "base_model_prefix", "model"), None)
        self.base = getattr(self.base, "_orig_mod", self.base)  # compiled: only embeddings and masks would run so
        self.last: str = next((name for name in NORMS if hasattr(self.base, name)), NORMS[0])
        parts = ((self.base, "layers"), (self.base, self.last), (self.model, "lm_head"))
        missing = [name for holder, name in parts if not isinstance(getattr(holder, name, None), nn.Module)]
        if missing:
            raise ValueError(
                f"model: got a {type(model).__name__} without {', '.join(missing)}; expected a causal language "
                "model: a base model (`model`, or what `base_model_prefix` names) with layers and norm, and lm_head; "
                "out of a wrapper or several parts, pass that model itself; for others, a Stack (docs/models.md)"
            )
        self.cache_name = cache_name(self.base)

    def __len__(self) -> int:
        return len(self.base.layers)

    @property
    def vocabulary(self) -> int | None:
        """Tokens that can be embedded, where the model says so."""
        embedding = getattr(self.model, "get_input_embeddings", lambda: getattr(self.base, "embed_tokens", None))()
        return getattr(embedding, "num_embeddings", None)

    @abstractmethod
    def memory(self) -> Memory:
        """An empty one."""

    def open(self, ids: Tensor, first: int | Tensor, memory: Memory, mask: Tensor | None) -> tuple[Tensor, list[Any]]:
        calls: list[Any] = []
        through: list[Any] = []
        if not hasattr(memory, "cache"):
            raise TypeError(
                f"memory: got a {type(memory).__name__} without `cache`; expected what the model takes for one"
            )
        with self._recorded(calls, through) as base:
            out = base(
                input_ids=ids,
                attention_mask=mask,
                position_ids=positions(ids, first),
                use_cache=True,
                **{self.cache_name: memory.cache},
            )
        if len(calls) < len(self):  # or they ran by themselves, and what is in memory is theirs
            raise ValueError(
                f"model: got a {type(self.model).__name__} whose forward does not call its own layers "
                f"({len(calls)} calls of {len(self)})"
            )
        self._check_calls(calls, memory)
        h = [_tensor(x) for x in (*through, out)]
        if not all(map(_same, h, h[1:])):  # what recorders let through, from the first to what the model gives
            raise ValueError(
                f"model: got a {type(self.model).__name__} that changes h between layers or behind the last; expected "
                "one that hands it from layer to layer, in tuples if the stack says so"
            )
        return h[-1], calls

    def _check_calls(self, calls: list[Call], memory: Memory) -> None:
        """
        Raises:
            ValueError: layers that should remember are called without the memory; they would forget without a word.
        """
        cache, remember = memory.cache, {*memory.recurrent, *memory.attention}  # type: ignore[attr-defined]
        without = [
            i
            for i, call in enumerate(calls)
            if i in remember and not any(x is cache for x in (*call.arguments, *call.options.values()))
        ]
        if without:
            raise ValueError(
                f"model: got a {type(self.model).__name__} that takes a cache as {self.cache_name} and does not hand "
                f"it to layers {without}; expected it among their arguments"
            )

    def check_mode(self) -> None:
        """
        Raises:
            ValueError: gradient checkpointing in training, for which layers of transformers let go of their cache.
        """
        trained = (x for block in self.base.layers if block.training for x in block.modules())
        if any(x.training and vars(x).get("gradient_checkpointing", False) for x in (self.base, *trained)):
            raise ValueError(
                f"model: got a {type(self.model).__name__} in training with gradient checkpointing, whose layers then "
                "remember nothing; expected it without, and SleepSession(checkpoint=True), which saves as much"
            )

    def logits(self, h: Tensor) -> Tensor:
        with self.alone():
            return self.model.lm_head(getattr(self.base, self.last)(h))  # type: ignore[no-any-return]

    def generate(self, ids: Tensor, mask: Tensor, first: int, memory: Memory, waiting: int, **options: Any) -> Tensor:
        """Greedy or drawn (`written`)."""
        memory = copied(self, memory)

        def opened(new: Tensor, done: int, padding: Tensor | None) -> tuple[Tensor, list[Any]]:
            return self.open(new, first + done, memory, padding)

        return written(opened, self.logits, ids, mask, waiting, self.model, options)

    def alone(self) -> AbstractContextManager[Any]:
        """To be held where the base model is used: one that cannot be copied is changed while it is recorded."""
        free = _copied(self.base, {}) is not None and _copied(self.model, {}) is not None
        return nullcontext() if free else _locks.setdefault(self.base, RLock())

    @contextmanager
    def _recorded(self, calls: list[Call], through: list[Any]) -> Iterator[Any]:
        """The base model with recorders for blocks and without the last norm."""
        with self.alone():
            self.check_mode()
            recorders = nn.ModuleList(_Recorder(block, calls, through, self.tuples) for block in self.base.layers)
            with replaced(self.base, {"layers": recorders, self.last: nn.Identity()}) as base:
                yield base


@contextmanager
def replaced(module: Any, instead: dict[str, nn.Module]) -> Iterator[Any]:
    """The module with other submodules: a copy of it where that can be, else itself meanwhile; see `alone`."""
    copy = _copied(module, instead)
    if copy is not None:
        yield copy
        return
    aside = {name: getattr(module, name) for name in instead}
    try:
        vars(module)["_modules"].update(instead)
        yield module
    finally:
        vars(module)["_modules"].update(aside)


def _copied(base: nn.Module, instead: dict[str, nn.Module]) -> nn.Module | None:
    """A shallow copy of a module with other submodules, or None where its forward would still run the module itself.

    That is a forward put on the instance, unless all of it that is bound can be bound to the copy, as accelerate's.
    """
    if "forward" in vars(base) and not all(_known(x, base) for x in list(vars(base).values()) if callable(x)):
        return None
    copy = object.__new__(type(base))
    vars(copy).update({name: _rebound(x, base, copy) for name, x in list(vars(base).items())})
    vars(copy).update(_modules={**vars(base)["_modules"], **instead}, _compiled_call_impl=None)
    return copy


def _known(x: Any, base: nn.Module) -> bool:
    """Whether a callable reaches the module only by what _rebound sees."""
    if isinstance(x, partial):
        return _known(x.func, base)
    if isinstance(x, MethodType):
        return x.__self__ is base
    return isinstance(x, FunctionType) and x.__closure__ is None


def _rebound(x: Any, old: nn.Module, new: nn.Module) -> Any:
    """A method or partial of methods of another module."""
    if x is old:
        return new
    if isinstance(x, MethodType):
        return MethodType(_rebound(x.__func__, old, new), _rebound(x.__self__, old, new))
    if isinstance(x, partial):
        options = {name: _rebound(value, old, new) for name, value in x.keywords.items()}
        return partial(_rebound(x.func, old, new), *(_rebound(value, old, new) for value in x.args), **options)
    return x


def positions(ids: Tensor, first: int | Tensor) -> Tensor:
    """[B,T] from `first`."""
    return (first + torch.arange(ids.shape[1], device=ids.device))[None].expand(ids.shape[0], -1)


def _tensor(out: Any) -> Tensor:
    """h out of what a model or block gives.

    Raises:
        TypeError: it is not in it.
    """
    found = out
    while not isinstance(found, Tensor):
        if isinstance(found, (tuple, list)) and found:
            found = found[0]
        elif getattr(found, "last_hidden_state", None) is not None:
            found = found.last_hidden_state
        else:
            raise TypeError(
                f"model: got a {type(out).__name__} out of its forward or of a layer; expected a tensor, a tuple that "
                "begins with one, or an output with last_hidden_state"
            )
    return found


def _same(a: Tensor, b: Tensor) -> bool:
    """Whether both are one tensor, though a hook may have wrapped it."""
    return a is b or (a.shape == b.shape and a.data_ptr() == b.data_ptr())


class _Recorder(nn.Module):
    """Stands for a block, notes how it is called, and lets h through."""

    def __init__(self, block: nn.Module, calls: list[Call], through: list[Any], tuples: bool) -> None:
        super().__init__()
        object.__setattr__(self, "block", block)  # not a submodule: nothing of it is to be seen or moved
        self.calls, self.through, self.tuples = calls, through, tuples

    def __getattr__(self, name: str) -> Any:
        return getattr(self.block, name)

    def forward(self, h: Tensor, *arguments: Any, **options: Any) -> Any:
        self.calls.append(Call(self.block, arguments, options))
        self.through.append(h)
        return (h, None) if self.tuples else h
