"""The adapter of a causal language model that is built like those of transformers.

A model's own forward knows embeddings, masks and rotary angles. The adapter calls that forward once a window, on a
shallow copy with recorders in the place of its layers; a recorder notes how its layer is called. Then the layers run,
as often as the session has passes. The model itself does not change, so that threads can share it. This module does not
import transformers, so that models of older versions can be adapted too (docs/guides/adapt_your_model.md).
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
from ..generation import generate
from ..protocols import LayerCache, copy_cache

NORMS = ("norm", "final_layernorm", "norm_f")
"""Names that models give to the norm after their last block."""
_locks: WeakKeyDictionary[nn.Module, Any] = WeakKeyDictionary()
"""Locks of base models that cannot be copied; see CausalLMAdapter.locked."""


class BlockCall(NamedTuple):
    """A block with the arguments with which its model calls it."""

    block: nn.Module
    arguments: tuple[Any, ...]
    options: dict[str, Any]

    def __call__(self, h: Tensor) -> Tensor:
        return _tensor(self.block(h, *self.arguments, **self.options))


class CausalLMAdapter(ABC):
    """The blocks of a causal language model. A subclass defines `memory`, a LayerCache that has the model's `cache`."""

    cache_name: str

    tuples = False
    """Tells whether the model expects tuples from its layers."""
    replays = False

    def __init__(self, model: nn.Module) -> None:
        """
        Args:
            model: has `lm_head`, and a base model as `model` or under the name in its `base_model_prefix`. The base
                model has `layers`, a ModuleList, and after them `norm` (or a name of NORMS). Its forward takes
                input_ids, attention_mask, position_ids, use_cache and the cache, under any name. It calls its layers in
                order, each with h [B,T,d] first and with the cache, and returns a tensor, a tuple or an output with
                last_hidden_state; a layer returns a tensor or a tuple.

        Raises:
            ValueError: the model lacks one of these parts.
        """
        self.model: Any = model
        self.base: Any = getattr(model, getattr(model, "base_model_prefix", "model"), None)
        self.base = getattr(self.base, "_orig_mod", self.base)  # without torch.compile
        self.last: str = next((name for name in NORMS if hasattr(self.base, name)), NORMS[0])
        parts = ((self.base, "layers"), (self.base, self.last), (self.model, "lm_head"))
        missing = [name for holder, name in parts if not isinstance(getattr(holder, name, None), nn.Module)]
        if missing:
            raise ValueError(
                f"model: got a {type(model).__name__} without {', '.join(missing)}; expected a causal language "
                "model: a base model (`model`, or what `base_model_prefix` names) with layers and norm, and lm_head; "
                "out of a wrapper or several parts, pass that model itself; for others, a ModelAdapter "
                "(docs/guides/adapt_your_model.md)"
            )
        self.cache_name = cache_name(self.base)

    def __len__(self) -> int:
        return len(self.base.layers)

    @property
    def vocabulary(self) -> int | None:
        """The number of tokens that can be embedded; None where the model does not say."""
        embedding = getattr(self.model, "get_input_embeddings", lambda: getattr(self.base, "embed_tokens", None))()
        return getattr(embedding, "num_embeddings", None)

    @abstractmethod
    def memory(self) -> LayerCache:
        """An empty cache."""

    def open(
        self, ids: Tensor, first: int | Tensor, memory: LayerCache, mask: Tensor | None
    ) -> tuple[Tensor, list[Any]]:
        calls: list[Any] = []
        hidden: list[Any] = []
        if not hasattr(memory, "cache"):
            raise TypeError(
                f"memory: got a {type(memory).__name__} without `cache`; expected what the model takes for one"
            )
        with self._recorded(calls, hidden) as base:
            out = base(
                input_ids=ids,
                attention_mask=mask,
                position_ids=position_ids(ids, first),
                use_cache=True,
                **{self.cache_name: memory.cache},
            )
        if len(calls) < len(self):  # else the layers ran by themselves, and wrote into the cache
            raise ValueError(
                f"model: got a {type(self.model).__name__} whose forward does not call its own layers "
                f"({len(calls)} calls of {len(self)})"
            )
        self._check_calls(calls, memory)
        h = [_tensor(x) for x in (*hidden, out)]
        if not all(map(_same, h, h[1:])):  # from the first recorder to the model's output
            raise ValueError(
                f"model: got a {type(self.model).__name__} that changes h between layers or after the last; expected "
                "one that hands it from layer to layer, in tuples if the adapter says so"
            )
        return h[-1], calls

    def _check_calls(self, calls: list[BlockCall], memory: LayerCache) -> None:
        """Check that each layer with a state is called with the cache; without it, the layer would silently forget.

        Raises:
            ValueError: the indices of the layers that are not.
        """
        cache, stateful = memory.cache, {*memory.recurrent, *memory.attention}  # type: ignore[attr-defined]
        without = [
            i
            for i, call in enumerate(calls)
            if i in stateful and not any(x is cache for x in (*call.arguments, *call.options.values()))
        ]
        if without:
            raise ValueError(
                f"model: got a {type(self.model).__name__} that takes a cache as {self.cache_name} and does not hand "
                f"it to layers {without}; expected it among their arguments"
            )

    def check_mode(self) -> None:
        """Refuse gradient checkpointing in training, for which layers of transformers drop their cache.

        Raises:
            ValueError: the model is in that mode.
        """
        trained = (x for block in self.base.layers if block.training for x in block.modules())
        if any(x.training and vars(x).get("gradient_checkpointing", False) for x in (self.base, *trained)):
            raise ValueError(
                f"model: got a {type(self.model).__name__} in training with gradient checkpointing, whose layers then "
                "remember nothing; expected it without, and SleepSession(checkpoint=True), which saves as much"
            )

    def logits(self, h: Tensor) -> Tensor:
        with self.locked():
            return self.model.lm_head(getattr(self.base, self.last)(h))  # type: ignore[no-any-return]

    def generate(
        self, ids: Tensor, mask: Tensor, first: int, memory: LayerCache, pending: int, **options: Any
    ) -> Tensor:
        """Tokens by `generation.generate`, greedy or sampled."""
        memory = copy_cache(self, memory)

        def open_at(new: Tensor, done: int, padding: Tensor | None) -> tuple[Tensor, list[Any]]:
            return self.open(new, first + done, memory, padding)

        return generate(open_at, self.logits, ids, mask, pending, self.model, options)

    def locked(self) -> AbstractContextManager[Any]:
        """A lock for every use of the base model, which is changed while it is recorded, unless it can be copied."""
        free = _shallow_copy(self.base, {}) is not None and _shallow_copy(self.model, {}) is not None
        return nullcontext() if free else _locks.setdefault(self.base, RLock())

    @contextmanager
    def _recorded(self, calls: list[BlockCall], hidden: list[Any]) -> Iterator[Any]:
        """The base model with recorders instead of its blocks, and without the last norm."""
        with self.locked():
            self.check_mode()
            recorders = nn.ModuleList(_CallRecorder(block, calls, hidden, self.tuples) for block in self.base.layers)
            with with_submodules(self.base, {"layers": recorders, self.last: nn.Identity()}) as base:
                yield base


@contextmanager
def with_submodules(module: Any, instead: dict[str, nn.Module]) -> Iterator[Any]:
    """The module with other submodules: a shallow copy, or, where that is impossible, the module itself for a while."""
    copy = _shallow_copy(module, instead)
    if copy is not None:
        yield copy
        return
    aside = {name: getattr(module, name) for name in instead}
    try:
        vars(module)["_modules"].update(instead)
        yield module
    finally:
        vars(module)["_modules"].update(aside)


def _shallow_copy(base: nn.Module, instead: dict[str, nn.Module]) -> nn.Module | None:
    """A shallow copy of a module with other submodules; None where its forward would still run the module itself.

    The latter holds for a forward that was set on the instance, unless every bound part of that forward can be bound to
    the copy, as the parts of accelerate's can.
    """
    if "forward" in vars(base) and not all(_can_rebind(x, base) for x in list(vars(base).values()) if callable(x)):
        return None
    copy = object.__new__(type(base))
    vars(copy).update({name: _rebound(x, base, copy) for name, x in list(vars(base).items())})
    vars(copy).update(_modules={**vars(base)["_modules"], **instead}, _compiled_call_impl=None)
    return copy


def _can_rebind(x: Any, base: nn.Module) -> bool:
    """Tells whether `_rebound` replaces every reference of a callable to the module."""
    if isinstance(x, partial):
        return _can_rebind(x.func, base)
    if isinstance(x, MethodType):
        return x.__self__ is base
    return isinstance(x, FunctionType) and x.__closure__ is None


def _rebound(x: Any, old: nn.Module, new: nn.Module) -> Any:
    """The same method or partial, bound to another module."""
    if x is old:
        return new
    if isinstance(x, MethodType):
        return MethodType(_rebound(x.__func__, old, new), _rebound(x.__self__, old, new))
    if isinstance(x, partial):
        options = {name: _rebound(value, old, new) for name, value in x.keywords.items()}
        return partial(_rebound(x.func, old, new), *(_rebound(value, old, new) for value in x.args), **options)
    return x


def position_ids(ids: Tensor, first: int | Tensor) -> Tensor:
    """Positions [B,T] that count from `first`."""
    return (first + torch.arange(ids.shape[1], device=ids.device))[None].expand(ids.shape[0], -1)


def _tensor(out: Any) -> Tensor:
    """h [B,T,d] in the output of a model or of a block.

    Raises:
        TypeError: the output holds no such tensor.
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
    """Tells whether both are the same tensor in memory, though a hook may have wrapped one of them."""
    return a is b or (a.shape == b.shape and a.data_ptr() == b.data_ptr())


class _CallRecorder(nn.Module):
    """Takes the place of a block, notes how the block is called, and returns h."""

    def __init__(self, block: nn.Module, calls: list[BlockCall], hidden: list[Any], tuples: bool) -> None:
        super().__init__()
        object.__setattr__(self, "block", block)  # hidden from torch, so that the block is not a submodule
        self.calls, self.hidden, self.tuples = calls, hidden, tuples

    def __getattr__(self, name: str) -> Any:
        return getattr(self.block, name)

    def forward(self, h: Tensor, *arguments: Any, **options: Any) -> Any:
        self.calls.append(BlockCall(self.block, arguments, options))
        self.hidden.append(h)
        return (h, None) if self.tuples else h
