"""The memory of a session as named tensors, and back; a loaded state is checked against the model as a whole."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from ..nn.tokens import WHOLE, tokens_of
from ..state import KVState, RecurrentState
from .protocols import LayerCache, ModelAdapter
from .rewinding import set_state_type
from .settings import Eviction
from .window_buffer import WindowBuffer

TEXTS = ("waiting", "waiting_mask", "kept_mask")
"""Names of the tokens and masks in a saved state."""
FARTHEST = 2**53
"""The largest position that a state may have."""
_States = tuple[dict[int, RecurrentState], dict[int, KVState]]


class SavedSession(Protocol):
    """The part of a session that is saved, or decides what a saved state has to look like."""

    adapter: ModelAdapter
    memory: LayerCache
    eviction: Eviction
    position: int
    buffer: WindowBuffer
    kept_mask: Tensor | None
    state_dtype: torch.dtype | None

    @property
    def vocabulary(self) -> int | None:
        """The number of tokens that the model can embed; None where that is unknown."""


class Restored(NamedTuple):
    """The values from which a session goes on."""

    memory: LayerCache
    position: int
    batch: int
    buffer: WindowBuffer
    kept_mask: Tensor | None


def saved(session: SavedSession) -> dict[str, Tensor]:
    """The session's tensors by name: copies without gradients, each with memory of its own."""
    found = {"position": torch.tensor(session.position)}
    for kept in (session.memory.fast(), session.memory.slow()):
        for i, pair in kept.items():
            found |= {f"{i}.{name}": t for name, t in pair._asdict().items()}
    texts = dict(zip(TEXTS, (*session.buffer, session.kept_mask), strict=True))
    found |= {name: t for name, t in texts.items() if t is not None}
    return {name: t.detach().clone(memory_format=torch.contiguous_format) for name, t in found.items()}


def restored(session: SavedSession, state: Any, device: torch.device) -> Restored:
    """Copies on `device` of a state that `saved` returned for a session like this one.

    Raises:
        TypeError, ValueError: this session cannot go on from the state.
    """
    if not isinstance(state, Mapping):
        raise TypeError(f"state: got a {type(state).__name__}; expected what state_dict() of a session gave")
    for name, t in state.items():
        if not isinstance(t, Tensor):
            raise TypeError(f"state: got a {type(t).__name__} for {name!r}; expected a tensor")
    position = _position(state)
    given = _names(session, state, position)
    copies = {name: t.detach().to(device, copy=True) for name, t in state.items() if name != "position"}
    _check_states(copies, given, _example_states(session.adapter, device, session.state_dtype))
    rows = _batch_of(copies)
    _check_texts(copies, session.vocabulary)
    if "waiting" in copies:
        copies["waiting"] = tokens_of(copies["waiting"], None)
    memory = session.adapter.memory()
    fast, slow = session.memory.recurrent, session.memory.attention
    memory.set_fast(
        {i: RecurrentState(copies[f"{i}.conv"], copies[f"{i}.state"]) for i in fast if f"{i}.conv" in copies}
    )
    memory.set_slow({i: KVState(copies[f"{i}.keys"], copies[f"{i}.values"]) for i in slow if f"{i}.keys" in copies})
    buffer = WindowBuffer(copies.get("waiting"), copies.get("waiting_mask"))
    return Restored(memory, position, rows, buffer, copies.get("kept_mask"))


def _position(state: Mapping[str, Tensor]) -> int:
    if "position" not in state:
        raise ValueError("state: got no 'position'; expected what state_dict() of a session gave")
    given = state["position"]
    if given.numel() != 1 or given.dtype not in WHOLE or not 0 <= int(given) <= FARTHEST:
        got = given.item() if given.numel() == 1 else list(given.shape)
        raise ValueError(f"state: got {given.dtype} {got} for 'position'; expected one whole number from 0 on")
    return int(given)


def _names(session: SavedSession, state: Mapping[str, Tensor], position: int) -> list[str]:
    """The names of the layers' tensors.

    Raises:
        ValueError: a name is missing or unknown.
    """
    memory = session.memory
    fast = [f"{i}.{part}" for i in memory.recurrent for part in RecurrentState._fields]
    slow = [f"{i}.{part}" for i in memory.attention for part in KVState._fields]
    needed = [*(fast if position else []), *(slow if position and session.eviction == "sliding" else [])]
    texts = TEXTS if set(slow) & set(needed) else TEXTS[:2]
    missing = [name for name in needed if name not in state]
    unknown = [str(name) for name in state if name not in (*needed, "position", *texts)]
    if missing or unknown:
        got = "; ".join(
            part
            for part in (
                f"without {_some(missing)}" if missing else "",
                f"with {_some(unknown)}, which it does not know" if unknown else "",
            )
            if part
        )
        raise ValueError(
            f"state: got one {got}; expected that of a session of this model with eviction {session.eviction!r} "
            f"at position {position}"
        )
    return needed


def _some(names: list[str]) -> str:
    return ", ".join(names[:6]) + (f" and {len(names) - 6} more" if len(names) > 6 else "")


@torch.no_grad()
def _example_states(adapter: ModelAdapter, device: torch.device, state_dtype: torch.dtype | None) -> _States:
    """The states of the model after one token, for their shapes and types, as a session keeps them."""
    memory = adapter.memory()
    h, calls = adapter.open(torch.zeros(1, 1, dtype=torch.int64, device=device), 0, memory, None)
    for call in calls:
        h = call(h)
    set_state_type(memory, state_dtype)
    return memory.fast(), memory.slow()


def _check_states(state: dict[str, Tensor], names: list[str], examples: _States) -> None:
    """Check types and sizes, except for the batch and the number of kept tokens.

    Raises:
        ValueError: the first tensor that differs, or several numbers of kept tokens.
    """
    kept: dict[str, int] = {}
    for name in names:
        number, part = name.split(".")
        pair: Any = examples[part in KVState._fields].get(int(number))
        if pair is None:
            continue
        t, like = state[name], getattr(pair, part)
        free = {0} | ({like.ndim - 2} if part in KVState._fields else set())
        same = t.ndim == like.ndim and all(t.shape[d] == like.shape[d] for d in range(like.ndim) if d not in free)
        if not same or t.dtype != like.dtype or t.numel() == 0 < like.numel():
            sizes = [("tokens" if d else "B") if d in free else size for d, size in enumerate(like.shape)]
            expected = f"{like.dtype} [{', '.join(map(str, sizes))}]"
            raise ValueError(
                f"state: got {t.dtype} {list(t.shape)} for {name!r}; expected {expected}, as this model has"
            )
        if part in KVState._fields:
            kept[name] = t.shape[-2]
    if "kept_mask" in state:
        kept["kept_mask"] = state["kept_mask"].shape[-1]
    if len(set(kept.values())) > 1:
        raise ValueError(f"state: got {kept} kept tokens; expected one number of them")


def _batch_of(state: dict[str, Tensor]) -> int:
    """The rows of the batch, which all tensors share; 0 without tensors.

    Raises:
        ValueError: tensors with several numbers of rows.
    """
    rows = {name: t.shape[0] for name, t in state.items() if t.ndim > 0 and t.numel() > 0}
    if len(set(rows.values())) > 1:
        odd = {count: name for name, count in rows.items()}
        got = ", ".join(f"{count} in {name!r}" for count, name in odd.items())
        raise ValueError(f"state: got rows of a batch: {got}; expected one number of them")
    return max(rows.values(), default=0)


def _check_texts(state: dict[str, Tensor], vocabulary: int | None) -> None:
    waiting, mask = state.get("waiting"), state.get("waiting_mask")
    for name in TEXTS:
        t = state.get(name)
        if t is not None and (t.ndim != 2 or t.dtype not in WHOLE or t.numel() == 0):
            raise ValueError(f"state: got {t.dtype} {list(t.shape)} for {name!r}; expected integers [B,tokens]")
    for name in TEXTS[1:]:
        t = state.get(name)
        if t is not None and bool(((t != 0) & (t != 1)).any()):
            raise ValueError(f"state: got other values than 0 and 1 for {name!r}")
    if mask is not None and (waiting is None or mask.shape != waiting.shape):
        expected = "none" if waiting is None else list(waiting.shape)
        raise ValueError(f"state: got {list(mask.shape)} for 'waiting_mask'; expected {expected}, as 'waiting'")
    if waiting is None or vocabulary is None:
        return
    if int(waiting.min()) < 0 or int(waiting.max()) >= vocabulary:
        raise ValueError(f"state: got tokens beyond the vocabulary of {vocabulary} for 'waiting'")
