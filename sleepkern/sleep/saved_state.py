"""What a session remembers, as tensors, and back: all of it or none, checked against the model."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from ..nn.tokens import WHOLE, tokens_of
from ..state import KVState, RecurrentState
from .protocols import Memory, Stack

if TYPE_CHECKING:
    from .session import SleepSession

TEXTS = ("waiting", "waiting_mask", "kept_mask")
FARTHEST = 2**53
"""Largest position that is taken."""
_Forms = tuple[dict[int, RecurrentState], dict[int, KVState]]


class Restored(NamedTuple):
    """What a session goes on from."""

    memory: Memory
    position: int
    batch: int
    waiting: Tensor | None
    waiting_mask: Tensor | None
    kept_mask: Tensor | None


def saved(session: SleepSession) -> dict[str, Tensor]:
    """Copies, each with memory of its own, without gradients."""
    found = {"position": torch.tensor(session.position)}
    for kept in (session.memory.fast(), session.memory.slow()):
        for i, pair in kept.items():
            found |= {f"{i}.{name}": t for name, t in pair._asdict().items()}
    texts = {name: getattr(session, name) for name in TEXTS}
    found |= {name: t for name, t in texts.items() if t is not None}
    return {name: t.detach().clone(memory_format=torch.contiguous_format) for name, t in found.items()}


def restored(session: SleepSession, state: Any, device: torch.device) -> Restored:
    """Copies on `device` of what `saved` gave of a session like this one.

    Raises:
        TypeError, ValueError: anything in it that this session could not go on from.
    """
    if not isinstance(state, Mapping):
        raise TypeError(f"state: got a {type(state).__name__}; expected what state_dict() of a session gave")
    for name, t in state.items():
        if not isinstance(t, Tensor):
            raise TypeError(f"state: got a {type(t).__name__} for {name!r}; expected a tensor")
    position = _position(state)
    given = _names(session, state, position)
    copies = {name: t.detach().to(device, copy=True) for name, t in state.items() if name != "position"}
    _check_forms(copies, given, _forms(session.stack, device))
    rows = _rows(copies)
    _check_texts(copies, session.vocabulary)
    if "waiting" in copies:
        copies["waiting"] = tokens_of(copies["waiting"], None)
    memory = session.stack.memory()
    fast, slow = session.memory.recurrent, session.memory.attention
    memory.set_fast(
        {i: RecurrentState(copies[f"{i}.conv"], copies[f"{i}.state"]) for i in fast if f"{i}.conv" in copies}
    )
    memory.set_slow({i: KVState(copies[f"{i}.keys"], copies[f"{i}.values"]) for i in slow if f"{i}.keys" in copies})
    return Restored(memory, position, rows, *(copies.get(name) for name in TEXTS))


def _position(state: Mapping[str, Tensor]) -> int:
    if "position" not in state:
        raise ValueError("state: got no 'position'; expected what state_dict() of a session gave")
    given = state["position"]
    if given.numel() != 1 or given.dtype not in WHOLE or not 0 <= int(given) <= FARTHEST:
        got = given.item() if given.numel() == 1 else list(given.shape)
        raise ValueError(f"state: got {given.dtype} {got} for 'position'; expected one whole number from 0 on")
    return int(given)


def _names(session: SleepSession, state: Mapping[str, Tensor], position: int) -> list[str]:
    """Those of layers; what is read must all be there, and nothing else."""
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
def _forms(stack: Stack, device: torch.device) -> _Forms:
    """What the model remembers of one token."""
    memory = stack.memory()
    h, calls = stack.open(torch.zeros(1, 1, dtype=torch.int64, device=device), 0, memory, None)
    for call in calls:
        h = call(h)
    return memory.fast(), memory.slow()


def _check_forms(state: dict[str, Tensor], names: list[str], forms: _Forms) -> None:
    """Types and sizes, but for the batch and the tokens kept."""
    kept: dict[str, int] = {}
    for name in names:
        number, part = name.split(".")
        pair: Any = forms[part in KVState._fields].get(int(number))
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


def _rows(state: dict[str, Tensor]) -> int:
    """Of the batch, the same in all; 0 where there are none."""
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
